"""From a recipe's `training:` to transformers' arguments, and one phase of training that resumes by itself."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from azrecipe.distributed import local_storage
from azrecipe.distributed.backend import Backend
from azrecipe.distributed.batch_size import split
from azrecipe.distributed.requirements import check_compiler, check_devices, check_precision
from azrecipe.errors import CannotRun, CommandError, RunFailed
from azrecipe.modeling import liger_kernels
from azrecipe.recipe.extras import check_trackers
from azrecipe.recipe.types import Profile, Training
from azrecipe.runs import event_log
from azrecipe.training import checkpoints, optimizers, precision
from azrecipe.training.monitor import Meter, Watch, trim_lines
from azrecipe.training.profiling import Profiler
from azrecipe.utils.console import say

TENSORBOARD = "AZRECIPE_TENSORBOARD"  # a folder in the place of <run>/tensorboard


@dataclass(frozen=True)
class Loop:
    """One training loop: its run directory, where its checkpoints go, how long it is, its peak learning rate, what is profiled."""

    name: str
    run: Path
    folder: Path
    max_steps: int
    learning_rate: float
    seed: int
    profile: Profile | None = None


def check(training: Training, backend: Backend) -> None:
    """Refuse what this machine cannot do, before anything is read. Raises CannotRun, or CommandError for the batch."""
    warning = check_precision(training.precision, training.use_liger_kernel)
    say(warning, backend.main and bool(warning))
    check_compiler(training.torch_compile)
    if training.torch_compile and backend.zero:
        raise CannotRun(
            "torch_compile: true is not verified with DeepSpeed: --accelerate-config fsdp, or --set training.torch_compile=false"
        )
    check_trackers(training.report_to)
    check_devices(backend)
    split(training.global_batch_size, training.per_device_train_batch_size, backend.readers)


def arguments(training: Training, loop: Loop, backend: Backend) -> dict[str, Any]:
    """Keyword arguments for transformers.TrainingArguments (and trl.SFTConfig, which extends it).

    The global batch is split over the processes; `precision` is applied by the weights' dtype and autocast, never by
    the launcher. Raises CommandError where the batch does not divide.
    """
    batch = split(training.global_batch_size, training.per_device_train_batch_size, backend.readers)
    if training.report_to:
        folder = Path(os.environ.get(TENSORBOARD) or loop.run / "tensorboard")
        if os.environ.get("TENSORBOARD_LOGGING_DIR", str(folder)).startswith(str(folder)):  # a user's own stays
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / loop.name)  # each phase counts its steps from 0
    return {
        "output_dir": str(loop.folder),
        "max_steps": loop.max_steps,
        "learning_rate": loop.learning_rate,
        "per_device_train_batch_size": batch.per_device,
        "gradient_accumulation_steps": batch.accumulation,
        "per_device_eval_batch_size": training.per_device_eval_batch_size,
        **optimizers.arguments(training, loop.max_steps),
        "weight_decay": training.weight_decay,
        "adam_beta1": training.adam_beta1,
        "adam_beta2": training.adam_beta2,
        "adam_epsilon": training.adam_epsilon,
        "max_grad_norm": training.max_grad_norm,
        **precision.autocast(training.precision, backend),
        "torch_compile": training.torch_compile,
        "use_liger_kernel": training.use_liger_kernel,
        "liger_kernel_config": liger_kernels.choice(training),
        "activation_checkpointing": training.activation_checkpointing,
        "logging_steps": training.logging_steps,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,  # it would replace a NaN by an average and hide it
        "save_strategy": "steps",
        "save_steps": training.save_steps,
        "save_total_limit": None,  # ours deletes only after the new one is whole
        "eval_strategy": "steps" if training.eval_steps else "no",
        "eval_steps": training.eval_steps,
        "report_to": training.report_to or "none",
        "seed": loop.seed,
        "data_seed": loop.seed,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
        "ddp_find_unused_parameters": False,
        **training.trainer_arguments,
    }


def checked(kind: Callable[..., TrainingArguments], **given: Any) -> TrainingArguments:
    """The arguments object; what it refuses (an optimizer that there is not) is told as the recipe's fault."""
    try:
        return kind(**given)
    except (ValueError, TypeError) as error:
        raise CommandError(f"training: transformers refuses these arguments: {error}") from None


