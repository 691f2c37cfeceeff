"""Build transformers' training arguments, and run one resumable training loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import DistributedDataParallelKwargs
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from azrecipe.distributed import gradient_sync, local_storage
from azrecipe.distributed.backend import Backend
from azrecipe.distributed.batch_size import split_batch
from azrecipe.distributed.requirements import check_compiler, check_device_count, check_precision
from azrecipe.errors import CannotRun, CommandError, RunFailed
from azrecipe.modeling import compilation, liger_kernels
from azrecipe.recipe.extras import check_trackers
from azrecipe.recipe.types import Profile, Training
from azrecipe.runs import event_log
from azrecipe.training import checkpoints, optimizers, precision
from azrecipe.training.garbage_collection import GarbageCollection
from azrecipe.training.monitor import LoopUnits, TrainingMonitor, trim_lines
from azrecipe.training.profiling import Profiler
from azrecipe.utils import environment_variables
from azrecipe.utils.console import print_progress


@dataclass(frozen=True)
class LoopConfig:
    """The settings of one training loop.

    `checkpoint_dir` is where its checkpoints are written, `learning_rate` the peak, `gradient_bytes` the size of all gradients.
    """

    name: str
    run_path: Path
    checkpoint_dir: Path
    max_steps: int
    learning_rate: float
    seed: int
    gradient_bytes: int = 0
    profile: Profile | None = None


class LoopResult(NamedTuple):
    """A trainer after its loop, and a summary for the result."""

    trainer: Trainer
    summary: dict[str, Any]


def check_training(training: Training, backend: Backend) -> None:
    """Check what this machine can do, before anything is read.

    Raises CannotRun, or CommandError for a batch that does not divide.
    """
    warning = check_precision(training.precision, training.use_liger_kernel)
    print_progress(warning, backend.main and bool(warning))
    check_compiler(training.torch_compile)
    if training.torch_compile and backend.uses_deepspeed:
        raise CannotRun(
            "torch_compile: true is not verified with DeepSpeed: --accelerate-config fsdp, or --set training.torch_compile=false"
        )
    check_trackers(training.report_to)
    check_device_count(backend)
    split_batch(training.global_batch_size, training.per_device_train_batch_size, backend.data_parallel_size)


def build_training_arguments(training: Training, loop: LoopConfig, backend: Backend) -> dict[str, Any]:
    """Build the arguments of transformers.TrainingArguments.

    trl.SFTConfig and DPOConfig extend these. The global batch is split over the processes. The weights' dtype and autocast apply
    `precision`, never the launcher. This also sets TENSORBOARD_LOGGING_DIR.

    Args:
        training: The recipe's `training`.
        loop: The loop.
        backend: How processes share the run.

    Raises:
        CommandError: The batch does not divide.
    """
    batch = split_batch(training.global_batch_size, training.per_device_train_batch_size, backend.data_parallel_size)
    sync_each_batch = gradient_sync.syncs_each_batch(training.sync_each_batch, backend.num_shards, loop.gradient_bytes)
    if training.report_to:
        folder = Path(environment_variables.TENSORBOARD.read() or loop.run_path / "tensorboard")
        if os.environ.get("TENSORBOARD_LOGGING_DIR", str(folder)).startswith(str(folder)):  # a user's own setting stays
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / loop.name)  # each phase counts its steps from 0
    return {
        "output_dir": str(loop.checkpoint_dir),
        "max_steps": loop.max_steps,
        "learning_rate": loop.learning_rate,
        "per_device_train_batch_size": batch.per_device,
        "gradient_accumulation_steps": batch.accumulation,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        **optimizers.build_optimizer_arguments(training, loop.max_steps),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "max_grad_norm": training.max_grad_norm,
        **precision.configure_autocast(training.precision, backend),
        "use_liger_kernel": training.use_liger_kernel,
        "liger_kernel_config": liger_kernels.choose_kernels(training),
        "activation_checkpointing": training.checkpoint_every > 0,
        "activation_checkpointing_kwargs": {"every_n_layers": training.checkpoint_every} if training.checkpoint_every > 1 else None,
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would hide a NaN behind an average
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "save_total_limit": None,  # we delete only when the new one is complete
        "eval_strategy": "steps" if training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "report_to": training.report_to or "none",
        "seed": loop.seed,
        "data_seed": loop.seed,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        "accelerator_config": {
            "gradient_accumulation_kwargs": {"sync_each_batch": sync_each_batch},
            "non_blocking": torch.cuda.is_available(),  # from pinned memory: the host does not wait for a batch's copy
        },
        **training.trainer_arguments,
    }


def create_training_arguments(arguments_class: Callable[..., TrainingArguments], **values: Any) -> TrainingArguments:
    """Create the arguments object.

    Raises CommandError where it refuses a value, such as an unknown optimizer.
    """
    try:
        return arguments_class(**values)
    except (ValueError, TypeError) as error:
        raise CommandError(f"training: transformers refuses these arguments: {error}") from None


class BucketViewMixin(Trainer):  # type: ignore[misc]
    """A mixin for Trainer whose gradients are DDP's buckets, not copies of them.

    transformers has no argument for it. One process and sharded backends have no buckets.
    """

    def _build_accelerator_args(self, **values: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = super()._build_accelerator_args(**values)
        for handler in arguments["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True
        return arguments


class IntegerTokenCountMixin(Trainer):  # type: ignore[misc]
    """A mixin for Trainer whose step counts its tokens in integers.

    transformers divides the count and so makes it float32 (trainer.py, _get_num_items_in_batch). FSDP casts a model's floating-point
    arguments to bfloat16: loss and gradients would be wrong by up to 0.2 %.
    """

    def get_batch_samples(self, *arguments: Any) -> tuple[list[Any], Any]:
        """Get a step's batches, and the number of their labels on all processes."""
        batches, count = super().get_batch_samples(*arguments)
        return batches, count.round().long() if torch.is_tensor(count) and count.is_floating_point() else count


