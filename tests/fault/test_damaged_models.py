"""A model that was damaged after its run wrote it is named, and nothing is trained from it."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import Done
from tests.fault.test_kills import step
from tests.small import Project, assert_same_weights

WEIGHTS = "model.safetensors"


def flip(file: Path) -> None:
    """Change one bit of the last byte: of a weight in a safetensors file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 4
    file.write_bytes(content)


def has_finished_phase(run: Path) -> bool:
    file = run / "phases.json"
    return file.exists() and "embeddings" in json.loads(file.read_text())["phases"]


@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.json"])
def test_a_damaged_model_of_a_run_is_refused_by_name(small: Project, name: str) -> None:
    flip(small.path("base") / "final" / name)
    printed = small.run("cpt", code=3)
    assert f"runs/small/base/final/{name} is not what that run wrote (its checksum differs)" in printed
    assert "remove runs/small/base and run that recipe again" in printed
    assert step(small.path("cpt")) == 0


def test_a_damaged_phase_is_trained_again(small: Project, finished: Project) -> None:
    assert small.interrupt("cpt", has_finished_phase, signal.SIGKILL) == -signal.SIGKILL
    flip(small.path("cpt") / "phases" / "embeddings" / WEIGHTS)
    shutil.rmtree(small.path("cpt") / "checkpoints" / "full", ignore_errors=True)
    printed = small.run("cpt")
    assert f"phases/embeddings/{WEIGHTS} is missing or not what was written (its checksum differs), so the phase is not finished" in printed
    assert_same_weights(small.path("cpt") / "final", finished.path("cpt") / "final")


@pytest.mark.parametrize("command", ["push", "export"])
def test_what_is_damaged_is_not_published(finished: Project, tmp_path: Path, cli: Callable[..., Done], command: str) -> None:
    run = tmp_path / "small" / "sft"
    shutil.copytree(finished.path("sft"), run)
    flip(run / "adapter" / "adapter_model.safetensors")
    done = cli(command, run, *(["someone/model", "--dry-run"] if command == "push" else []))
    assert done.code == 3, done.err
    assert "adapter/adapter_model.safetensors is not what that run wrote" in done.err


def test_a_copy_of_a_model_may_be_changed(small: Project) -> None:
    shutil.copytree(small.path("base") / "final", small.folder / "mine")
    flip(small.folder / "mine" / WEIGHTS)
    (small.path("base") / "final" / "notes.txt").write_text("a file that the run did not write")
    recipe = (small.folder / "cpt.yaml").read_text().replace("{output_of: base.yaml}", "{name_or_path: ./mine}")
    (small.folder / "mine.yaml").write_text(recipe.replace("max_steps: 8", "max_steps: 1").replace("max_steps: 16", "max_steps: 1"))
    small.run("mine")
