"""Four kills (`python -m tests.fault.kill_and_resume --kills 20` makes more) with SIGKILL at random moments, and the weights of a run left alone: one process, and FSDP 2 with two."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.small import ROOT, environment


@pytest.mark.parametrize("launch", [(), ("--accelerate-config", "fsdp", "--num-processes", "2")], ids=["one process", "fsdp × 2"])
def test_many_kills_change_nothing(launch: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "tests.fault.kill_and_resume", "--kills", "4", *launch]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 kills" in done.stdout.splitlines()[-1]
