"""A matrix of three vocabularies through the same training on the same bytes, one cell of it broken, as `azrecipe run` leaves it."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import run_command, write
from tests.small import Project, assert_same_weights, fill

STUDY = """
stage: pipeline
project: small
description: The small study.
steps: [base.yaml, tokenizer.yaml, cpt.yaml]
set:
  base.yaml: {"phases[0].max_steps": 6}
  cpt.yaml:
    training.save_steps: 1
    phases:
      - {name: embeddings, trainable_parameters: [embeddings], learning_rate: 1e-2, max_bytes: 2000}
      - {name: full, trainable_parameters: [all], learning_rate: 5e-3, max_bytes: 6000}
matrix:
  baseline: {cpt.yaml: {tokenizer.candidate: baseline, phases: [{name: full, trainable_parameters: [all], learning_rate: 5e-3, max_bytes: 8000}]}}
  broken: {cpt.yaml: {training.trainer_arguments: {hub_strategy: sdg}}}
  custom: {cpt.yaml: {tokenizer.candidate: custom}}
  random: {cpt.yaml: {tokenizer.candidate: custom, tokenizer.new_embeddings: random}}
compare: {price_per_hour: 30}
"""
CELLS = ("baseline", "custom", "random")


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The whole matrix, run once by `azrecipe run study.yaml`; tests only read it."""
    project = fill(tmp_path_factory.mktemp("study"))
    write(project.folder / "study.yaml", STUDY)
    write(project.folder / "printed.txt", project.run("study", code=2))
    return project


@pytest.fixture
def begun(study: Project, tmp_path: Path) -> Project:
    """The study in a folder of the test's own, the steps that run once and the baseline's cell already there."""
    project = fill(tmp_path)
    write(project.folder / "study.yaml", STUDY)
    for run in ("base", "tokenizer", "cells/baseline/cpt"):
        shutil.copytree(study.path(run), project.path(run))
    return project


def states(project: Project) -> dict[Path, int]:
    """Every file of the runs with the time of its last change, those of the broken cell left out."""
    runs = project.folder / "runs"
    return {p: p.stat().st_mtime_ns for p in runs.rglob("*") if p.is_file() and not p.is_relative_to(project.path("cells/broken"))}


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def test_the_first_steps_run_once_and_a_cell_that_fails_does_not_stop_the_others(study: Project) -> None:
    printed = (study.folder / "printed.txt").read_text()
    assert printed.count("base.yaml: pretrain →") == printed.count("tokenizer.yaml: tokenizer →") == 1
    assert sorted(p.parent.name for p in (study.folder / "runs").rglob("status.json")) == ["base", "cpt", "cpt", "cpt", "tokenizer"]
    assert {cell: study.status(f"cells/{cell}/cpt")["state"] for cell in CELLS} == dict.fromkeys(CELLS, "complete")
    assert printed.index("broken: cpt.yaml ended with exit code 2") < printed.index("custom: cpt.yaml")
    assert "cell broken failed with exit code 2" in printed
    assert study.result("study")["unfinished"] == [{"cell": "broken", "state": "failed", "step": "cpt.yaml", "exit_code": 2, "message": ""}]
    assert (study.folder / "runs" / ".cache").is_dir()
    assert not (study.path("cells/.cache")).exists()


def test_cells_are_ranked_by_the_last_phases_bits_per_byte(study: Project) -> None:
    found = study.result("study")
    rows = {row["cell"]: row for row in found["ranking"]}
    results = {cell: study.result(f"cells/{cell}/cpt") for cell in CELLS}
    assert list(rows) == sorted(CELLS, key=lambda cell: results[cell]["bpb"]["full"]["target"])
    for cell, row in rows.items():
        assert row["bpb"] == results[cell]["bpb"]["full"]["target"]
        start = results[cell]["bpb"]["base" if cell == "baseline" else "new_vocabulary"]
        assert row["bpb_after"] == {"start": start, **{phase: results[cell]["bpb"][phase] for phase in results[cell]["phases"]}}
        assert row["bytes"] == results[cell]["bytes"]
        lines = study.path(f"cells/{cell}/cpt") / "metrics.jsonl"
        assert row["steps"] == len(lines.read_text().splitlines())
        assert row["tokens"] == row["steps"] * 8 * 32
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["training_seconds"], rel=0.01)
        assert row["price"] == pytest.approx(row["training_seconds"] / 120, abs=0.01)
        assert row["same_bytes"]
    assert {cell: row["vocab_size"] for cell, row in rows.items()} == {"baseline": 340, "custom": 400, "random": 400}
    assert found["definitions"].keys() >= {"bpb", "bpb_after", "bytes", "training_seconds", "price"}
    printed = (study.folder / "printed.txt").read_text()
    for cell, row in rows.items():
        assert f"│ {cell} " in printed
        assert f"{row['bpb']:.3f}" in printed


