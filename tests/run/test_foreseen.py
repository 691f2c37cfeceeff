"""Runs that look ahead: what a step will need stands in plan.json before it is trained and on the page after; no failure of it stops a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.conftest import write
from tests.small import Project, fill


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The small job's recipes and text, with a cache of its own; runs on a CPU are asked to look ahead."""
    for name, value in {"AZRECIPE_FORESEE": "1", "AZRECIPE_FORESEE_SECONDS": "300", "XDG_CACHE_HOME": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    project = fill(tmp_path)
    text = (project.folder / "base.yaml").read_text()
    write(project.folder / "base.yaml", text.replace("max_steps: 20", "max_steps: 3"))
    return project


@pytest.mark.slow
def test_a_run_writes_what_it_will_need_and_its_page_sets_that_beside_what_it_took(small: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZRECIPE_PAGE", "1")
    printed = small.run("base")
    plan = json.loads((small.path("base") / "plan.json").read_text())
    (loop,) = plan["loops"]
    parameters = small.result("base")["parameters"]
    assert loop["parameters"] == {"total": parameters, "trainable": parameters, "embeddings": 340 * 32}
    assert loop["memory"]["parts"]["weights"] == 4 * parameters
    assert (plan["device"], plan["card"], loop["verdict"], loop["tokens_per_second"]) == ("cpu", None, None, None)
    foreseen = printed.index("  estimate, english: ")
    assert foreseen < printed.index("english: 3 steps"), "before training"
    assert "of tensors at the peak" in printed
    assert "Estimated and measured" in printed, "the table at the end"
    page = (small.path("base") / "report.html").read_text()
    assert "Estimated and measured</h2>" in page
    assert "On a CPU the measured memory is not comparable" in page
    environment = json.loads((small.path("base") / "environment.json").read_text())
    assert (environment["backend"]["kind"], environment["nodes"], environment["gpu_memory_bytes"]) == ("single", 1, [])


@pytest.mark.slow
def test_a_look_ahead_that_takes_too_long_is_said_in_a_line_and_the_run_goes_on(
    small: Project, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZRECIPE_FORESEE_SECONDS", "0.01")
    write(small.folder / "sft.yaml", (small.folder / "sft.yaml").read_text().replace("{output_of: cpt.yaml}", f"{{name_or_path: {llama}}}"))
    run = small.path("sft")
    write(run / "plan.json", '{"loops": "of an earlier start"}')
    write(run / "environment.json", '{"azrecipe": "0.1.0", "python": "3.11.7", "versions": {}}')
    printed = small.run("sft", "--set", "training.max_steps=2")
    assert "  no estimate of memory and rate: it took more than 0.01 s (AZRECIPE_FORESEE_SECONDS allows more)\n" in printed
    assert small.status("sft")["state"] == "complete"
    assert not (run / "plan.json").exists()


def test_tuning_foresees_the_rows_that_the_template_adds(small: Project, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from azrecipe.data.inputs import Inputs
    from azrecipe.recipe.load import load_recipe
    from azrecipe.stages import sft

    monkeypatch.chdir(small.folder)
    write(
        "sft.yaml", Path("sft.yaml").read_text().replace("{output_of: cpt.yaml}", f"{{name_or_path: {llama}}}").replace("llama3", "chatml")
    )
    recipe = load_recipe("sft.yaml")
    checked = sft.check(recipe, Inputs(recipe, Path("runs")))
    assert checked.shape.config["vocab_size"] == max(checked.base.tokenizer.get_vocab().values()) + 1
    assert checked.shape.new_tokens == len(checked.new_token_ids) > 0
    assert checked.shape.config["model_type"] == "llama"
