"""Profile a few training steps with PyTorch's profiler.

It writes a trace and a table of the kernels that ran.
"""

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
from azrecipe.utils.console import print_progress

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from azrecipe.recipe.load import Recipe

TABLE_ROWS = 60  # rows of the table, by time

# Names of GPU kernels, operators and autograd functions that only fused implementations have.
FUSED_KERNEL_PATTERNS = {
    "Liger": r"^Liger|^_?(triton_)?(rms_norm|layer_norm|swiglu|geglu_tanh)_(forward|backward)_kernel|^_?triton_rope|^liger_cross_entropy",
    "flash attention": r"flash_(fwd|bwd|attn|attention)|_flash_attention_(for_cpu|forward|backward)|^aten::_(scaled_dot_product_)?flash",
    "memory-efficient attention": r"fmha_cutlass|^aten::_(scaled_dot_product_)?efficient_attention",
    "cuDNN attention": r"cudnn_generated.*sdpa|^aten::_(scaled_dot_product_)?cudnn_attention",
    "PyTorch's chunked loss": r"^torch_nn::_linear_cross_entropy_batch_chunked",
    "fused optimizer": r"^aten::_fused_adam|FusedAdam",
    "torch.compile": r"^triton_(poi|red|per|tem)_fused|^CompiledFunction|^Torch-Compiled Region",
}


class Profiler(TrainerCallback):  # type: ignore[misc]
    """Records the steps of a recipe's `profile`, in one process.

    It writes folder/<name>.trace.json.gz and folder/<name>.txt. One step before them warms the profiler up. After a resume inside these
    steps it records the rest. It keeps a table that exists.
    """

    def __init__(self, settings: Profile, folder: Path, name: str) -> None:
        self.first_step, self.last_step = settings.start_step, settings.start_step + settings.steps - 1
        self.folder, self.name = folder, name
        self.torch_profiler: profile | None = None
        self.interrupted = False

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        step = state.global_step + 1
        if self.torch_profiler is not None or not self.first_step - 1 <= step <= self.last_step or state.max_steps < self.first_step:
            return
        if (self.folder / f"{self.name}.txt").exists():
            return
        warmup = 1 if step < self.first_step else 0
        begin = max(step, self.first_step)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.torch_profiler = profile(
            activities=activities,
            schedule=schedule(wait=0, warmup=warmup, active=self.last_step - begin + 1, repeat=1),
            on_trace_ready=lambda profiler: self._write(profiler, begin, state.global_step),
        )
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # or it prints on stderr that it starts
        self.torch_profiler.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.torch_profiler is None:
            return
        self.torch_profiler.step()  # after the last step the profiler calls _write
        self.interrupted = control.should_training_stop and state.global_step < min(self.last_step, state.max_steps)
        if state.global_step >= self.last_step or self.interrupted:
            self._stop()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        torch_profiler, self.torch_profiler = self.torch_profiler, None
        if torch_profiler is not None:
            torch_profiler.stop()

    def _write(self, profiler: profile, begin: int, end: int) -> None:
        if self.interrupted:
            return  # by a signal: the resumed run records them
        self.folder.mkdir(parents=True, exist_ok=True)
        partial_file = self.folder / f".{self.name}.trace.json.gz"
        profiler.export_chrome_trace(str(partial_file))
        partial_file.replace(self.folder / f"{self.name}.trace.json.gz")
        steps = f"step {end}" if begin == end else f"steps {begin} to {end}"
        write_text(self.folder / f"{self.name}.txt", f"{self.name}, {steps}\n\n{format_profile(profiler)}")


def check_profile_steps(recipe: Recipe, steps: Mapping[str, int], main: bool) -> None:
    """Check that some loop is long enough for `training.profile`.

    `steps` has the number of steps of each loop. Prints the loops that are too short; raises RecipeError where all are.
    """
    profile_settings = recipe.config.training.profile
    if profile_settings is None:
        return
    short_loops = [f"{name} ({count} steps)" for name, count in steps.items() if count < profile_settings.start_step]
    if len(short_loops) == len(steps):
        message = f"no loop has a step {profile_settings.start_step}, so nothing would be recorded: {', '.join(short_loops)}"
        raise recipe.error(message, "training", "profile", "start_step")
    print_progress(
        f"  profile: too short for step {profile_settings.start_step}, so not recorded: {', '.join(short_loops)}",
        main and bool(short_loops),
    )


def format_profile(profiler: profile) -> str:
    """Format the fused kernels that ran, and all kernels by time.

    The time is that of the kernel or operator itself.
    """
    events = profiler.key_averages()
    on_device = any(event.self_device_time_total for event in events)
    lines = ["Fused kernels that ran:"]
    for name, kernel_names in group_fused_kernels([event.key for event in events]).items():
        lines.append(f"  {name}: {', '.join(kernel_names) if kernel_names else 'none'}")
    order = "self_device_time_total" if on_device else "self_cpu_time_total"
    return "\n".join([*lines, "", str(events.table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=90))])


def group_fused_kernels(names: Sequence[str]) -> dict[str, list[str]]:
    """Group operator and kernel names by their kind of fused kernel."""
    return {kind: sorted({name for name in names if re.search(pattern, name)}) for kind, pattern in FUSED_KERNEL_PATTERNS.items()}
