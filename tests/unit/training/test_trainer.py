"""The one training loop: its arguments, its optimizer, and going on from where it was."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments

from azrecipe.distributed.backend import Backend
from azrecipe.errors import CannotRun, CommandError, Interrupted, RunFailed
from azrecipe.modeling.dtypes import PARAM_DTYPES
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.types import PretrainConfig, Training
from azrecipe.training import checkpoints, trainer
from azrecipe.training.trainer import LoopConfig, LoopResult
from tests.conftest import write
from tests.unit.training.small_trainer import SINGLE, UNITS, AtStep, SmallTrainer, assert_equal, build_model, build_rows, copy_weights
from tests.unit.training.test_checkpoints import write_checkpoint

RECIPE = """
stage: pretrain
project: p
model: {name_or_path: ./llama}
data: {max_length: 32, datasets: [{path: text.jsonl}], validation: {target: {path: heldout.txt}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 3e-2, max_steps: 6}]
training: {global_batch_size: 2, per_device_train_batch_size: 2, precision: float32, logging_steps: 1, save_steps: 2, warmup_ratio: 0}
"""


@pytest.fixture
def training(project: Path) -> Training:
    """The `training` of a recipe, every default filled in."""
    config = load_recipe(write(project / "r.yaml", RECIPE)).config
    assert isinstance(config, PretrainConfig)
    return config.training


def configure(folder: Path, **changes: Any) -> LoopConfig:
    values = {"name": "phase", "run_path": folder, "checkpoint_dir": folder / "checkpoints" / "phase", "max_steps": 6,
              "learning_rate": 3e-2, "seed": 1}  # fmt: skip
    return LoopConfig(**{**values, **changes})


def run_loop(folder: Path, training: Training, *, at_step: AtStep | None = None, dtype: torch.dtype = torch.float32) -> LoopResult:
    """Run or resume a loop of six steps as pretraining does, with checkpoints in the background."""
    from azrecipe.training.async_checkpoint import AsyncCheckpointWriter

    folder.mkdir(exist_ok=True)
    loop = configure(folder)

    def build(callbacks: list[Any]) -> SmallTrainer:
        arguments = trainer.build_training_arguments(training, loop, SINGLE)
        args = trainer.create_training_arguments(TrainingArguments, **arguments, train_sampling_strategy="sequential")
        extra = [at_step] if at_step is not None else []
        model = build_model().to(dtype)
        small = SmallTrainer(model, args, train_dataset=build_rows(12), callbacks=[*callbacks, *extra])
        small.checkpoint_writer = AsyncCheckpointWriter(SINGLE)
        return small

    return trainer.train_loop(build, loop, UNITS, SINGLE, training)


def read_lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_arguments_split_the_global_batch(tmp_path: Path, training: Training) -> None:
    training = replace(training, global_batch_size=24, per_device_train_batch_size=4, warmup_ratio=0.25)
    values = trainer.build_training_arguments(training, configure(tmp_path, max_steps=40), Backend("ddp", 3, 0))
    assert (values["per_device_train_batch_size"], values["gradient_accumulation_steps"]) == (4, 2)
    assert (values["warmup_steps"], values["max_steps"], values["seed"], values["data_seed"]) == (10, 40, 1, 1)
    assert values["save_total_limit"] is None and values["logging_nan_inf_filter"] is False
    assert values["bf16"] is False and values["report_to"] == "none"
    cut = trainer.build_training_arguments(training, configure(tmp_path), Backend("fsdp2", 6, 0, context_parallel_size=2))
    assert (cut["per_device_train_batch_size"], cut["gradient_accumulation_steps"]) == (4, 2)  # three groups read sequences
    with pytest.raises(CommandError, match="does not divide over 5 processes"):
        trainer.build_training_arguments(training, configure(tmp_path), Backend("ddp", 5, 0))


def test_arguments_of_the_recipe_come_last(tmp_path: Path, training: Training) -> None:
    training = replace(training, trainer_arguments={"optim_args": "x=1", "logging_steps": 7}, eval_steps=5)
    values = trainer.build_training_arguments(training, configure(tmp_path), SINGLE)
    assert (values["optim_args"], values["logging_steps"], values["eval_strategy"]) == ("x=1", 7, "steps")


@pytest.mark.parametrize(
    ("setting", "backend", "gibibytes", "sync"),
    [
        ("auto", Backend("fsdp2", 8, 0), 8, True),
        ("auto", Backend("fsdp2", 8, 0), 7, False),
        ("auto", Backend("ddp", 8, 0, 8), 30, False),  # every process holds all gradients anyway
        ("auto", Backend("fsdp2", 1, 0), 30, False),
        (False, Backend("fsdp2", 8, 0), 30, False),
        (True, Backend("fsdp2", 8, 0), 1, True),
    ],
)
def test_accelerate_gets_whether_each_batch_is_summed(
    tmp_path: Path, training: Training, setting: bool | str, backend: Backend, gibibytes: int, sync: bool
) -> None:
    """Trainer passes over Accelerate's no_sync where its gradient_state says so."""
    training, loop = replace(training, sync_each_batch=setting, global_batch_size=16), configure(tmp_path, gradient_bytes=gibibytes * 2**30)
    values = trainer.build_training_arguments(training, loop, backend)
    small = SmallTrainer(build_model(), TrainingArguments(**values, use_cpu=True), train_dataset=build_rows(2))
    assert small.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False) is sync
    assert small.accelerator.ddp_handler.gradient_as_bucket_view  # DDP's gradients have no copies


