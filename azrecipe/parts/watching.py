"""The eyes on a training loop: progress, metrics.jsonl, sealed checkpoints, signals that stop it together."""

from __future__ import annotations

import json
import math
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from azrecipe.errors import SIGINT, SIGTERM, Interrupted, RunFailed
from azrecipe.parts import checkpoint
from azrecipe.parts.backend import Backend, verify
from azrecipe.parts.files import write_text

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


def say(text: str, main: bool = True) -> None:
    """A line of progress, on stderr, from one process."""
    if main:
        print(text, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Meter:
    """What the log counts: a name for the loop, tokens a step (0 where unknown), and bytes of text up to a step."""

    name: str
    tokens_per_step: int
    bytes_at: Callable[[int], int]


class Watch(TrainerCallback):  # type: ignore[misc]
    """Watches one Trainer. Only the main process writes.

    Signals are answered after a step: the flag is shared, so that every process saves and stops at the same one.
    """

    def __init__(self, backend: Backend, run: Path, meter: Meter, keep: int) -> None:
        self.backend, self.run, self.meter, self.keep = backend, run, meter, keep
        self.trainer: Trainer | None = None
        self.signal = 0
        self.started = self.since = time.monotonic()
        self.first_step = self.last_step = 0
        self.losses: list[float] = []

    def __enter__(self) -> Watch:
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: object) -> None:
        self.signal = number

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        line = verify(self.backend, self.trainer)
        self.started = self.since = time.monotonic()
        self.first_step = self.last_step = state.global_step
        resumed = f", from step {state.global_step}" if state.global_step else ""
        say(f"{self.meter.name}: {state.max_steps} steps{resumed} ({line})", self.backend.main)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.backend.world > 1:
            flag = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.signal = int(flag)
        if self.signal:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        logs = dict(logs or {})
        if "loss" not in logs:
            if self.backend.main and any(key.startswith("eval_") for key in logs):
                self._write({"step": state.global_step, **logs})
            return
        loss = float(logs["loss"])
        self.losses.append(loss)
        if not math.isfinite(loss):
            raise RunFailed(
                f"{self.meter.name}: the loss is {loss} at step {state.global_step}. Lower learning_rate or raise warmup_ratio; the last checkpoint is kept"
            )
        now = time.monotonic()
        steps = state.global_step - self.last_step
        speed = steps / max(now - self.since, 1e-9)
        self.since, self.last_step = now, state.global_step
        line = {
            "step": state.global_step,
            "loss": loss,
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": logs.get("grad_norm"),
            "tokens": state.global_step * self.meter.tokens_per_step,
            "bytes": self.meter.bytes_at(state.global_step),
            "tokens_per_second": round(speed * self.meter.tokens_per_step, 1),
            "peak_memory_bytes": peak_memory(),
        }
        if self.backend.main:
            self._write(line)
            remaining = (state.max_steps - state.global_step) * (now - self.started) / max(state.global_step - self.first_step, 1)
            rate = f"{line['tokens_per_second']:,.0f} tokens/s" if self.meter.tokens_per_step else f"{speed:.2f} steps/s"
            say(
                f"  {self.meter.name} {state.global_step:>6}/{state.max_steps}  loss {loss:.3f}  lr {line['learning_rate']:.2e}  {rate}  {duration(remaining)} left"
            )

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        folder = Path(args.output_dir)
        self.trainer.accelerator.wait_for_everyone()
        if self.backend.main:
            checkpoint.seal(folder / f"checkpoint-{state.global_step}", self.backend)
            checkpoint.rotate(folder, self.keep)
        self.trainer.accelerator.wait_for_everyone()

    def raise_if_interrupted(self) -> None:
        """After training: an interrupted run ends here, its checkpoint saved, and writes no final model."""
        if self.signal:
            code = SIGINT if self.signal == signal.SIGINT else SIGTERM
            raise Interrupted("interrupted; a checkpoint is saved and the same command goes on from it", code)

    def _write(self, line: dict[str, Any]) -> None:
        with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.meter.name, **line}) + "\n")


def peak_memory() -> int:
    """Most bytes in use so far: on a GPU what PyTorch allocated there, on CPU the process' resident size."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def duration(seconds: float) -> str:
    """A time in words: 12 s, 3:05 min, 2:10 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02} h"


def trim_metrics(run: Path, phase: str, step: int) -> None:
    """Drop lines of metrics.jsonl after the step that a run resumes from, so that no step stands there twice.

    A line that a crash tore is dropped too.
    """
    file = run / "metrics.jsonl"
    if not file.exists():
        return
    kept, dropped = [], False
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            dropped = True
            continue
        if line.get("phase") == phase and line.get("step", 0) > step:
            dropped = True
        else:
            kept.append(text)
    if dropped:
        write_text(file, "".join(f"{text}\n" for text in kept))
