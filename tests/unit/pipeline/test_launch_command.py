"""What is known before a process is launched, and whose exit code a launch has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.errors import CannotRun, CommandError, RecipeError
from azrecipe.pipeline import preflight
from azrecipe.pipeline.launch_command import _choose_exit_code, resolve_accelerate_config
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline
from azrecipe.utils.atomic_files import atomic_folder
from tests.conftest import ROOT, Done, write

QUICK = ROOT / "recipes" / "quickstart"


@pytest.mark.parametrize(
    ("launcher", "left", "code"),
    [
        (0, {}, 0),
        (0, {0: 0, 1: 0}, 0),
        (1, {0: 2, 1: 2}, 2),
        (1, {0: 1, 1: 3}, 3),  # process 1 was out of memory; the main one only saw it go
        (1, {1: 3}, 3),
        (1, {0: 143, 1: 143}, 143),
        (1, {0: 1, 1: 1}, 1),
        (137, {}, 137),
        (-9, {}, 1),
    ],
)
def test_the_exit_code_is_that_of_the_process_that_knows_why(launcher: int, left: dict[int, int], code: int) -> None:
    assert _choose_exit_code(launcher, left) == code


def test_every_step_of_the_shipped_pipelines_divides_over_the_machines_they_are_for() -> None:
    for file in (ROOT / "recipes" / "pipeline.yaml", ROOT / "recipes" / "llama31_8b" / "pipeline.yaml"):
        for world in (1, 2, 4, 8, 16):
            for step in load_pipeline(file)[1]:
                wrong = [
                    e
                    for e in preflight._iter_recipe_problems(step.recipe, preflight.read_launch_config(None, world))
                    if isinstance(e, RecipeError)
                ]
                assert wrong == [], step.key


def test_a_pipeline_is_refused_for_its_last_step_before_its_first_one_runs(project: Path, cli: Callable[..., Done]) -> None:
    done = cli(
        "run",
        QUICK / "pipeline.yaml",
        "--set",
        "sft.yaml:data.datasets=[{path: ./mine.jsonl}]",
        "--set",
        "sft.yaml:training.global_batch_size=3",
        "--num-processes",
        2,
    )
    assert done.code == 2
    assert "no such file: ./mine.jsonl" in done.err
    assert "training.global_batch_size = 3 does not divide over 2 processes" in done.err
    assert not (project / "runs").exists()


def test_a_config_for_several_machines_is_refused_with_the_command_that_works(tmp_path: Path) -> None:
    text = resolve_accelerate_config("hsdp").read_text(encoding="utf-8").replace("num_machines: 1", "num_machines: 2")
    launch = preflight.read_launch_config(write(tmp_path / "two.yaml", text), 16)
    assert launch.num_machines == 2
    with pytest.raises(CommandError, match="--machine_rank"):
        preflight.check_launch([], launch)


def test_deepspeed_is_named_where_it_is_missing() -> None:
    import importlib.util

    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed here")
    with pytest.raises(CannotRun, match=r"azrecipe\[deepspeed\]"):
        preflight.check_launch([load_recipe(QUICK / "pretrain.yaml")], preflight.read_launch_config(resolve_accelerate_config("zero3"), 2))


def test_what_fails_in_the_first_step_of_a_split_model_is_refused_before_it() -> None:
    launch = preflight.read_launch_config(resolve_accelerate_config("fsdp"), 2)
    adafactor = load_recipe(QUICK / "pretrain.yaml", parse_overrides(["training.optim=adafactor", "training.adam_beta2=null"]))
    with pytest.raises(CannotRun, match="optim: adafactor does not work on a model that FSDP splits"):
        preflight.check_launch([adafactor], launch)
    mixed = ["training.precision=bf16_mixed", "training.global_batch_size=16", "training.per_device_train_batch_size=2"]
    tuned = load_recipe(QUICK / "sft.yaml", parse_overrides(mixed))
    with pytest.raises(
        CannotRun, match=r"cannot accumulate 4 batches where FSDP splits the model: as many processes as make it one batch \(8\)"
    ):
        preflight.check_launch([tuned], launch)
    preflight.check_launch([tuned], preflight.read_launch_config(resolve_accelerate_config("fsdp"), 8))
    preflight.check_launch([adafactor, tuned], preflight.read_launch_config(resolve_accelerate_config("ddp"), 2))


def test_a_folder_made_twice_is_whole_and_the_first_or_the_last_as_asked(tmp_path: Path) -> None:
    def fill(text: str, replace: bool) -> None:
        with atomic_folder(tmp_path / "made", replace=replace) as aside:
            write(aside / "a", text)

    fill("one", True)
    fill("two", False)
    assert (tmp_path / "made" / "a").read_text() == "one"
    fill("three", True)
    assert (tmp_path / "made" / "a").read_text() == "three"
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "made") as aside:
        write(aside / "a", "four")
        raise RuntimeError
    assert (tmp_path / "made" / "a").read_text() == "three"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