def test_the_baseline_keeps_the_bases_vocabulary_and_spends_its_bytes_in_one_phase(study: Project) -> None:
    result = study.result("cells/baseline/cpt")
    assert result["vocabulary"] is None
    assert list(result["bpb"]) == ["base", "full"]
    assert study.result("cells/custom/cpt")["vocabulary"]["new_size"] == 400
    assert study.result("cells/custom/cpt")["bpb"]["new_vocabulary"] != study.result("cells/random/cpt")["bpb"]["new_vocabulary"]


def test_running_it_again_touches_nothing_and_tries_the_failed_cell_again(study: Project) -> None:
    before = states(study)
    printed = study.run("study", code=2)
    assert printed.count("already complete") == 2 + len(CELLS)
    assert "cell broken failed with exit code 2" in printed
    assert states(study) == before


def test_kill_9_inside_a_cell_and_the_rerun_ends_in_the_same_weights(study: Project, begun: Project) -> None:
    own = begun.path("cells/custom/cpt")
    assert begun.interrupt("study", lambda _: steps(own) >= 6, signal.SIGKILL, "--cell", "custom") == -signal.SIGKILL
    assert not (own / "result.json").exists()
    printed = begun.run("study", "--cell", "custom")
    assert "going on from" in printed
    assert_same_weights(own / "final", study.path("cells/custom/cpt") / "final")
    assert begun.losses("cells/custom/cpt") == study.losses("cells/custom/cpt")
    rows = {row["cell"]: row for row in begun.result("study")["ranking"]}
    theirs = {row["cell"]: row for row in study.result("study")["ranking"]}
    assert {name: row["bpb_after"] for name, row in rows.items()} == {name: theirs[name]["bpb_after"] for name in ("custom", "baseline")}
    assert {cell["cell"]: cell["state"] for cell in begun.result("study")["unfinished"]} == {"broken": "not run", "random": "not run"}


def test_a_signal_stops_the_whole_matrix_and_a_cell_can_be_left_out(begun: Project) -> None:
    own = begun.path("cells/custom/cpt")
    assert begun.interrupt("study", lambda _: steps(own) >= 2, signal.SIGTERM, "--set", "matrix.broken=null") == 143
    assert begun.status("cells/custom/cpt")["state"] == "interrupted"
    assert not begun.path("cells/random").exists()
    assert not begun.path("cells/broken").exists()
    assert not (begun.path("study") / "result.json").exists()


def test_a_signal_before_the_first_step_stops_the_whole_matrix_too(begun: Project) -> None:
    """The child has no checkpoint to save yet and dies of the signal: the other cells must not go on."""
    own = begun.path("cells/custom/cpt")
    assert begun.interrupt("study", lambda _: own.exists(), signal.SIGTERM, "--set", "matrix.broken=null") == 143
    assert not (own / "result.json").exists()
    assert not begun.path("cells/random").exists()


def test_another_validation_set_ranks_the_other_way_round(study: Project, tmp_path: Path) -> None:
    project = Project(tmp_path / "copy")
    shutil.copytree(study.folder, project.folder)
    by_target = [row["cell"] for row in project.result("study")["ranking"]]
    assert by_target[-1] == "baseline", "the base's vocabulary is the worst on the new language"
    project.run("study", "--cell", "baseline", "--set", "compare.dataset=english", "--quiet")
    found = project.result("study")
    assert found["ranking"][0]["cell"] == "baseline", "and forgets the least"
    assert [row["bpb"] for row in found["ranking"]] == sorted(row["bpb_after"]["full"]["english"] for row in found["ranking"])


def test_one_step_of_one_cell_in_a_launchers_process(study: Project) -> None:
    done = run_command("study.yaml", "--step", "cpt.yaml", "--cell", "random", cwd=study.folder)
    assert done.code == 0, done.text
    assert "already complete: runs/small/cells/random/cpt" in done.err


def test_a_changed_cell_is_refused_before_any_cell_runs(begun: Project) -> None:
    printed = begun.run("study", "--set", "cpt.yaml:training.weight_decay=0.2", code=2)
    assert "runs/small/cells/baseline/cpt holds the run of another recipe. Keys that differ: training.weight_decay" in printed
    assert not begun.path("cells/custom").exists()


def test_a_candidate_that_the_run_has_not_is_told_with_those_that_it_has(begun: Project) -> None:
    """The tokenizer's run may have been made with other candidates than its file names now."""
    changed = json.dumps({"candidates": {"baseline": {"kind": "baseline"}, "custum": {"kind": "custom", "vocab_size": 400}}})
    write(begun.folder / "tokenizer.yaml", (begun.folder / "tokenizer.yaml").read_text().rsplit("candidates:", 1)[0] + changed[1:-1])
    printed = begun.run("cpt", "--set", "tokenizer.candidate=custum", code=2)
    message = "runs/small/tokenizer has no candidate 'custum'; did you mean 'custom'? Candidates: baseline, custom"
    assert f"--set tokenizer.candidate=custum: {message}" in printed
    lone: Any = run_command("validate", "cpt.yaml", "--set", "tokenizer.candidate=custom", cwd=begun.folder)
    assert "tokenizer.yaml has no candidate 'custom'; did you mean 'custum'? Candidates: baseline, custum" in lone.out
