"""The Python interface, as a notebook uses it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import azrecipe
from azrecipe.errors import CannotRun, CommandError, RecipeError, RunFailed
from azrecipe.operations.check_preview import PretrainPreview, SftPreview
from tests.conftest import ROOT, Done, write
from tests.small import Project, called, fill

BASE_STEPS = 6
TINY_CARD = """
cards:
  tiny: {memory_gb: 1, total_memory_gib: 0.2, bf16_tflops: 10, tf32_tflops: 5, fp32_tflops: 5, memory_gb_per_s: 100, link: {kind: pcie, gb_per_s: 10}}
"""
BROKEN = """
stage: pretrain
project: small
model: {name_or_path: ./broken}
data: {max_length: 32, datasets: [{path: english.jsonl}], validation: {english: {path: held_english.jsonl}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 4}]
training: {global_batch_size: 8, per_device_train_batch_size: 4, precision: float32, logging_steps: 1, save_steps: 4}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A folder with recipes and text, which is the current one, as a notebook's is."""
    folder = tmp_path_factory.mktemp("notebook")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("AZRECIPE_PAGE", "0")
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        yield fill(folder)


@pytest.fixture(scope="module")
def base(project: Project) -> Any:
    """The run of base.yaml, by azrecipe.run."""
    return azrecipe.run("base.yaml", overrides={"phases[0].max_steps": BASE_STEPS})


def command(folder: Path, *arguments: str) -> Done:
    return called([sys.executable, "-m", "azrecipe", *arguments], folder)


def test_the_import_is_light_and_lists_its_functions() -> None:
    code = "import azrecipe, sys; names = set(sys.modules); print(sorted(azrecipe.__all__), 'azrecipe.api' in names, 'numpy' in names)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "['__version__', 'check', 'load_recipe', 'plan', 'read_run', 'run', 'submit'] False False\n"
    assert set(azrecipe.__all__) <= set(dir(azrecipe))
    with pytest.raises(AttributeError, match="no attribute 'checks'"):
        azrecipe.checks  # type: ignore[attr-defined] # noqa: B018


