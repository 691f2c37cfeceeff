"""The eyes on a training loop: progress, metrics.jsonl, sealed checkpoints, signals that stop it together."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from azrecipe.distributed import local_storage
from azrecipe.distributed.backend import Backend
from azrecipe.errors import SIGINT, SIGTERM, AllFailed, Interrupted
from azrecipe.modeling.flops import flops_per_token
from azrecipe.training import checkpoints
from azrecipe.training.backend_verification import verify
from azrecipe.training.throughput import chips_peak
from azrecipe.utils.atomic_files import write_text
from azrecipe.utils.console import duration, say
from azrecipe.utils.memory import peak_memory

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


KEPT_LOGS = 100  # lines of the log that transformers keeps in every checkpoint: metrics.jsonl has them all


@dataclass(frozen=True)
class Meter:
    """What the log counts: a name for the loop, tokens a step (0 where unknown), and bytes of text up to a step.

    For other units: the length of a sequence in tokens, and tokens a word of the target text (0 where unknown).
    """

    name: str
    tokens_per_step: int
    bytes_at: Callable[[int], int]
    tokens_at: Callable[[int], int] | None = None  # tokens up to a step, where steps differ
    length: float = 0.0
    tokens_a_word: float = 0.0

    def tokens(self, step: int) -> int:
        """Tokens up to a step, padding not counted."""
        return step * self.tokens_per_step if self.tokens_at is None else self.tokens_at(step)


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
        self.steps_per_second = 0.0
        self.losses: list[float] = []
        self.flops: float | None = None  # that a token takes, as a share of what all chips together can do in a second

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
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()  # what an earlier loop or a measurement held is not this loop's
        resumed = f", from step {state.global_step}" if state.global_step else ""
        say(f"{self.meter.name}: {state.max_steps} steps{resumed} ({line})", self.backend.main)
        if (peak := chips_peak()) is not None:
            needed = flops_per_token(self.trainer.accelerator.unwrap_model(self.trainer.model), self.meter.length)
            self.flops = needed / (peak * self.backend.world) if needed is not None else None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.backend.world > 1:
            flag = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.signal = int(flag)
        if self.signal:
            control.should_save = control.should_training_stop = True

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        logs = logs if logs is not None else {}
        del state.log_history[:-KEPT_LOGS]
        if "loss" not in logs:
            if self.backend.main and any(key.startswith("eval_") for key in logs):
                self._write({"step": state.global_step, **logs})
                bpb = {key[5:-4]: value for key, value in logs.items() if key.endswith("_bpb")}
                found = ", ".join(f"{name} {value:.3f}" for name, value in bpb.items())
                say(f"  {self.meter.name} {state.global_step:>6}/{state.max_steps}  bits per byte: {found}", bool(bpb))
            return
        loss = float(logs["loss"])
        self.losses.append(loss)
        if not math.isfinite(loss):
            raise AllFailed(
                f"{self.meter.name}: the loss is {loss} at step {state.global_step}. Lower learning_rate or raise warmup_ratio; the last checkpoint is kept"
            )
        line = self._line(state, logs)
        logs.update({key: value for key, value in line.items() if key not in ("step", "loss")})  # for the trackers, which come after
        if self.backend.main:
            self._write(line)
            self._say(state, line)

    def _line(self, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
        """A line of metrics.jsonl, for the steps since the one before."""
        now, step, meter = time.monotonic(), state.global_step, self.meter
        steps, seconds = step - self.last_step, max(now - self.since, 1e-9)
        tokens = (meter.tokens(step) - meter.tokens(self.last_step)) / seconds
        rates = {"tokens_per_second": round(tokens, 1)}
        if meter.tokens_a_word:
            rates["target_words_per_second"] = round(tokens / meter.tokens_a_word, 1)
        if self.flops is not None:
            rates["mfu"] = round(tokens * self.flops, 4)
        size = meter.bytes_at(step) - meter.bytes_at(self.last_step)
        predicted = getattr(self.trainer, "take_predicted", lambda: 0)()
        if size and predicted:
            rates["train_bpb"] = round(float(logs["loss"]) * predicted / (math.log(2) * size), 5)
        self.since, self.last_step, self.steps_per_second = now, step, steps / seconds
        return {
            "step": step,
            "loss": float(logs["loss"]),
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": finite(logs.get("grad_norm")),
            "tokens": meter.tokens(step),
            "bytes": meter.bytes_at(step),
            **rates,
            **{key: finite(value) for key, value in logs.items() if key.startswith("rewards/")},  # DPOTrainer's
            "peak_memory_bytes": peak_memory(),
        }

    def _say(self, state: TrainerState, line: dict[str, Any]) -> None:
        step, name = state.global_step, self.meter.name
        remaining = (state.max_steps - step) * (time.monotonic() - self.started) / max(step - self.first_step, 1)
        parts = [f"loss {line['loss']:.3f}"]
        if "train_bpb" in line:
            parts.append(f"BPB {line['train_bpb']:.3f}")
        parts.append(f"lr {line['learning_rate']:.2e}")
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s" if self.meter.tokens_per_step else f"{self.steps_per_second:.2f} steps/s")
        if "target_words_per_second" in line:
            parts.append(f"{line['target_words_per_second']:,.0f} words/s")
        if "mfu" in line:
            parts.append(f"MFU {line['mfu']:.1%}")
        say("  ".join([f"  {name} {step:>6}/{state.max_steps}", *parts, f"{duration(remaining)} left"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        folder = Path(args.output_dir)
        self.trainer.accelerator.wait_for_everyone()
        written, saver, main = folder / f"checkpoint-{state.global_step}", getattr(self.trainer, "saver", None), self.backend.main
        later = main and saver is not None  # a thread writes the main process' part, and lists it itself
        mine = checkpoints.sync(written, self.backend) if local_storage.writes(main) and not later else {}
        sizes = local_storage.merged(mine)
        if main and not later:
            checkpoints.mark(written, sizes)
            checkpoints.rotate(folder, self.keep)
        checkpoints.follow(folder, main)
        if main and saver is not None:
            saver.start(written, self.keep, sizes)
        self.trainer.accelerator.wait_for_everyone()

    def raise_if_interrupted(self) -> None:
        """After training: an interrupted run ends here, its checkpoint saved, and writes no final model."""
        if self.signal:
            code = SIGINT if self.signal == signal.SIGINT else SIGTERM
            raise Interrupted("interrupted; a checkpoint is saved and the same command goes on from it", code)

    def _write(self, line: dict[str, Any]) -> None:
        with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.meter.name, **line}) + "\n")


def finite(value: Any) -> float | None:
    """A number as JSON knows it; None for what is none."""
    return float(value) if value is not None and math.isfinite(value) else None


def trim_lines(file: Path, phase: str, step: int) -> None:
    """Drop a phase's lines of a file after the step that a run resumes from, so that no step stands there twice.

    A line that a crash tore is dropped too.
    """
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
