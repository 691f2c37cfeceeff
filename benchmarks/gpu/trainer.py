"""Stage 4: the real trainer on the published job, as shipped and with each improvement: tokens a second, memory, kernels, losses."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from project import open_job
from results import Results

WARM, TIMED = 2, 3  # steps; one more is profiled
SHIPPED_LOSS: Mapping[str, Any] = {}  # of Liger, before its sum was in float32
BATCH = "training.per_device_train_batch_size"


@dataclass(frozen=True)
class Setting:
    """One row: keys of the recipe, and what no key says yet."""

    sets: Mapping[str, Any] = field(default_factory=dict)
    loss: Mapping[str, Any] | None = None  # other arguments of Liger's loss than the trainer's
    compiled: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    profiled: bool = False


SDPA = {"model.attn_implementation": "sdpa"}
VARLEN = {"model.attn_implementation": "varlen"}
ONLY_LOSS = {"training.liger_kernel_config": "{rope: false, rms_norm: false, swiglu: false}"}
EMBEDDINGS = {"phases": "[{name: all, trainable_parameters: [embeddings], learning_rate: 1e-4, max_steps: 20}]"}
SINGLE = {
    "a single, sdpa with the mask": Setting(SDPA, loss=SHIPPED_LOSS, profiled=True),
    "a2 a + loss in float32, larger chunks": Setting(SDPA),
    "a3 a2 + varlen": Setting(VARLEN, profiled=True),
    "a4 a3 + blocks compiled, of Liger the loss alone": Setting({**VARLEN, **ONLY_LOSS}, compiled=True),
    "a5 a4 + batch 14": Setting({**VARLEN, **ONLY_LOSS, BATCH: 14}, compiled=True),
    "a6 a3 + batch 14": Setting({**VARLEN, BATCH: 14}),
    "h1 phase 1 (embeddings alone), sdpa": Setting({**SDPA, **EMBEDDINGS}, loss=SHIPPED_LOSS),
    "a9 a again": Setting(SDPA, loss=SHIPPED_LOSS),
}
FSDP = {
    "b fsdp, 1 process, sdpa": Setting(SDPA, loss=SHIPPED_LOSS),
    "c b + varlen": Setting(VARLEN, loss=SHIPPED_LOSS, profiled=True),
    "d c + loss in float32, larger chunks": Setting(VARLEN),
    "e d + blocks compiled": Setting(VARLEN, compiled=True, profiled=True),
    "e2 e, of Liger the loss alone": Setting({**VARLEN, **ONLY_LOSS}, compiled=True, profiled=True),
    "e3 e2 + batch 14": Setting({**VARLEN, **ONLY_LOSS, BATCH: 14}, compiled=True),
    "e4 e3 + weights stay gathered": Setting(
        {**VARLEN, **ONLY_LOSS, BATCH: 14}, compiled=True, environment={"FSDP_RESHARD_AFTER_FORWARD": "false"}
    ),
    "e5 e2 + batch 28": Setting({**VARLEN, **ONLY_LOSS, BATCH: 28}, compiled=True),
    "d2 d + batch 14": Setting({**VARLEN, BATCH: 14}, profiled=True),
    "d3 d + batch 28": Setting({**VARLEN, BATCH: 28}),
    "d5 d + batch 28, every layer checkpointed": Setting({**VARLEN, BATCH: 28, "training.activation_checkpointing": True}),
    "d6 d5, every second layer": Setting({**VARLEN, BATCH: 28, "training.activation_checkpointing": "{every_n_layers: 2}"}),
    "d4 d2 + weights stay gathered": Setting({**VARLEN, BATCH: 14}, environment={"FSDP_RESHARD_AFTER_FORWARD": "false"}),
    "d7 d + gradients summed after each batch": Setting({**VARLEN, "training.sync_each_batch": True}),
    "d8 d + two processes that read batches": Setting({**VARLEN, "training.trainer_arguments": "{dataloader_num_workers: 2}"}),
    "h2 phase 1 (embeddings alone), varlen": Setting({**VARLEN, **EMBEDDINGS}),
    "d9 d again": Setting(VARLEN),
    "f e3 in bf16_pure": Setting({**VARLEN, **ONLY_LOSS, BATCH: 14, "training.precision": "bf16_pure"}, compiled=True),
}  # fmt: skip
GROUPS = {"single": SINGLE, "fsdp": FSDP}


def run(results: Results, recipe: Path, toy: bool, group: str, names: list[str]) -> bool:
    """Measure the rows of a group whose names begin with one of `names` (all where there is none). False: this process is of no further use."""
    for name, setting in GROUPS[group].items():
        if names and name.split()[0] not in names:
            continue
        if not results.measure("training", name, lambda name=name, setting=setting: measure(recipe, toy, name, setting)):
            return False
        release()
    return True


def release() -> None:
    """Give back what a row held, and let the next one's trainer find a new process."""
    import torch
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state()  # it keeps precision and sharding of the process' first trainer; the process group stays
    GradientState._reset_state()
    os.environ["ACCELERATE_MIXED_PRECISION"] = "no"
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(recipe: Path, toy: bool, name: str, setting: Setting) -> dict[str, Any]:
    """Train a few steps with a setting."""
    import torch
    from clock import Clock

    from azrecipe.modeling import liger_kernels
    from azrecipe.training.pretraining import run_phase_loop

    arguments_of_loss = liger_kernels.build_loss_arguments
    before = {key: os.environ.get(key) for key in setting.environment}
    os.environ.update(setting.environment)
    torch._dynamo.reset()
    try:
        sets = {key: value for key, value in setting.sets.items() if not (toy and key in (BATCH, *ONLY_LOSS))}
        sets |= {"training.torch_compile": True} if setting.compiled and not toy else {}
        job, net = open_job(recipe, sets, f"{name.split()[0]}-{os.getpid()}")
        tokens = job.config.training.global_batch_size * job.config.data.max_length
        clock = Clock(tokens, warm=WARM, timed=TIMED, profiled=setting.profiled)
        if setting.loss is not None:
            liger_kernels.build_loss_arguments = lambda _: dict(setting.loss)
        trainer, _ = run_phase_loop(job, net, 0, [clock])
        row = {**clock.row(), "losses": [round(loss, 5) for loss in trainer.guard.recent_losses]}
        row["norm"] = round(trainer.guard.grad_norm, 5)
        row["loss_arguments"] = str(dict(trainer.loss_arguments))
        trainer.accelerator.free_memory()
        return row
    finally:
        liger_kernels.build_loss_arguments = arguments_of_loss
        for key, value in before.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})