@pytest.mark.long
def test_torch_stays_out_of_the_notebook(project: Project) -> None:
    code = (
        "import azrecipe, sys\nazrecipe.check('base.yaml')\nazrecipe.plan('base.yaml', 'l4', with_alternatives=False)\n"
        "print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=project.folder, env=environment)
    assert done.stdout == "False\n"


def test_a_recipe_is_loaded_as_the_command_line_shows_it(project: Project) -> None:
    recipe = azrecipe.load_recipe("base.yaml", overrides={"phases[0].learning_rate": 1e-5, "description": "a: b"})
    assert recipe.config.phases[0].learning_rate == 1e-5
    shown = command(
        project.folder, "show", "base.yaml", "--json", "--set", "phases[0].learning_rate=0.00001", "--set", "description='a: b'"
    )
    assert recipe.data == json.loads(shown.out)
    step = azrecipe.load_recipe("pipeline.yaml", step="cpt.yaml", overrides=["cpt.yaml:data.max_length=16"])
    assert (step.stage, step.config.data.max_length) == ("pretrain", 16)


def test_every_problem_of_a_recipe_has_its_place(project: Project) -> None:
    write(project.folder / "wrong.yaml", "stage: pretrain\nproject: small\nmodle: {}\n")
    for function in (azrecipe.load_recipe, azrecipe.check, azrecipe.run):
        with pytest.raises(RecipeError) as caught:
            function("wrong.yaml")
        assert "wrong.yaml:3:1: " in str(caught.value)
        assert "modle" in str(caught.value)
    with pytest.raises(RecipeError, match="learning"):
        azrecipe.check("base.yaml", overrides={"training.learning": 1})
    with pytest.raises(CommandError, match="not one text"):
        azrecipe.check("base.yaml", overrides="data.max_length=16")
    with pytest.raises(CommandError, match="there is no step 'x'"):
        azrecipe.load_recipe("pipeline.yaml", step="x")


def test_a_check_has_what_the_command_line_prints(project: Project) -> None:
    report = azrecipe.check("base.yaml")
    (check,) = report.recipes
    assert report.is_complete
    assert isinstance(check.preview, PretrainPreview)
    (phase,) = check.preview.phases
    printed = command(project.folder, "check", "base.yaml").out
    assert f"phase english trains {phase.trainable:,} of {phase.total:,} parameters (all {phase.by_pattern['all']:,})" in printed
    (source,) = check.preview.sources
    assert f"{source.path} begins: {'·'.join(source.first_tokens)}" in printed


@pytest.mark.long
def test_a_check_of_a_pipeline_says_what_waits_for_a_run(project: Project) -> None:
    report = azrecipe.check("pipeline.yaml", runs_dir="no runs")
    assert not report.is_complete
    assert {check.path.name: check.missing_runs for check in report.recipes} == {
        "base.yaml": (),
        "tokenizer.yaml": ("base.yaml",),
        "cpt.yaml": ("base.yaml", "tokenizer.yaml"),
        "sft.yaml": ("cpt.yaml",),
        "evaluate.yaml": ("base.yaml", "cpt.yaml", "sft.yaml"),
    }


@pytest.mark.long
def test_a_check_of_sft_shows_the_first_example(project: Project, llama: Path) -> None:
    report = azrecipe.check("sft.yaml", overrides={"model": {"name_or_path": str(llama), "output_of": None}})
    preview = report.recipes[0].preview
    assert isinstance(preview, SftPreview)
    assert preview.counts["train"] > preview.counts["held_out"] > 0
    (example,) = preview.examples
    trained = "".join(token for span in example.spans if span.trained for token in span.tokens)
    assert trained.endswith(preview.eos_token)
    assert preview.steps == 12


@pytest.mark.long
def test_a_plan_is_the_answer_of_the_command_line(project: Project) -> None:
    report = azrecipe.plan("base.yaml", "l4")
    printed = command(project.folder, "plan", "base.yaml", "--hardware", "l4", "--json")
    assert printed.code == 0, printed.text
    assert report.fits
    assert json.loads(json.dumps(report.recipes[0].estimates[0])) == json.loads(printed.out)
    estimate = report.estimates[0][0]
    assert estimate["levers"]["changes"]
    assert estimate["loops"][0]["steps"] == 20


def test_a_plan_compares_machines_and_names_what_does_not_fit(project: Project) -> None:
    write(project.folder / "mine.yaml", TINY_CARD)
    report = azrecipe.plan("base.yaml", ["tiny", "l4"], hardware_file="mine.yaml")
    assert [estimate["card"]["name"] for estimate in report.recipes[0].estimates] == ["tiny", "l4"]
    assert report.fits  # on one of them
    alone = azrecipe.plan("base.yaml", "tiny", hardware_file="mine.yaml", with_alternatives=False)
    assert not alone.fits
    assert "base.yaml: english fits at no batch" in alone.problems[0]
    assert alone.estimates[0][0]["loops"][0]["verdict"] == "does not fit"
    with pytest.raises(CommandError, match=r"did you mean p5\.48xlarge"):
        azrecipe.plan("base.yaml", "p5.48xlarg")


@pytest.mark.slow
def test_a_run_gives_what_it_wrote(project: Project, base: Any) -> None:
    assert base.state == "complete"
    assert base.path == Path("runs/small/base")
    assert base.result == project.result("base")
    assert [line["step"] for line in base.metrics if "loss" in line] == list(range(1, BASE_STEPS + 1))
    again = azrecipe.read_run(project.path("base"))
    assert again.result == base.result
    assert again.stage == "pretrain"


@pytest.mark.slow
def test_a_run_is_that_of_the_command_line(project: Project, base: Any) -> None:
    project.run("base", "--set", f"phases[0].max_steps={BASE_STEPS}", runs="by the command line")
    assert project.losses("base", "by the command line") == project.losses("base")
    assert project.result("base", "by the command line")["bpb"] == base.result["bpb"]


@pytest.mark.slow
def test_a_run_that_is_complete_returns_at_once(project: Project, base: Any, capfd: pytest.CaptureFixture[str]) -> None:
    again = azrecipe.run("base.yaml", overrides={"phases[0].max_steps": BASE_STEPS})
    assert again.status["run_id"] == base.status["run_id"]
    printed = capfd.readouterr()
    assert "already complete" in printed.err
    assert printed.out == ""


@pytest.mark.long
@pytest.mark.slow
def test_a_pipeline_is_run_and_its_steps_read(project: Project, base: Any) -> None:
    write(project.folder / "two.yaml", "stage: pipeline\nproject: small\nsteps: [base.yaml, tokenizer.yaml]\n")
    record = azrecipe.run("two.yaml", overrides={"base.yaml:phases[0].max_steps": BASE_STEPS})
    assert [(step.key, step.run.state) for step in record.steps] == [("base.yaml", "complete"), ("tokenizer.yaml", "complete")]
    assert "candidates" in record.steps[1].run.result


@pytest.mark.long
def test_a_run_that_is_refused_raises_the_class_of_its_exit_code(project: Project) -> None:
    with pytest.raises(CommandError, match="there is no accelerate config 'fsdq'"):
        azrecipe.run("base.yaml", accelerate_config="fsdq", num_processes=2)
    with pytest.raises(CannotRun, match="wandb is not installed"):
        azrecipe.run("base.yaml", runs_dir="refused", overrides={"training.report_to": ["wandb"]})
    assert not (project.folder / "refused").exists()


@pytest.fixture(scope="module")
def broken(project: Project, base: Any) -> str:
    """A recipe whose model divides by the norm of embeddings that are zero."""
    folder = project.folder / "broken"
    shutil.copytree(base.path / "final", folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] = np.zeros_like(weights["model.embed_tokens.weight"])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.0}))
    write(project.folder / "broken.yaml", BROKEN)
    return "broken.yaml"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_run_that_fails_raises_its_message(broken: str, num_processes: int) -> None:
    with pytest.raises(RunFailed, match="the loss is nan at step") as caught:
        azrecipe.run(broken, runs_dir=f"failed in {num_processes}", num_processes=num_processes)
    record = azrecipe.read_run(f"failed in {num_processes}/small/broken")
    assert record.state == "failed"
    assert str(caught.value) == record.status["message"]


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no run"):
        azrecipe.read_run(tmp_path)