class FilledGroups(Trainer):  # type: ignore[misc]
    """transformers.Trainer whose optimizer has no group without parameters.

    transformers makes one for what decays and one for what does not, either of which may be empty. FSDP's checkpoints do not give the
    settings of an empty group back, and the first step after a resume then fails (torch 2.13, set_optimizer_state_dict).
    """

    def create_optimizer(self, *arguments: Any, **more: Any) -> torch.optim.Optimizer:
        """The optimizer, as ever."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*arguments, **more)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer


def train(
    make: Callable[[list[Any]], Trainer], loop: Loop, meter: Meter, backend: Backend, training: Training
) -> tuple[Trainer, dict[str, Any]]:
    """Run one loop, from its last complete checkpoint if there is one; returns the trainer and what happened.

    `make` builds the Trainer with the callbacks given to it. Raises Interrupted after a signal, its checkpoint saved,
    CommandError for a checkpoint that this backend cannot read, and CannotRun for one that no machine has all files of.
    """
    checkpoints.check_readable(loop.folder, backend)
    resume, lacking = checkpoints.agreed(loop.folder)
    say(f"{loop.name}: {lacking}", backend.main and bool(lacking))
    if local_storage.writes(backend.main):
        loop.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_torn(loop.folder)
        if local_storage.apart():
            checkpoints.remove_after(loop.folder, checkpoints.step_of(resume) if resume else 0)
    if resume is not None:
        say(f"{loop.name}: going on from {resume}", backend.main)
    if backend.main:
        for name in ("metrics.jsonl", "bad_batches.jsonl"):
            trim_lines(loop.run / name, loop.name, checkpoints.step_of(resume) if resume else 0)
        event_log.note(loop.run, "training", phase=loop.name, step=checkpoints.step_of(resume) if resume else 0)
    watch, proof = Watch(backend, loop.run, meter, training.save_total_limit), _Proof(backend, training.precision)
    trainer = make([watch, proof])
    watch.trainer = proof.trainer = trainer
    precision.apply(trainer, training.precision, backend)
    from transformers.integrations.integration_utils import get_reporting_integration_callbacks
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    for tracker in get_reporting_integration_callbacks(trainer.args.report_to):
        if (behind := trainer.pop_callback(tracker)) is not None:
            trainer.add_callback(behind)  # behind ours, which adds to what is logged
    if loop.profile is not None and backend.main:
        trainer.add_callback(Profiler(loop.profile, loop.run / "profile", loop.name))
    started = time.monotonic()
    with watch:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    checkpoints.follow(loop.folder, backend.main)
    if backend.zero:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # or the next phase's from_pretrained would load a model that is in parts from the start
    watch.raise_if_interrupted()
    return trainer, {
        "steps": trainer.state.global_step,
        "last_loss": watch.losses[-1] if watch.losses else None,
        "seconds": round(time.monotonic() - started, 1),
        "resumed_from": checkpoints.step_of(resume) if resume else None,
    }


class _Proof(TrainerCallback):  # type: ignore[misc]
    """Stops a training whose weights are not in the number format that was asked for."""

    def __init__(self, backend: Backend, asked: str) -> None:
        self.backend, self.asked = backend, asked
        self.trainer: Trainer | None = None

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        assert self.trainer is not None
        wrong = precision.problems(self.trainer, self.asked, self.backend)
        if wrong:
            raise RunFailed("; ".join(wrong))


def whole_state(trainer: Trainer, backend: Backend) -> Mapping[str, torch.Tensor] | None:
    """The full weights of a sharded model on the main process (every process must call); None where they are not sharded.

    A tied matrix is in it once. Raises RunFailed where a weight is missing or not whole.
    """
    if not backend.sharded:
        return None
    net = unwrapped(trainer)
    gathered = trainer.accelerator.get_state_dict(sharded(trainer))
    if not backend.main:
        return {}
    tied = getattr(net, "all_tied_weights_keys", None) or {}
    state = {name.removeprefix("_orig_mod."): value for name, value in gathered.items()}
    state = {name: value for name, value in state.items() if tied.get(name) not in state}
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in net.named_parameters()}
    torn = [name for name, size in sizes.items() if name not in state or state[name].numel() != size]
    if torn:
        raise RunFailed(
            f"{backend.kind} gave back {', '.join(torn[:5])} in part or not at all: the model is not saved, the checkpoint is kept"
        )
    return state


def sharded(trainer: Trainer) -> Any:
    """The model as the backend shards it. FSDP is put around torch.compile's wrapping, others below it."""
    from torch.distributed.fsdp import FSDPModule

    model = trainer.model_wrapped
    return model if isinstance(model, FSDPModule) else getattr(model, "_orig_mod", model)


def measured(trainer: Trainer, backend: Backend) -> Any:
    """The model to measure: below DDP's wrapping, whose forward expects a backward; sharded ones as they are."""
    return sharded(trainer) if backend.sharded else unwrapped(trainer)


def unwrapped(trainer: Trainer) -> PreTrainedModel:
    """The model below the backend's wrapping."""
    model: PreTrainedModel = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return model
