"""The benchmark that is for a GPU runs here at toy size, so that it works on the day there is one."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.small import called


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run it for real")
def test_the_gpu_s_benchmark_prints_its_table_at_toy_size(tmp_path: Path) -> None:
    script = ROOT / "benchmarks" / "gpu" / "liger_and_sharding.py"
    done = called([sys.executable, str(script), "--processes", "2", "--batches", "1", "2"], tmp_path)
    assert done.code == 0, done.err
    assert "no GPU: a toy model, whose figures mean nothing" in done.out
    rows = re.findall(r"^\| (ddp|fsdp) \| no \| ≥ (\d+) \| [\d.]+ \| ([\d,]+) \| ([\d,]+) \((\d+)\) \|$", done.out, re.MULTILINE)
    assert [(kind, largest) for kind, largest, *_ in rows] == [("ddp", "2"), ("fsdp", "2")]
    assert all(int(rate.replace(",", "")) > 0 for _, _, *rates, _ in rows for rate in rates)
