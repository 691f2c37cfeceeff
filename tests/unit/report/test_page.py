"""Parts of pages from what runs leave in several shapes; what a run keeps for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from azrecipe.errors import CommandError
from azrecipe.recipe.diff import diff_with_parent
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline
from azrecipe.report import evaluate_section, page, training_curves
from azrecipe.report.html import GENERATOR_MARK, render_sections, render_table
from azrecipe.runs import event_log
from azrecipe.runs.reader import RunRecord
from tests.conftest import TOKENIZER, jsonl, write


def test_an_evaluation_is_shown_with_and_without_intervals_and_with_what_else_it_has(tmp_path: Path) -> None:
    sample = {"prompt": "Salam", "output": "Salam!", "tokens": 3, "ended": True, "language": "az", "fidelity": 0.5, "more": [1]}
    base: dict[str, Any] = {
        "path": "x", "parameters": 10, "vocab_size": 5, "bpb": {"az": 3.0}, "fertility": {"az": {"value": 2.5, "interval": None}},
        "samples": [sample],
    }  # fmt: skip
    tuned = {
        **base,
        "bpb": {"az": {"value": 2.0, "interval": [1.75, 2.25]}},
        "tasks": {"belebele": {"acc": {"value": 0.4375, "interval": [0.25, 0.5]}, "acc_norm": 0.5}},
        "differences": {"bpb": {"az": {"value": -1.0, "interval": [-1.5, -0.5]}}},
    }
    write(tmp_path / "result.json", json.dumps({"stage": "evaluate", "models": {"base": base, "tuned": tuned}}))
    shown = render_sections(evaluate_section.build_sections(RunRecord(tmp_path, "e")))
    assert '<th scope="row">base</th><td class="n">3.000</td>' in shown
    assert '<td class="n">2.000<br><small>[1.750–2.250]</small></td>' in shown
    assert ">belebele: acc</th>" in shown
    assert "0.4375<br><small>[0.25–0.5]</small>" in shown
    assert "Bits per byte, lower is better: difference to base" in shown
    assert "-1.000<br><small>[-1.500–-0.500]</small>" in shown
    assert "3 tokens, ended, language az, fidelity 50.0%" in shown
    assert "tuned 2" in shown, "the plot's description"
    write(
        tmp_path / "beside" / "result.json",
        json.dumps({"models": {"base": base, "tuned": base}, "differences": {"tuned": {"bpb": {"az": -1.0}}}}),
    )
    assert '<td class="n">-1.000</td>' in render_sections(evaluate_section.build_sections(RunRecord(tmp_path / "beside", "e")))


def test_a_column_of_numbers_stands_to_the_right_and_text_is_escaped() -> None:
    made = render_table("<c>", ["a", "b"], [["<x>", "1.5"], ["y", "–"]], [True, False])
    assert "<caption><span>&lt;c&gt;</span></caption>" in made
    assert '<tr class="chosen"><th scope="row">&lt;x&gt; ← selected</th><td class="n">1.5</td></tr>' in made
    assert '<th scope="col" class="n">b</th>' in made


def test_curves_of_phases_stand_one_behind_the_other(tmp_path: Path) -> None:
    lines = [
        {"phase": "a", "step": 1, "loss": 4.0, "tokens": 10, "bytes": 40},
        {"phase": "a", "step": 2, "loss": 3.0, "tokens": 20, "bytes": 80},
        {"phase": "b", "step": 2, "loss": 2.0, "tokens": 30, "bytes": 90},
        {"phase": "b", "step": 1, "eval_x_bpb": 1.5},
        {"phase": "b", "step": 4, "loss": float("nan"), "tokens": 60, "bytes": 180},
    ]
    write(tmp_path / "metrics.jsonl", jsonl(*lines) + '{"torn')
    write(
        tmp_path / "phases.json",
        json.dumps(
            {
                "bpb": {"base": {"x": 9.0}, "new_vocabulary": {"x": 3.0}, "a": {"x": 2.0}},
                "phases": {"a": {"steps": 3, "tokens": 30, "bytes": 120}},
            }
        ),
    )
    run = RunRecord(tmp_path, "r")
    assert training_curves.read_points(run, "loss", "tokens") == [(10, 4.0), (20, 3.0), (60, 2.0)]
    assert training_curves.phase_borders(run, "bytes") == [(0, "a"), (120, "b")]
    (bpb,) = training_curves.build_bpb_curves([run], "x", "tokens")
    assert (bpb.x, bpb.y) == ([0.0, 30, 45.0], [3.0, 2.0, 1.5])


def test_a_thinned_curve_keeps_its_mean_and_its_extremes() -> None:
    made = training_curves.thin_curve("c", [(float(i), float(i % 10)) for i in range(1000)], 0, 100)
    assert (len(made.x), made.y[0], made.low, made.high) == (100, 4.5, [0.0] * 100, [9.0] * 100)


def test_the_log_survives_a_torn_line_and_a_disk_that_takes_nothing(tmp_path: Path) -> None:
    event_log.log_start(tmp_path)
    with (tmp_path / event_log.EVENT_LOG_NAME).open("a") as file:
        file.write('{"time": "2026')
    event_log.log_event(tmp_path, "complete")
    assert [line["event"] for line in event_log.read_events(tmp_path)] == ["started", "complete"]
    event_log.log_event(tmp_path / "not there", "complete")


@pytest.mark.usefixtures("project", "llama")
def test_differences_name_both_values_and_the_place_through_inheritance_pipeline_and_command_line() -> None:
    write("tok.yaml", TOKENIZER)
    write("child.yaml", "stage: tokenizer\nextends: tok.yaml\nseed: 7\ncandidates: {custom: null, more: {kind: custom, vocab_size: 310}}\n")
    told = diff_with_parent(load_recipe("child.yaml", parse_overrides(["data.max_length=64"])))
    assert (told["extends"], told["parent"]) == (["tok.yaml"], "tok.yaml")
    assert {found["key"]: found for found in told["differences"]} == {
        "seed": {"key": "seed", "value": 7, "place": "child.yaml:3:7"},
        "data.max_length": {"key": "data.max_length", "value": 64, "place": "--set data.max_length=64"},
        "candidates.custom": {"key": "candidates.custom", "parent": {"kind": "custom", "vocab_size": 300}, "place": None},
        "candidates.more.kind": {"key": "candidates.more.kind", "value": "custom", "place": "child.yaml:4:41"},
        "candidates.more.vocab_size": {"key": "candidates.more.vocab_size", "value": 310, "place": "child.yaml:4:61"},
    }
    assert diff_with_parent(load_recipe("tok.yaml")) == {"file": "tok.yaml", "extends": [], "parent": "tok.yaml", "differences": []}
    write("pipe.yaml", "stage: pipeline\nproject: p\nsteps: [tok.yaml]\nset: {tok.yaml: {seed: 3}}\n")
    step = load_pipeline("pipe.yaml")[1][0].recipe
    assert diff_with_parent(step)["differences"] == [{"key": "seed", "value": 3, "place": "pipe.yaml:4:24"}]


def test_a_file_that_azrecipe_did_not_write_is_not_replaced(tmp_path: Path) -> None:
    """Neither by `report`, nor at the end of a run; a page of azrecipe's is, also one of an earlier version."""
    run = tmp_path / "run"
    write(run / "status.json", json.dumps({"state": "complete", "run_id": "0" * 32}))
    write(run / "recipe.yaml", "stage: evaluate\nproject: p\n")
    write(run / "result.json", json.dumps({"stage": "evaluate", "models": {}}))
    mine = write(tmp_path / "thesis.html", "<html>My thesis</html>")
    write(run / "report.html", "<html>My report</html>")
    for output in (mine, None):
        with pytest.raises(CommandError, match="no page of azrecipe and is not replaced"):
            page.write_page(run, output)
        with pytest.raises(CommandError, match="is not replaced"):
            page.write_comparison([run], mine)
    assert mine.read_text() == "<html>My thesis</html>"
    assert (run / "report.html").read_text() == "<html>My report</html>"
    page.write_page(run, mine, force=True)
    page.write_page(run, write(tmp_path / "empty.html", ""))
    earlier = write(tmp_path / "earlier.html", mine.read_text().replace(GENERATOR_MARK, "") + "old")
    assert "old" not in page.write_page(run, earlier).read_text()[-20:]
    assert page.write_page(run, mine).read_text() == earlier.read_text()