def test_a_submission_needs_settings(project: Project) -> None:
    with pytest.raises(CommandError, match=r"no such|there is no"):
        azrecipe.submit("base.yaml", "no settings.yaml")
    with pytest.raises(CommandError, match="overrides"):
        azrecipe.submit("base.yaml", "sagemaker/cpt.yaml", set=["a=b"])


def test_an_argument_of_a_wrong_type_is_named(project: Project) -> None:
    for call, message in (
        (lambda: azrecipe.check(5), r"recipe: a path \(str or Path\), not int \(5\)"),
        (lambda: azrecipe.check("base.yaml", runs_dir=None), "runs_dir: a path"),
        (lambda: azrecipe.check("base.yaml", step=3), "step: text or None, not int"),
        (lambda: azrecipe.check("base.yaml", overrides=5), "overrides: a mapping or a list of texts, not int"),
        (lambda: azrecipe.check("base.yaml", overrides=[5]), "overrides: each element is a text, not int"),
        (lambda: azrecipe.check("base.yaml", overrides={5: 1}), "overrides: each key is a text, not int"),
        (lambda: azrecipe.check("base.yaml", overrides={"seed": object()}), "overrides: seed: a value is text"),
        (lambda: azrecipe.run("base.yaml", num_processes="2"), "num_processes: a whole number or None, not str"),
        (lambda: azrecipe.run("base.yaml", num_processes=True), "num_processes: a whole number or None, not bool"),
        (lambda: azrecipe.plan("base.yaml", 8), "hardware: a name or a list of names, not int"),
        (lambda: azrecipe.plan("base.yaml", "h100-80g", nodes=1.5), "nodes: a whole number, not float"),
        (lambda: azrecipe.read_run(None), "path: a path"),
    ):
        with pytest.raises(CommandError, match=message):
            call()  # type: ignore[no-untyped-call]
    with pytest.raises(CommandError, match=r"recipe: a path(.|\n)*cell: text or None"):
        azrecipe.load_recipe(5, cell=6)  # type: ignore[arg-type]


def test_errors_name_arguments_and_no_options(project: Project) -> None:
    with pytest.raises(CommandError) as caught:
        azrecipe.load_recipe("base.yaml", step="sft.yaml")
    assert "step=… names a step of a pipeline" in str(caught.value)
    with pytest.raises(RecipeError) as wrong:
        azrecipe.load_recipe("base.yaml", overrides={"sead": 1})
    assert str(wrong.value).startswith("overrides: sead=1: unknown key 'sead'; did you mean 'seed'?")
    assert "--" not in f"{caught.value}{wrong.value}"