@pytest.mark.parametrize(
    ("settings", "scheduler", "arguments"),
    [
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.0}, "cosine", None),
        ({"lr_scheduler_type": "cosine", "min_lr_ratio": 0.1}, "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        (
            {"lr_scheduler_type": "warmup_stable_decay", "decay_ratio": 0.5, "min_lr_ratio": 0.0},
            "warmup_stable_decay",
            {"num_decay_steps": 20, "decay_type": "1-sqrt", "min_lr_ratio": 0.0},
        ),
    ],
)
def test_a_schedule_is_transformers_own(tmp_path: Path, training: Training, settings: Any, scheduler: str, arguments: Any) -> None:
    values = trainer.build_training_arguments(replace(training, **settings), configure(tmp_path, max_steps=40), SINGLE)
    assert (values["lr_scheduler_type"], values["lr_scheduler_kwargs"]) == (scheduler, arguments)


def test_tensorboard_gets_a_folder_a_phase_and_a_users_own_stays(
    tmp_path: Path, training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    shown = replace(training, report_to=["tensorboard"])
    for name in ("one", "two"):
        trainer.build_training_arguments(shown, configure(tmp_path, name=name), SINGLE)
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "tensorboard" / name)
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "/elsewhere")
    trainer.build_training_arguments(shown, configure(tmp_path), SINGLE)
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "/elsewhere"


def test_arguments_that_transformers_refuses_are_a_users_error(tmp_path: Path) -> None:
    for arguments in ({"optim": "adamz"}, {"hub_strategy": "sdg"}, {"no_such_argument": 1}):
        with pytest.raises(CommandError, match="training: transformers refuses these arguments"):
            trainer.create_training_arguments(TrainingArguments, output_dir=str(tmp_path), **arguments)


def test_what_cannot_run_is_refused_before_anything_is_read(training: Training) -> None:
    trainer.check_training(training, SINGLE)
    with pytest.raises(CommandError, match="does not divide over 2 processes"):
        trainer.check_training(replace(training, global_batch_size=3), Backend("ddp", 2, 0))
    with pytest.raises(CannotRun, match="torch_compile: true is not verified with DeepSpeed"):
        trainer.check_training(replace(training, torch_compile=True), Backend("zero2", 2, 0))


def test_a_loop_runs_and_says_what_it_did(tmp_path: Path, training: Training) -> None:
    result = run_loop(tmp_path / "run", training)
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert result.summary["steps"] == 6 and result.summary["resumed_from"] is None
    assert result.summary["last_loss"] == lines[-1]["loss"] < lines[0]["loss"]
    events = read_lines(tmp_path / "run" / "history.jsonl")
    assert [(event["event"], event["phase"], event["step"]) for event in events] == [("training", "phase", 0)]
    assert trainer.gather_state_dict(result.trainer, SINGLE) is None
    assert trainer.get_evaluation_model(result.trainer, SINGLE) is trainer.unwrap_model(result.trainer) is result.trainer.model


@pytest.mark.parametrize("damage", ["none", "newest torn"])
def test_an_interrupted_loop_ends_in_the_weights_of_a_whole_one(tmp_path: Path, training: Training, damage: str) -> None:
    whole = run_loop(tmp_path / "whole", training)
    folder, checkpoint_dir = tmp_path / "parts", tmp_path / "parts" / "checkpoints" / "phase"
    with pytest.raises(Interrupted):
        run_loop(folder, training, at_step=AtStep(5, lambda: os.kill(os.getpid(), signal.SIGTERM), begin=True))
    assert checkpoints.find_last_complete(checkpoint_dir) == checkpoint_dir / "checkpoint-5"
    if damage == "newest torn":
        (checkpoint_dir / "checkpoint-5" / "optimizer.pt").write_bytes(b"torn")
    resumed = run_loop(folder, training)
    assert resumed.summary["resumed_from"] == (5 if damage == "none" else 4)
    assert_equal(copy_weights(resumed.trainer.model), copy_weights(whole.trainer.model))
    lines, expected = (read_lines(tmp_path / name / "metrics.jsonl") for name in ("parts", "whole"))
    assert [(line["step"], line["loss"]) for line in lines] == [(line["step"], line["loss"]) for line in expected]
    assert not (checkpoint_dir / "checkpoint-5").exists() or checkpoints.is_complete(checkpoint_dir / "checkpoint-5")


def test_a_checkpoint_of_another_backend_is_refused_and_kept(tmp_path: Path, training: Training) -> None:
    folder = tmp_path / "checkpoints" / "phase"
    checkpoints.finalize(write_checkpoint(folder, 2, marked=False), Backend("zero2", 2, 0))
    with pytest.raises(CommandError, match="was written by zero2 with 2 processes, and single with 1 cannot go on from it"):
        run_loop(tmp_path, training)
    assert checkpoints.is_complete(folder / "checkpoint-2")


def test_weights_in_another_format_stop_the_loop_before_a_step(tmp_path: Path, training: Training) -> None:
    with pytest.raises(RunFailed, match="trained weights are bfloat16 and precision: float32 keeps them in float32"):
        run_loop(tmp_path, training, dtype=PARAM_DTYPES["bf16_pure"])
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("trained", ["norm", "mlp"])
def test_an_optimizer_has_no_empty_group(tmp_path: Path, training: Training, trained: str) -> None:
    """Norms decay not and matrices do: either group may be empty, and the other still trains."""
    model = build_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    arguments = trainer.build_training_arguments(replace(training, weight_decay=0.1), configure(tmp_path), SINGLE)
    args = TrainingArguments(**{**arguments, "use_cpu": True, "save_strategy": "no"})
    before = copy_weights(model)
    small = SmallTrainer(model, args, train_dataset=build_rows(12))
    small.train()
    (group,) = small.optimizer.param_groups
    assert group["weight_decay"] == (0.0 if trained == "norm" else 0.1)
    changed = {name for name, weight in copy_weights(model).items() if not torch.equal(weight, before[name])}
    assert changed == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
