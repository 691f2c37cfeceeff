"""The comparison of a matrix' cells, from run directories written by hand: ranks, sums, times, states and the table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from azrecipe.pipeline import matrix_ranking
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import group_by_cell, load_pipeline
from azrecipe.recipe.to_yaml import to_yaml
from azrecipe.report import terminal_tables
from azrecipe.runs.run_dir import locate_run
from tests.conftest import jsonl, write

FIRST = """\
stage: pretrain
project: p
model: {name_or_path: ./llama}
data: {datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}, english: {path: text.txt}}}
phases: [{name: a, trainable_parameters: [all], learning_rate: 1e-3, max_bytes: 100}]
training: {global_batch_size: 2}
"""
SECOND = FIRST.replace("name_or_path: ./llama", "output_of: first.yaml")
STUDY = """\
stage: pipeline
project: p
steps: [first.yaml, second.yaml]
matrix:
  x: {first.yaml: {seed: 1}}
  y: {first.yaml: {seed: 2}}
  z: {first.yaml: {seed: 3}}
compare: {price_per_hour: 36}
"""
RUNS = Path("runs")
Speeds = Sequence[tuple[int, float]]


@pytest.fixture
def study(project: Path) -> Path:
    for name, text in {"first": FIRST, "second": SECOND, "study": STUDY}.items():
        write(f"{name}.yaml", text)
    return project


def cells(*sets: str) -> tuple[Recipe, dict[str, list[Recipe]]]:
    pipeline, steps = load_pipeline("study.yaml", parse_overrides(sets))
    return pipeline, group_by_cell(steps)


def made(recipe: Recipe, bpb: dict[str, float], size: tuple[int, int] = (4, 400), speeds: Speeds = ((100, 50.0), (400, 100.0))) -> None:
    """A complete run of a recipe with one phase: BPB on target (english: 1 more), steps and bytes, logged tokens and speeds."""
    run = locate_run(recipe, RUNS).path
    steps, read = size
    result = {
        "bpb": {key: {"target": value, "english": value + 1} for key, value in bpb.items()},
        "phases": {"a": {"steps": steps, "tokens": 100 * steps, "bytes": read, "seconds": 1}},
        "parameters": 1000,
        "vocab_size": 300,
    }
    write(run / "recipe.yaml", to_yaml(recipe.data))
    write(run / "result.json", json.dumps(result))
    write(run / "metrics.jsonl", jsonl(*({"phase": "a", "step": 1, "tokens": t, "tokens_per_second": s} for t, s in speeds)))
    write(run / "status.json", json.dumps({"state": "complete", "run_id": "0" * 32}))


def everything_made(found: dict[str, list[Recipe]]) -> None:
    for nth, (first, second) in enumerate(found.values()):
        made(first, {"base": 5.0, "new_vocabulary": 6.0, "a": 4.0 - nth})
        made(second, {"base": 4.0 - nth, "a": 3.0 - nth})


def compared(*sets: str, failed: dict[str, int] | None = None) -> Any:
    pipeline, found = cells(*sets)
    return matrix_ranking.rank_cells(pipeline, found, RUNS, failed or {})


@pytest.mark.usefixtures("study")
def test_a_row_covers_all_recipes_that_made_the_cells_model() -> None:
    everything_made(cells()[1])
    found = compared()
    assert [row["cell"] for row in found["ranking"]] == ["z", "y", "x"]
    row = found["ranking"][0]
    assert (found["dataset"], row["bpb"]) == ("target", 1.0)
    assert {after: sets["target"] for after, sets in row["bpb_after"].items()} == {"start": 6.0, "a": 2.0, "second: a": 1.0}
    assert (row["bytes"], row["tokens"], row["steps"]) == (800, 800, 8)
    # each: 100 tokens at 50 a second, 300 at 100
    assert row["training_seconds"] == 10
    assert (row["tokens_per_second"], row["bytes_per_second"], row["price"]) == (80, 80, 0.1)
    assert found["unfinished"] == []


@pytest.mark.usefixtures("study")
def test_without_a_price_there_is_none_and_the_set_asked_for_ranks() -> None:
    everything_made(cells()[1])
    found = compared("compare.price_per_hour=null", "compare.dataset=english")
    assert [row["bpb"] for row in found["ranking"]] == [2.0, 3.0, 4.0]
    assert all("price" not in row for row in found["ranking"])


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize(
    ("speeds", "seconds"),
    [
        (((400, 100.0),), 4),
        (((100, 100.0), (200, 50.0), (300, 100.0), (400, 100.0)), 5),
        (((100, 10.0), (200, 50.0), (300, 100.0)), 15),  # a last step that is not logged goes at the median's speed
        (((100, 100.0), (100, None), (400, 100.0)), 4),  # a measurement between two steps
    ],
)
def test_training_time_is_summed_from_the_logged_speeds(speeds: Speeds, seconds: float) -> None:
    everything_made(cells()[1])
    made(cells()[1]["x"][0], {"base": 1.0, "a": 1.0}, speeds=speeds)
    row = next(row for row in compared()["ranking"] if row["cell"] == "x")
    assert row["training_seconds"] == seconds + 5  # second.yaml's are 5


@pytest.mark.usefixtures("study")
@pytest.mark.parametrize(
    ("x", "y", "same"),
    [
        (4, 4, True), (4, 6, True), (4, 7, False), (4, 2, True), (4, 1, False),  # two phases that end with whole steps of 100 bytes
        (400, 407, True), (400, 409, False),  # and one in a hundred
    ],
)  # fmt: skip
def test_cells_that_did_not_read_the_same_bytes_are_flagged(x: int, y: int, same: bool, capsys: pytest.CaptureFixture[str]) -> None:
    _, found = cells()
    for cell, steps in (("x", x), ("y", y)):
        made(found[cell][0], {"base": 1.0, "a": 1.0}, size=(steps, 100 * steps))
        made(found[cell][1], {"base": 1.0, "a": 1.0}, size=(x, 100 * x))
    result = compared()
    assert {row["cell"]: row["same_bytes"] for row in result["ranking"]} == {"x": True, "y": same}
    terminal_tables.show_comparison(result, "bytes")
    assert ("not the same bytes" in capsys.readouterr().out) is not same


@pytest.mark.usefixtures("study")
def test_cells_that_are_not_finished_are_listed_with_their_state(capsys: pytest.CaptureFixture[str]) -> None:
    pipeline, found = cells()
    made(found["x"][0], {"base": 1.0, "a": 1.0})
    status = {"state": "failed", "run_id": "0" * 32, "exit_code": 3, "message": "the disk is full"}
    write(locate_run(found["x"][1], RUNS).path / "status.json", json.dumps(status))
    everything_made({"z": found["z"]})
    other = found["y"][0]
    made(Recipe(other.path, other.stage, {**other.data, "seed": 7}, other.config, other.tree, cell=other.cell), {"base": 1.0, "a": 1.0})
    result = matrix_ranking.rank_cells(pipeline, found, RUNS, {})
    assert [row["cell"] for row in result["ranking"]] == ["z"]
    x, y = result["unfinished"]
    assert x == {"cell": "x", "state": "failed", "step": "second.yaml", "exit_code": 3, "message": "the disk is full"}
    assert (y["cell"], y["state"], y["step"]) == ("y", "refused", "first.yaml")
    assert "runs/p/cells/y/first holds the run of another recipe. Keys that differ: seed" in y["message"]
    terminal_tables.show_comparison(result, "The study")
    shown = capsys.readouterr().out
    assert "x: failed (second.yaml, exit code 3) the disk is full" in shown
    assert "│ z " in shown


@pytest.mark.usefixtures("study")
def test_no_cell_finished_is_no_table_and_a_failure_of_this_run_is_told() -> None:
    result = compared(failed={"y": 2})
    assert result["ranking"] == []
    assert [(cell["cell"], cell["state"], cell["exit_code"]) for cell in result["unfinished"]] == [
        ("x", "not run", None), ("y", "failed", 2), ("z", "not run", None),
    ]  # fmt: skip
    terminal_tables.show_comparison(result, "nothing yet")


@pytest.mark.usefixtures("study")
def test_a_result_that_says_the_same_is_not_written_again() -> None:
    pipeline, found = cells()
    everything_made(found)
    result = matrix_ranking.rank_cells(pipeline, found, RUNS, {})
    matrix_ranking.write_ranking(pipeline, RUNS, result)
    file = RUNS / "p" / "study" / "result.json"
    before = file.stat().st_mtime_ns
    matrix_ranking.write_ranking(pipeline, RUNS, matrix_ranking.rank_cells(pipeline, found, RUNS, {}))
    assert file.stat().st_mtime_ns == before
    assert json.loads(file.read_text()) == result
