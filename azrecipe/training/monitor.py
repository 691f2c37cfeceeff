"""Monitor a training loop: progress, metrics.jsonl, checkpoints, and signals.

A signal stops all processes at the same step.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from transformers import TrainerCallback

from azrecipe.distributed import local_storage, process_group
from azrecipe.distributed.backend import Backend
from azrecipe.errors import AllProcessesFailed, Interrupted
from azrecipe.modeling.flops import flops_per_token
from azrecipe.training import checkpoints
from azrecipe.training.async_checkpoint import AsyncCheckpointWriter
from azrecipe.training.backend_verification import verify_backend
from azrecipe.training.stop_signal import SignalExchange
from azrecipe.training.throughput import get_local_peak_flops
from azrecipe.utils.atomic_files import write_text
from azrecipe.utils.console import format_duration, print_progress
from azrecipe.utils.environment_variables import STEP_TIMEOUT
from azrecipe.utils.memory import measure_peak_memory
from azrecipe.utils.process_watch import ProcessWatch, get_process_watch, get_signal_exit_code, list_stop_signals

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments


DUMP_SHARE = 0.9  # of the step's time-out: what a waiting process does is written down before the time-out ends it
MAX_LOG_HISTORY = 100  # log lines that transformers stores in every checkpoint; metrics.jsonl has all


@dataclass(frozen=True)
class LoopUnits:
    """The units of a loop's log.

    `tokens_per_step` is 0 where unknown. `bytes_at` and `tokens_at` count text up to a step; `tokens_at` is for steps that differ.
    `sequence_length` is a sequence's tokens. `tokens_per_word` is for the target text, 0 where unknown.
    """

    name: str
    tokens_per_step: int
    bytes_at: Callable[[int], int]
    tokens_at: Callable[[int], int] | None = None
    sequence_length: float = 0.0
    tokens_per_word: float = 0.0

    def count_tokens(self, step: int) -> int:
        """Count the tokens up to a step, without padding."""
        return step * self.tokens_per_step if self.tokens_at is None else self.tokens_at(step)


@runtime_checkable
class TrainerExtension(Protocol):
    """What a Trainer may have for its monitor, beside transformers' own."""

    checkpoint_writer: AsyncCheckpointWriter | None

    def take_predicted_tokens(self) -> int:
        """Return the tokens that were predicted since the last call."""


