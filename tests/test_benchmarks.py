"""The benchmark that is for a GPU runs here at toy size, so that it works on the day there is one; the published table is reproduced."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.small import called


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here: run it for real")
def test_the_gpu_s_benchmark_measures_the_trainer_at_toy_size_and_goes_on(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu"),
        "--toy",
        "--out",
        "out",
        "--minutes",
        "8",
        "--stage",
        "attention",
        "correctness",
    ]
    done = called([*command, "training", "--rows", "a", "a3", "b", "c"], tmp_path, timeout=600)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["attention"]["varlen"]["relative error"] < [1e-6] * 4
    assert results["correctness"]["autocast, varlen"]["gradients"] < 0.02
    rows = {name.split()[0]: row for name, row in results["training"].items()}
    assert list(rows) == ["a", "a3", "b", "c"]
    assert not any("error" in row for row in rows.values())
    for row in rows.values():  # the same text and the same weights: the same losses, within what bfloat16 rounds
        assert row["losses"][:5] == pytest.approx(rows["a"]["losses"][:5], abs=2e-3)
    assert "| training | a single, sdpa with the mask | " in done.out
    begun = (tmp_path / "out" / "results.json").stat().st_mtime_ns
    again = called([*command, "--rows", "a"], tmp_path)
    assert again.code == 0, again.err
    assert json.loads((tmp_path / "out" / "results.json").read_text())["attention"]["varlen"] == results["attention"]["varlen"]
    assert (tmp_path / "out" / "results.json").stat().st_mtime_ns >= begun


def test_the_published_table_is_reproduced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = ROOT / "benchmarks" / "plan_published.py"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    done = called([sys.executable, str(script)], tmp_path)
    assert done.code == 0, done.err
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in done.out.splitlines() if line.startswith("| ")]
    rows = {row[0]: row[1:] for row in cells}
    for name in ("FSDP", "FSDP + Liger"):
        peak = next(row for row in cells if row[0] == name and "%" in row[4])
        assert abs(float(peak[4].removesuffix(" %"))) <= 8
    for name in ("whole", "on each of 8"):
        assert abs(float(rows[name][2].removesuffix(" %"))) <= 2
    times = [row for row in cells if row[0].startswith(("p5,", "2 × p4d,"))]
    assert len(times) == 4
    assert all(abs(float(row[3].removesuffix(" %"))) <= 20 for row in times)
    batches = {row[0]: row for row in cells if len(row) == 5 and "–" in row[1] and row[0] != "case"}
    surely = {name: [int(batches[name][i].split()[0]) for i in (1, 3)] for name in ("FSDP", "FSDP + Liger")}
    assert [n - n % 2 for n in surely["FSDP"]] == [4, 10]  # the published ones are even
    assert surely["FSDP + Liger"][0] == 14
