"""What a few training steps spend their time on: PyTorch's profiler, a trace of it, and a table of the kernels that ran."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import TrainerCallback

from azrecipe.recipe.types import Profile
from azrecipe.utils.atomic_files import write_text
from azrecipe.utils.console import say

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from azrecipe.recipe.load import Recipe

ROWS = 60  # of the table, by time

# Names that only the fused ways of doing a thing have: of GPU kernels, of operators, of autograd functions.
FUSED = {
    "Liger": r"^Liger|^_?(triton_)?(rms_norm|layer_norm|swiglu|geglu_tanh)_(forward|backward)_kernel|^_?triton_rope|^liger_cross_entropy",
    "flash attention": r"flash_(fwd|bwd|attn|attention)|_flash_attention_(for_cpu|forward|backward)|^aten::_(scaled_dot_product_)?flash",
    "memory-efficient attention": r"fmha_cutlass|^aten::_(scaled_dot_product_)?efficient_attention",
    "cuDNN attention": r"cudnn_generated.*sdpa|^aten::_(scaled_dot_product_)?cudnn_attention",
    "PyTorch's chunked loss": r"^torch_nn::_linear_cross_entropy_batch_chunked",
    "fused optimizer": r"^aten::_fused_adam|FusedAdam",
    "torch.compile": r"^triton_(poi|red|per|tem)_fused|^CompiledFunction|^Torch-Compiled Region",
}


class Profiler(TrainerCallback):  # type: ignore[misc]
    """Records the steps that a recipe's `profile` names into folder/<name>.trace.json.gz and folder/<name>.txt, in one process.

    One step before them warms the profiler up. After a resume inside them the rest is recorded; a table that is there is kept.
    """

    def __init__(self, asked: Profile, folder: Path, name: str) -> None:
        self.first, self.last = asked.start_step, asked.start_step + asked.steps - 1
        self.folder, self.name = folder, name
        self.running: profile | None = None
        self.cut_short = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step + 1
        if self.running is not None or not self.first - 1 <= step <= self.last or state.max_steps < self.first:
            return
        if (self.folder / f"{self.name}.txt").exists():
            return
        warmup = 1 if step < self.first else 0
        begin = max(step, self.first)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.running = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=warmup, active=self.last - begin + 1, repeat=1),
            on_trace_ready=lambda recorded: self._write(recorded, begin, state.global_step),
        )
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it says on stderr that it starts
        self.running.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.running is None:
            return
        self.running.step()  # after the last one the profiler calls _write
        self.cut_short = control.should_training_stop and state.global_step < min(self.last, state.max_steps)
        if state.global_step >= self.last or self.cut_short:
            self._stop()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        running, self.running = self.running, None
        if running is not None:
            running.stop()

    def _write(self, recorded: profile, begin: int, end: int) -> None:
        if self.cut_short:
            return  # by a signal: the resumed run records
        self.folder.mkdir(parents=True, exist_ok=True)
        aside = self.folder / f".{self.name}.trace.json.gz"
        recorded.export_chrome_trace(str(aside))
        aside.replace(self.folder / f"{self.name}.trace.json.gz")
        steps = f"step {end}" if begin == end else f"steps {begin} to {end}"
        write_text(self.folder / f"{self.name}.txt", f"{self.name}, {steps}\n\n{table(recorded)}")


def check(recipe: Recipe, steps: Mapping[str, int], main: bool) -> None:
    """Raise RecipeError where no loop (a name and its number of steps) is long enough for `training.profile`; say which are not."""
    asked = recipe.config.training.profile
    if asked is None:
        return
    short = [f"{name} ({count} steps)" for name, count in steps.items() if count < asked.start_step]
    if len(short) == len(steps):
        message = f"no step {asked.start_step} is trained, so nothing would be recorded: {', '.join(short)}"
        raise recipe.problem(message, "training", "profile", "start_step")
    say(f"  profile: too short for step {asked.start_step}, so not recorded: {', '.join(short)}", main and bool(short))


def table(recorded: profile) -> str:
    """The fused kernels that ran, and all operators and kernels by the time that they took themselves."""
    events = recorded.key_averages()
    on_device = any(event.self_device_time_total for event in events)
    lines = ["Fused kernels that ran:"]
    for name, found in fused([event.key for event in events]).items():
        lines.append(f"  {name}: {', '.join(found) if found else 'none'}")
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    return "\n".join([*lines, "", str(events.table(sort_by=order, row_limit=ROWS, max_name_column_width=90))])


def fused(names: Sequence[str]) -> dict[str, list[str]]:
    """The names of operators and kernels, by the kind of fused kernel that they belong to."""
    return {kind: sorted({name for name in names if re.search(pattern, name)}) for kind, pattern in FUSED.items()}
