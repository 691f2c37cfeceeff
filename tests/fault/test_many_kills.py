"""Four kills (`python -m tests.fault.kill_and_resume --kills 20` makes more) with SIGKILL at random moments, and the weights of a run left alone: one process, and FSDP 2 with two."""

from __future__ import annotations

import sys

import pytest

from tests.small import ROOT, called


@pytest.mark.long
@pytest.mark.parametrize("launch", [(), ("--accelerate-config", "fsdp", "--num-processes", "2")], ids=["one process", "fsdp × 2"])
def test_many_kills_change_nothing(launch: tuple[str, ...]) -> None:
    done = called([sys.executable, "-m", "tests.fault.kill_and_resume", "--kills", "4", *launch], ROOT, 900)
    assert done.code == 0, done.text
    assert "4 kills" in done.out.splitlines()[-1]