class NonEmptyParamGroupsMixin(IntegerTokenCountMixin, BucketViewMixin):
    """A mixin for Trainer whose optimizer has no empty parameter group.

    transformers makes one group that decays and one that does not; either may be empty. FSDP's checkpoints do not return the settings of
    an empty group, and the first step after a resume then fails (torch 2.13, set_optimizer_state_dict).
    """

    def create_optimizer(self, *arguments: Any, **options: Any) -> torch.optim.Optimizer:
        """Create the optimizer and drop its empty groups."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*arguments, **options)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer


def train_loop(
    build_trainer: Callable[[list[Any]], Trainer], loop: LoopConfig, units: LoopUnits, backend: Backend, training: Training
) -> LoopResult:
    """Run one loop, from its last complete checkpoint if there is one.

    Args:
        build_trainer: Builds the Trainer with the callbacks that it gets.
        loop: The loop.
        units: The units of the log.
        backend: How processes share the run.
        training: The recipe's `training`.

    Returns:
        The trainer and a summary for the result.

    Raises:
        Interrupted: A signal came; a checkpoint is saved.
        CommandError: This backend cannot read the checkpoint.
        CannotRun: No machine has all files of the checkpoint.
    """
    checkpoints.check_readable(loop.checkpoint_dir, backend)
    resume, warning = checkpoints.find_latest_common(loop.checkpoint_dir)
    print_progress(f"{loop.name}: {warning}", backend.main and bool(warning))
    if local_storage.is_writer(backend.main):
        loop.checkpoint_dir.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_incomplete(loop.checkpoint_dir)
        if local_storage.storage_is_local():
            checkpoints.remove_after(loop.checkpoint_dir, checkpoints.get_step(resume) if resume else 0)
    if resume is not None:
        print_progress(f"{loop.name}: going on from {resume}", backend.main)
    if backend.main:
        for name in ("metrics.jsonl", "bad_batches.jsonl"):
            trim_lines(loop.run_path / name, loop.name, checkpoints.get_step(resume) if resume else 0)
        event_log.log_event(loop.run_path, "training", phase=loop.name, step=checkpoints.get_step(resume) if resume else 0)
    monitor = TrainingMonitor(backend, loop.run_path, units, training.save_total_limit)
    precision_check = _PrecisionCheck(backend, training.precision)
    garbage_collection = GarbageCollection()
    trainer = build_trainer([monitor, precision_check, garbage_collection])
    monitor.trainer = precision_check.trainer = trainer
    precision.apply_precision(trainer, training.precision, backend)
    if training.torch_compile:
        compilation.compile_blocks(trainer.model)
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    for tracker in get_reporting_integration_callbacks(trainer.args.report_to):
        if (callback := trainer.pop_callback(tracker)) is not None:
            trainer.add_callback(callback)  # after ours, which adds to the log
    if loop.profile is not None and backend.main:
        trainer.add_callback(Profiler(loop.profile, loop.run_path / "profile", loop.name))
    started = time.monotonic()
    with monitor, garbage_collection:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    checkpoints.mirror_deletions(loop.checkpoint_dir, backend.main)
    if backend.uses_deepspeed:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # or the next phase's from_pretrained would load a partitioned model
    monitor.raise_if_interrupted()
    return LoopResult(
        trainer,
        {
            "steps": trainer.state.global_step,
            "last_loss": monitor.losses[-1] if monitor.losses else None,
            "seconds": round(time.monotonic() - started, 1),
            "resumed_from": checkpoints.get_step(resume) if resume else None,
        },
    )


class _PrecisionCheck(TrainerCallback):  # type: ignore[misc]
    """Stops a training whose weights have the wrong number format."""

    def __init__(self, backend: Backend, expected: str) -> None:
        self.backend, self.expected = backend, expected
        self.trainer: Trainer | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        problems = precision.find_precision_problems(self.trainer, self.expected, self.backend)
        if problems:
            raise RunFailed("; ".join(problems))


def gather_state_dict(trainer: Trainer, backend: Backend) -> Mapping[str, torch.Tensor] | None:
    """Gather the full weights of a sharded model on the main process.

    Every process must call this. A tied matrix is in it once.

    Returns:
        The weights by name. Empty on other processes, None where the model is not sharded.

    Raises:
        RunFailed: A weight is missing or incomplete.
    """
    if not backend.sharded:
        return None
    model = unwrap_model(trainer)
    gathered = trainer.accelerator.get_state_dict(get_sharded_model(trainer))
    if not backend.main:
        return {}
    tied_names = getattr(model, "all_tied_weights_keys", None) or {}
    state = {name: value for name, value in gathered.items() if tied_names.get(name) not in gathered}
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in model.named_parameters()}
    incomplete = [name for name, size in sizes.items() if name not in state or state[name].numel() != size]
    if incomplete:
        raise RunFailed(
            f"{backend.strategy} returned {', '.join(incomplete[:5])} incompletely or not at all: the model is not saved, the checkpoint is kept"
        )
    return state


def get_sharded_model(trainer: Trainer) -> Any:
    """Get the model as the backend shards it."""
    return trainer.model_wrapped


def get_evaluation_model(trainer: Trainer, backend: Backend) -> Any:
    """Get the model to evaluate.

    It is below DDP's wrapper, whose forward expects a backward. A sharded model stays wrapped.
    """
    return get_sharded_model(trainer) if backend.sharded else unwrap_model(trainer)


def unwrap_model(trainer: Trainer) -> PreTrainedModel:
    """Get the model below the backend's wrapper."""
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model)
    return model
