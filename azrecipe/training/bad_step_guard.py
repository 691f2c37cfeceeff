"""Detect bad training steps.

A step is bad if its loss or gradient is not finite, or if its loss is a spike. A step is judged when its gradients are complete and
before they change a weight. The sums are over all processes, so all judge alike. The documents of a bad step are written to
bad_batches.jsonl.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import Trainer
from transformers.trainer_callback import ExportableState, TrainerCallback

from azrecipe.distributed.backend import Backend
from azrecipe.errors import AllProcessesFailed
from azrecipe.utils.console import print_progress

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

LOSS_HISTORY = 50  # losses before a step that define a spike
MIN_LOSSES = 10  # fewer losses do not define a usual one
MAX_CONSECUTIVE_SKIPS = 5  # in a row: more than one batch is then wrong

STATE_KEY = "Guard"  # of the guard's state in a checkpoint's trainer_state.json

DocumentLookup = Callable[[int], list[dict[str, Any]]]


class BadStepGuard(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Stops a run at a bad step, or skips the step.

    `find_documents(sequence)` returns the documents of a training sequence. Checkpoints have the losses and the skipped steps, so a
    resumed run judges as an uninterrupted one.
    """

    def __init__(self, backend: Backend, run_path: Path, phase: str, find_documents: DocumentLookup) -> None:
        self.backend, self.run_path, self.phase, self.find_documents = backend, run_path, phase, find_documents
        self.skip_bad_steps, self.spike_factor = False, math.inf
        self.recent_losses: deque[float] = deque(maxlen=LOSS_HISTORY)
        self.skipped_steps: list[int] = []
        self.batch_losses: list[torch.Tensor] = []
        self.device_grad_norm: torch.Tensor | float = 0.0
        self.grad_norm = 0.0
        self.trainer: BadStepGuardMixin | None = None

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint stores (transformers' ExportableState)."""
        return {"args": {}, "attributes": {"recent": list(self.recent_losses), "skipped": self.skipped_steps}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        saved = state.stateful_callbacks.setdefault(STATE_KEY, self.state())
        if state.global_step and isinstance(saved, dict):
            self.recent_losses.extend(saved["attributes"]["recent"])
            self.skipped_steps = list(saved["attributes"]["skipped"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        self.batch_losses = []
        self.loss_before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        losses = torch.stack(self.batch_losses)
        loss, self.grad_norm = self._read_step(losses.sum())
        reason = self._find_reason(loss)
        if reason is None:
            self.recent_losses.append(loss)
            return
        step = state.global_step
        self._write_bad_batches(step, reason, loss, losses)
        self.skipped_steps.append(step)
        in_a_row = (
            len(self.skipped_steps) >= MAX_CONSECUTIVE_SKIPS
            and self.skipped_steps[-MAX_CONSECUTIVE_SKIPS] == step - MAX_CONSECUTIVE_SKIPS + 1
        )
        description = f"{self.phase}: {reason} at step {step + 1}; its documents are in {self.run_path / 'bad_batches.jsonl'}"
        if not self.skip_bad_steps or in_a_row:
            count = f" ({MAX_CONSECUTIVE_SKIPS} steps in a row)" if in_a_row else ""
            advice = "Lower learning_rate, raise warmup_ratio, or leave those documents out" + (
                "" if self.skip_bad_steps else "; training.on_bad_loss=skip skips such steps"
            )
            raise AllProcessesFailed(f"{description}{count}. The last checkpoint is kept. {advice}")
        print_progress(f"  {description}. The step is skipped", self.backend.main)
        self._skip_step()

    def _skip_step(self) -> None:
        """Drop the gradients, so that the optimizer changes nothing.

        It passes over parameters without a gradient, and their moments too.
        """
        assert self.trainer is not None
        for parameter in self.trainer.model_wrapped.parameters():
            parameter.grad = None
        usual_loss = self.recent_losses[-1] if self.recent_losses else 0.0
        self.trainer._tr_loss.copy_(self.loss_before + usual_loss)  # or the next logged mean would be NaN

    def _find_reason(self, loss: float) -> str | None:
        """Say why a step is bad, or None."""
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(self.grad_norm):
            return f"the gradient's norm is {self.grad_norm}"
        usual_loss = sum(self.recent_losses) / len(self.recent_losses) if len(self.recent_losses) >= MIN_LOSSES else math.inf
        if loss > self.spike_factor * usual_loss:
            return f"the loss is {loss:.3f}, {loss / usual_loss:.1f} times the mean of the {len(self.recent_losses)} steps before"
        return None

    def _read_step(self, loss: torch.Tensor) -> tuple[float, float]:
        """Read a step's loss and gradient norm, in one wait for the device.

        The loss is averaged over the processes, as the logged one is.
        """
        if self.backend.world_size > 1:
            loss = loss.clone()
            torch.distributed.all_reduce(loss)
        norm = torch.as_tensor(self.device_grad_norm, dtype=torch.float32, device=loss.device)
        total, grad_norm = torch.stack([loss.float(), norm]).tolist()
        return total / self.backend.world_size, grad_norm

    def _write_bad_batches(self, step: int, reason: str, loss: float, losses: torch.Tensor) -> None:
        """Append a line to bad_batches.jsonl.

        It holds each batch of the step with its part of the loss and its documents.
        """
        assert self.trainer is not None
        losses_by_process = [losses.tolist()]
        if self.backend.world_size > 1:
            gathered: list[Any] = [None] * self.backend.world_size
            torch.distributed.all_gather_object(gathered, losses.tolist())
            losses_by_process = gathered
        if not self.backend.main:
            return
        batch_size, accumulation = self.trainer.args.per_device_train_batch_size, len(losses)
        context_size = self.backend.context_parallel_size
        batches = []
        for index in range(accumulation):
            for reader in range(self.backend.data_parallel_size):
                # processes get the sequences batch by batch, in turn
                first = ((step * accumulation + index) * self.backend.data_parallel_size + reader) * batch_size
                sequences = [{"sequence": first + i, "documents": self.find_documents(first + i)} for i in range(batch_size)]
                group = losses_by_process[reader * context_size : (reader + 1) * context_size]
                batch_loss = sum(process_losses[index] for process_losses in group) / context_size * accumulation
                batches.append({"loss": batch_loss if math.isfinite(batch_loss) else str(batch_loss), "sequences": sequences})
        batches.sort(key=lambda batch: -batch["loss"] if isinstance(batch["loss"], float) else -math.inf)
        line = {"phase": self.phase, "step": step + 1, "reason": reason, "loss": loss if math.isfinite(loss) else str(loss),
                "grad_norm": self.grad_norm if math.isfinite(self.grad_norm) else str(self.grad_norm), "batches": batches}  # fmt: skip
        with (self.run_path / "bad_batches.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


# transformers stores the state of a callback under its class' name; checkpoints have this one as "Guard"
BadStepGuard.__name__ = STATE_KEY


class BadStepGuardMixin(Trainer):  # type: ignore[misc]
    """A mixin for Trainer that feeds its guard.

    The guard gets each batch's loss and each step's gradient norm.
    """

    guard: BadStepGuard | None = None

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*arguments, **options)
        if self.guard is not None:
            self.guard.batch_losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if hasattr(norm, "full_tensor"):  # under FSDP 2, where torch 2.9's item() gives the norm of this process' part alone
            norm = norm.full_tensor()
        if self.guard is not None:
            self.guard.device_grad_norm = norm
        return norm
