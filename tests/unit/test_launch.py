"""What is known before a process is launched, and whose exit code a launch has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.errors import CannotRun, CommandError, RecipeError
from azrecipe.pipeline import preflight
from azrecipe.pipeline.launch_command import _verdict, config_file
from azrecipe.recipe.load import load
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline
from azrecipe.utils.atomic_files import whole_folder
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
    assert _verdict(launcher, left) == code


def test_every_step_of_the_shipped_pipelines_divides_over_the_machines_they_are_for() -> None:
    for file in (ROOT / "recipes" / "pipeline.yaml", ROOT / "recipes" / "llama31_8b" / "pipeline.yaml"):
        for world in (1, 2, 4, 8, 16):
            for step in load_pipeline(file)[1]:
                wrong = [e for e in preflight._refusals(step.recipe, preflight.read(None, world)) if isinstance(e, RecipeError)]
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
    text = config_file("hsdp").read_text(encoding="utf-8").replace("num_machines: 1", "num_machines: 2")
    launch = preflight.read(write(tmp_path / "two.yaml", text), 16)
    assert launch.machines == 2
    with pytest.raises(CommandError, match="--machine_rank"):
        preflight.check([], launch)


def test_deepspeed_is_named_where_it_is_missing() -> None:
    import importlib.util

    if importlib.util.find_spec("deepspeed") is not None:
        pytest.skip("deepspeed is installed here")
    with pytest.raises(CannotRun, match=r"azrecipe\[deepspeed\]"):
        preflight.check([load(QUICK / "pretrain.yaml")], preflight.read(config_file("zero3"), 2))


def test_what_fails_in_the_first_step_of_a_split_model_is_refused_before_it() -> None:
    launch = preflight.read(config_file("fsdp"), 2)
    adafactor = load(QUICK / "pretrain.yaml", parse_overrides(["training.optim=adafactor", "training.adam_beta2=null"]))
    with pytest.raises(CannotRun, match="optim: adafactor does not work on a model that FSDP splits"):
        preflight.check([adafactor], launch)
    mixed = ["training.precision=bf16_mixed", "training.global_batch_size=16", "training.per_device_train_batch_size=2"]
    tuned = load(QUICK / "sft.yaml", parse_overrides(mixed))
    with pytest.raises(
        CannotRun, match=r"cannot accumulate 4 batches where FSDP splits the model: as many processes as make it one batch \(8\)"
    ):
        preflight.check([tuned], launch)
    preflight.check([tuned], preflight.read(config_file("fsdp"), 8))
    preflight.check([adafactor, tuned], preflight.read(config_file("ddp"), 2))


def test_a_folder_made_twice_is_whole_and_the_first_or_the_last_as_asked(tmp_path: Path) -> None:
    def fill(text: str, replace: bool) -> None:
        with whole_folder(tmp_path / "made", replace=replace) as aside:
            write(aside / "a", text)

    fill("one", True)
    fill("two", False)
    assert (tmp_path / "made" / "a").read_text() == "one"
    fill("three", True)
    assert (tmp_path / "made" / "a").read_text() == "three"
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "made") as aside:
        write(aside / "a", "four")
        raise RuntimeError
    assert (tmp_path / "made" / "a").read_text() == "three"
    assert [p.name for p in tmp_path.iterdir()] == ["made"]
