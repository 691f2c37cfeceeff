"""Whole small runs whose phases have mixes of their own: killed and gone on with, in two processes, and going on from another run."""

from __future__ import annotations

import re
import signal
import sys

import pytest

from azrecipe.training.checkpoints import MARKER
from tests.conftest import write
from tests.small import Project, assert_same_weights, called, fill, weights

MIXED = """
stage: pretrain
extends: base.yaml
data: {datasets: [{path: azerbaijani.jsonl, id: az, weight: 3}, {path: english.jsonl, id: en}]}
phases:
  - {name: stable, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 6, data: {weights: {az: 0, en: 1}}}
  - {name: anneal, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 10, data: {weights: {az: 1}}}
"""
SECOND = "{name: more, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 3, data: {weights: {az: 3, en: 0}}}"
FURTHER = f"""
stage: pretrain
extends: mixed.yaml
model: {{config: null, output_of: mixed.yaml}}
tokenizer: null
data: {{continue_from: mixed.yaml}}
phases: [{SECOND}]
"""


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The recipe, run once without a stop."""
    project = fill(tmp_path_factory.mktemp("mixed"))
    write(project.folder / "mixed.yaml", MIXED)
    write(project.folder / "further.yaml", FURTHER)
    write(project.folder / "printed.txt", project.run("mixed"))
    return project


def test_a_run_killed_in_its_second_phase_goes_on_as_if_nothing_had_been(mixed: Project) -> None:
    code = mixed.interrupt("mixed", lambda run: (run / "checkpoints/anneal/checkpoint-4" / MARKER).exists(), signal.SIGKILL, runs="killed")
    assert code == -signal.SIGKILL
    assert "going on from" in mixed.run("mixed", runs="killed")
    assert_same_weights(mixed.path("mixed") / "final", mixed.path("mixed", "killed") / "final")
    assert mixed.losses("mixed") == mixed.losses("mixed", "killed")
    result = mixed.result("mixed")
    assert result["data"] == mixed.result("mixed", "killed")["data"]
    shares = [source["phase_shares"] for source in result["data"]]
    assert [share["stable"] for share in shares] == [0, 1]
    assert abs(shares[0]["anneal"] - 0.5) < 0.1  # 10 steps of 8 sequences of 32 tokens, in documents of about 700
    assert [mix["weights"] for mix in result["data_end"]["mixes"]] == [[0, 1], [1, 1]]
    assert "phase stable reads ./azerbaijani.jsonl 0.0%, ./english.jsonl 100.0%" in (mixed.folder / "printed.txt").read_text()


def test_the_shares_of_each_phase_are_shown_before_and_after(mixed: Project) -> None:
    def show(*words: str) -> str:
        done = called([sys.executable, "-m", "azrecipe", *words], mixed.folder)
        assert done.code == 0, done.text
        return " ".join(done.text.replace("│", " ").split())

    assert "it reads ./azerbaijani.jsonl 0.0%, ./english.jsonl 100.0%" in show("check", "mixed.yaml")
    prepared = show("prepare", "mixed.yaml")
    assert "Share of each source in the text of a phase" in prepared
    anneal = mixed.result("mixed")["data"][0]["phase_shares"]["anneal"]
    shown = re.findall(r"azerbaijani.jsonl 0\.0% ([\d.]+)%", prepared)
    assert shown and abs(float(shown[-1]) - 100 * anneal) < 0.1, prepared
    show("report", "runs/small/mixed", "--output", "page.html")
    page = (mixed.folder / "page.html").read_text()
    assert page.count("Share of each source in the text of a phase") == 1


def test_two_processes_read_the_mixes_that_one_reads(mixed: Project) -> None:
    """float32; the sum over two processes is taken in another order."""
    mixed.run("mixed", "--num-processes", "2", "--set", "training.per_device_train_batch_size=4", runs="two")
    one, two = mixed.losses("mixed"), mixed.losses("mixed", "two")
    assert len(one) == len(two) == 16
    assert max(abs(a - b) for a, b in zip(one, two, strict=True)) < 2e-6
    left, right = (weights(mixed.path("mixed", runs) / "final") for runs in ("runs", "two"))
    assert max(float((left[key] - right[key]).abs().max()) for key in left) < 1e-4
    assert mixed.result("mixed")["data_end"] == mixed.result("mixed", "two")["data_end"]


def test_another_run_goes_on_in_the_text_with_a_third_mix(mixed: Project) -> None:
    printed = mixed.run(
        "further",
        "--set",
        "data.datasets=[{path: azerbaijani.jsonl}, {path: english.jsonl, id: en}, {path: english.jsonl, max_bytes: 500, id: az}]",
        code=2,
    )
    assert "the data cannot go on from there: datasets, validation, seed or tokenizer differ" in printed
    mixed.run("further")
    further = mixed.result("further")
    assert [mix["weights"] for mix in further["data_end"]["mixes"]] == [[0, 1], [1, 1], [3, 0]]
    assert further["data"][1]["phase_shares"] == {"more": 0}
    assert further["data_end"]["token"] == (16 + 3) * 8 * 32
