"""Reading a run directory: typed results, and what is missing or of another stage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from azrecipe.errors import CommandError
from azrecipe.runs.reader import RunRecord
from tests.conftest import write


def write_run(folder: Path, **files: Any) -> RunRecord:
    for name, content in files.items():
        write(folder / f"{name}.json", json.dumps(content))
    return RunRecord(folder, "a run")


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("tokenizer", "tokenizer_result"),
        ("pretrain", "pretrain_result"),
        ("sft", "sft_result"),
        ("evaluate", "evaluate_result"),
        ("pipeline", "comparison_result"),
    ],
)
def test_a_result_is_read_as_that_of_its_stage_only(tmp_path: Path, stage: str, name: str) -> None:
    record = write_run(tmp_path, result={"stage": stage, "definitions": {}})
    assert getattr(record, name) == {"stage": stage, "definitions": {}}
    other = "sft_result" if name != "sft_result" else "pretrain_result"
    with pytest.raises(CommandError, match=f"a run of stage {stage}, not {other.removesuffix('_result')}"):
        getattr(record, other)


def test_an_unfinished_run_has_no_typed_result(tmp_path: Path) -> None:
    record = write_run(tmp_path, phases={"phases": {}, "bpb": {}}, status={"state": "interrupted"})
    assert record.result["stage"] == "pretrain"
    with pytest.raises(CommandError, match=r"not complete \(interrupted\): there is no result\.json"):
        _ = record.pretrain_result


def test_the_estimate_of_a_run_may_be_missing(tmp_path: Path) -> None:
    assert write_run(tmp_path).run_plan is None
    plan = write_run(tmp_path, plan={"device": "cpu", "loops": []}).run_plan
    assert plan is not None
    assert plan["device"] == "cpu"