class TrainingMonitor(TrainerCallback):  # type: ignore[misc]
    """Monitors one Trainer; only the main process writes.

    A signal takes effect after a step. Several processes share it, so every one saves and stops at the same step, which is the next one.
    """

    def __init__(self, backend: Backend, run_path: Path, units: LoopUnits, keep_last: int) -> None:
        self.backend, self.run_path, self.units, self.keep_last = backend, run_path, units, keep_last
        self.trainer: Trainer | None = None
        self.received_signal = 0
        self.shared_signal = 0  # what all processes know of
        self.signal_exchange: SignalExchange | None = None
        self.watch: ProcessWatch | None = None
        self.step_timeout, self.group_timeout = STEP_TIMEOUT.read_seconds(), process_group.LONG_TIMEOUT_SECONDS
        self.start_time = self.last_log_time = time.monotonic()
        self.first_step = self.last_step = 0
        self.steps_per_second = 0.0
        self.losses: list[float] = []
        self.peak_share_per_token: float | None = None  # FLOPs of a token / peak FLOP/s of all chips

    def __enter__(self) -> TrainingMonitor:
        self.previous_handlers = {number: signal.signal(number, self._on_signal) for number in list_stop_signals()}
        self.watch = get_process_watch()
        if self.watch is not None:
            dump_after = DUMP_SHARE * self.step_timeout if self.backend.world_size > 1 else 0.0
            self.watch.open_stacks(self.run_path, self.backend.rank, dump_after)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self._set_timeout(process_group.LONG_TIMEOUT_SECONDS)
        if self.watch is not None:
            self.watch.leave_loop()

    def _on_signal(self, number: int, _frame: object) -> None:
        self.received_signal = number

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        description = verify_backend(self.backend, self.trainer)
        self.start_time = self.last_log_time = time.monotonic()
        self.first_step = self.last_step = state.global_step
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()  # memory of an earlier loop or measurement is not this loop's
        resumed = f", from step {state.global_step}" if state.global_step else ""
        print_progress(f"{self.units.name}: {state.max_steps} steps{resumed} ({description})", self.backend.main)
        if (peak_flops := get_local_peak_flops()) is not None:
            flops = flops_per_token(self.trainer.accelerator.unwrap_model(self.trainer.model), self.units.sequence_length)
            self.peak_share_per_token = flops / (peak_flops * self.backend.world_size) if flops is not None else None

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.watch is not None:
            self.watch.begin_step()
        if self.backend.world_size > 1 and state.global_step > self.first_step:  # the first step compiles, and opens connections
            self._set_timeout(self.step_timeout)

    def _set_timeout(self, seconds: float) -> None:
        if seconds != self.group_timeout:
            process_group.set_timeout(seconds)
            self.group_timeout = seconds

    def on_substep_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.watch is not None:
            self.watch.record_progress()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self.backend.world_size > 1:
            self.signal_exchange = self.signal_exchange or SignalExchange(args.device)
            is_waiting = control.should_save or control.should_evaluate or control.should_training_stop
            self.shared_signal = self.signal_exchange.exchange(self.received_signal, at_once=is_waiting)
            if self.shared_signal or is_waiting:
                self._set_timeout(process_group.LONG_TIMEOUT_SECONDS)
        else:
            self.shared_signal = self.received_signal
        if self.watch is not None:
            self.watch.end_step()
        if self.shared_signal:
            control.should_save = control.should_training_stop = True
            if self.watch is not None:
                self.watch.acknowledge_stop()

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any) -> None:
        logs = logs if logs is not None else {}
        del state.log_history[:-MAX_LOG_HISTORY]
        if "loss" not in logs:
            if self.backend.main and any(key.startswith("eval_") for key in logs):
                self._write({"step": state.global_step, **logs})
                bpb = {key[5:-4]: value for key, value in logs.items() if key.endswith("_bpb")}
                values = ", ".join(f"{name} {value:.3f}" for name, value in bpb.items())
                print_progress(f"  {self.units.name} {state.global_step:>6}/{state.max_steps}  bits per byte: {values}", bool(bpb))
            return
        loss = float(logs["loss"])
        self.losses.append(loss)
        if not math.isfinite(loss):
            raise AllProcessesFailed(
                f"{self.units.name}: the loss is {loss} at step {state.global_step}. Lower learning_rate or raise warmup_ratio; the last checkpoint is kept"
            )
        line = self._build_line(state, logs)
        logs.update({key: value for key, value in line.items() if key not in ("step", "loss")})  # for the trackers, which run after this
        if self.backend.main:
            self._write(line)
            self._print_line(state, line)

    def _build_line(self, state: TrainerState, logs: dict[str, Any]) -> dict[str, Any]:
        """Build a line of metrics.jsonl for the steps since the last one."""
        now, step, units = time.monotonic(), state.global_step, self.units
        steps, seconds = step - self.last_step, max(now - self.last_log_time, 1e-9)
        tokens_per_second = (units.count_tokens(step) - units.count_tokens(self.last_step)) / seconds
        rates = {"tokens_per_second": round(tokens_per_second, 1)}
        if units.tokens_per_word:
            rates["target_words_per_second"] = round(tokens_per_second / units.tokens_per_word, 1)
        if self.peak_share_per_token is not None:
            rates["mfu"] = round(tokens_per_second * self.peak_share_per_token, 4)
        num_bytes = units.bytes_at(step) - units.bytes_at(self.last_step)
        predicted = self.trainer.take_predicted_tokens() if isinstance(self.trainer, TrainerExtension) else 0
        if num_bytes and predicted:
            rates["train_bpb"] = round(float(logs["loss"]) * predicted / (math.log(2) * num_bytes), 5)
        self.last_log_time, self.last_step, self.steps_per_second = now, step, steps / seconds
        return {
            "step": step,
            "loss": float(logs["loss"]),
            "learning_rate": logs.get("learning_rate"),
            "grad_norm": to_finite_float(logs.get("grad_norm")),
            "tokens": units.count_tokens(step),
            "bytes": units.bytes_at(step),
            **rates,
            **{key: to_finite_float(value) for key, value in logs.items() if key.startswith("rewards/")},  # DPOTrainer's
            "peak_memory_bytes": measure_peak_memory(),
        }

    def _print_line(self, state: TrainerState, line: dict[str, Any]) -> None:
        step, name = state.global_step, self.units.name
        remaining = (state.max_steps - step) * (time.monotonic() - self.start_time) / max(step - self.first_step, 1)
        parts = [f"loss {line['loss']:.3f}"]
        if "train_bpb" in line:
            parts.append(f"BPB {line['train_bpb']:.3f}")
        parts.append(f"lr {line['learning_rate']:.2e}")
        parts.append(f"{line['tokens_per_second']:,.0f} tokens/s" if self.units.tokens_per_step else f"{self.steps_per_second:.2f} steps/s")
        if "target_words_per_second" in line:
            parts.append(f"{line['target_words_per_second']:,.0f} words/s")
        if "mfu" in line:
            parts.append(f"MFU {line['mfu']:.1%}")
        print_progress("  ".join([f"  {name} {step:>6}/{state.max_steps}", *parts, f"{format_duration(remaining)} left"]))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        folder = Path(args.output_dir)
        self.trainer.accelerator.wait_for_everyone()
        checkpoint, main = folder / f"checkpoint-{state.global_step}", self.backend.main
        writer = self.trainer.checkpoint_writer if isinstance(self.trainer, TrainerExtension) else None
        # A thread writes the main process' files, or those of every process, and lists them
        in_background = writer is not None and (main or writer.is_collective)
        local_sizes = checkpoints.sync_checkpoint(checkpoint, self.backend) if local_storage.is_writer(main) and not in_background else {}
        sizes = local_storage.merge_file_sizes(local_sizes)
        if main and not in_background:
            checkpoints.write_marker(checkpoint, sizes)
            checkpoints.rotate(folder, self.keep_last)
        checkpoints.mirror_deletions(folder, main)
        if writer is not None and in_background:
            writer.start_writing(checkpoint, self.keep_last, sizes)
        self.trainer.accelerator.wait_for_everyone()

    def raise_if_interrupted(self) -> None:
        """End an interrupted run after training, before it writes a final model."""
        if number := self.shared_signal or self.received_signal:
            cause = ": the process that started this one has ended" if self.watch is not None and self.watch.has_lost_parent() else ""
            message = f"interrupted{cause}; a checkpoint is saved and the same command goes on from it"
            raise Interrupted(message, get_signal_exit_code(number))

    def _write(self, line: dict[str, Any]) -> None:
        with (self.run_path / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"phase": self.units.name, **line}) + "\n")


def to_finite_float(value: Any) -> float | None:
    """Convert to a number that JSON has; None for others."""
    return float(value) if value is not None and math.isfinite(value) else None


def trim_lines(file: Path, phase: str, step: int) -> None:
    """Drop a phase's lines after the step that a run resumes from.

    So no step occurs twice. A line that a crash left incomplete is dropped too.
    """
    if not file.exists():
        return
    lines, dropped = [], False
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            dropped = True
            continue
        is_row = isinstance(line, dict) and isinstance(line.get("step", 0), int)
        if not is_row or (line.get("phase") == phase and line.get("step", 0) > step):
            dropped = True
        else:
            lines.append(text)
    if dropped:
        write_text(file, "".join(f"{text}\n" for text in lines))
