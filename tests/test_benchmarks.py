"""The benchmark that is for a GPU runs here at toy size, so that it works on the day there is one."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT
from tests.small import environment


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run it for real")
def test_the_gpu_s_benchmark_prints_its_table_at_toy_size() -> None:
    script = ROOT / "benchmarks" / "gpu" / "liger_and_sharding.py"
    done = subprocess.run(
        [sys.executable, str(script), "--processes", "2", "--batches", "1", "2"], capture_output=True, text=True, env=environment(), check=False, timeout=280
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no GPU: a toy model, whose figures mean nothing" in done.stdout
    rows = re.findall(r"^\| (ddp|fsdp) \| no \| ≥ (\d+) \| [\d.]+ \| ([\d,]+) \| ([\d,]+) \((\d+)\) \|$", done.stdout, re.MULTILINE)
    assert [(kind, largest) for kind, largest, *_ in rows] == [("ddp", "2"), ("fsdp", "2")]
    assert all(int(rate.replace(",", "")) > 0 for _, _, *rates, _ in rows for rate in rates)
