"""Times the steps of a trainer, and names the kernels of one."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from azrecipe.training.profiling import group_fused_kernels


class Clock(TrainerCallback):  # type: ignore[misc]
    """Times steps of `tokens` each: `warm` that do not count, `timed` ones, and with `profiled` one more; then the training ends."""

    def __init__(self, tokens: int, *, warm: int, timed: int, profiled: bool) -> None:
        self.tokens, self.warm, self.last, self.profiled = tokens, warm, warm + timed, profiled
        self.seconds: list[float] = []
        self.profile: dict[str, Any] = {}
        self.running: profile | None = None
        self.peak = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.last:
            self.running = profile(activities=[ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU])
            self.running.__enter__()
        self.begun = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.peak = torch.cuda.max_memory_allocated()
        self.seconds.append(time.monotonic() - self.begun)
        if self.running is not None:
            self.running.__exit__(None, None, None)
            self.profile = describe(self.running)
        if state.global_step >= self.last + self.profiled:
            control.should_training_stop, control.should_save = True, False

    def row(self) -> dict[str, Any]:
        """Tokens a second by the median timed step, seconds of each, and the peak of memory."""
        return {
            "tokens_per_second": round(self.tokens / statistics.median(self.seconds[self.warm : self.last])),
            "step_seconds": [round(value, 3) for value in self.seconds],
            "peak_gb": round(self.peak / 1e9, 2),
            **({"profile": self.profile} if self.profile else {}),
        }


def describe(recorded: profile) -> dict[str, Any]:
    """The kernels of a step by the time that they took, in milliseconds, and the kinds of fused ones."""
    events = recorded.key_averages()
    on_gpu = torch.cuda.is_available()
    spent = {event.key: event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
    by_time = sorted(events, key=lambda event: -spent[event.key])
    return {
        "total_ms": round(sum(spent.values()) / 1000, 1),
        "kinds": [kind for kind, names in group_fused_kernels([event.key for event in events]).items() if names],
        "kernels": [[event.key[:110], round(spent[event.key] / 1000, 2), event.count] for event in by_time[:40]],
    }
