"""Knows a bad step when it sees one: a loss or a gradient that is not finite, or a spike; and which documents were in it.

Judged after the gradients of a step are whole and before they change a weight, from sums over all processes, so that all
judge alike.
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
from azrecipe.errors import AllFailed
from azrecipe.utils.console import say

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

HISTORY = 50  # losses that a spike is measured against
ENOUGH = 10  # fewer than so many say nothing about what is usual
MOST_SKIPPED = 5  # skipped steps in a row: the trouble is then not one batch

Documents = Callable[[int], list[dict[str, Any]]]


class Guard(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Stops a run at a bad step, or leaves the step out.

    `documents(sequence)` names what stands in a training sequence. What it has seen is kept in checkpoints, so that a run that goes on judges as one that never stopped.
    """

    def __init__(self, backend: Backend, run: Path, name: str, documents: Documents) -> None:
        self.backend, self.run, self.name, self.documents = backend, run, name, documents
        self.skip, self.factor = False, math.inf
        self.recent: deque[float] = deque(maxlen=HISTORY)
        self.skipped: list[int] = []
        self.losses: list[torch.Tensor] = []
        self.norm = 0.0
        self.trainer: GuardedTrainer | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this (transformers' ExportableState)."""
        return {"args": {}, "attributes": {"recent": list(self.recent), "skipped": self.skipped}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        kept = state.stateful_callbacks.setdefault("Guard", self.state())
        if state.global_step and isinstance(kept, dict):
            self.recent.extend(kept["attributes"]["recent"])
            self.skipped = list(kept["attributes"]["skipped"])

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self.trainer is not None
        self.losses = []
        self.before = self.trainer._tr_loss.clone()

    def on_pre_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        mine = torch.stack(self.losses)
        loss = self._mean(mine.sum())
        reason = self._reason(loss)
        if reason is None:
            self.recent.append(loss)
            return
        step = state.global_step
        self._write(step, reason, loss, mine)
        self.skipped.append(step)
        in_a_row = len(self.skipped) >= MOST_SKIPPED and self.skipped[-MOST_SKIPPED] == step - MOST_SKIPPED + 1
        where = f"{self.name}: {reason} at step {step + 1}; its documents are in {self.run / 'bad_batches.jsonl'}"
        if not self.skip or in_a_row:
            many = f" ({MOST_SKIPPED} steps in a row)" if in_a_row else ""
            advice = "Lower learning_rate, raise warmup_ratio, or leave those documents out" + (
                "" if self.skip else "; training.on_bad_loss=skip goes on without the step"
            )
            raise AllFailed(f"{where}{many}. The last checkpoint is kept. {advice}")
        say(f"  {where}. The step is skipped", self.backend.main)
        self._leave_out()

    def _leave_out(self) -> None:
        """No gradient, no change: an optimizer passes over parameters that have none, its moments included."""
        assert self.trainer is not None
        for parameter in self.trainer.model_wrapped.parameters():
            parameter.grad = None
        usual = self.recent[-1] if self.recent else 0.0
        self.trainer._tr_loss.copy_(self.before + usual)  # the mean that is logged next must not be NaN for a step left out

    def _reason(self, loss: float) -> str | None:
        if not math.isfinite(loss):
            return f"the loss is {loss}"
        if not math.isfinite(self.norm):
            return f"the gradient's norm is {self.norm}"
        usual = sum(self.recent) / len(self.recent) if len(self.recent) >= ENOUGH else math.inf
        if loss > self.factor * usual:
            return f"the loss is {loss:.3f}, {loss / usual:.1f} times the mean of the {len(self.recent)} steps before"
        return None

    def _mean(self, value: torch.Tensor) -> float:
        """The mean over the processes: the loss that is logged."""
        if self.backend.world > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
        return float(value) / self.backend.world

    def _write(self, step: int, reason: str, loss: float, mine: torch.Tensor) -> None:
        """A line of bad_batches.jsonl: each batch of the step with its part in the loss and its documents."""
        assert self.trainer is not None
        every = [mine.tolist()]
        if self.backend.world > 1:
            gathered: list[Any] = [None] * self.backend.world
            torch.distributed.all_gather_object(gathered, mine.tolist())
            every = gathered
        if not self.backend.main:
            return
        size, accumulation, context = self.trainer.args.per_device_train_batch_size, len(mine), self.backend.context
        batches = []
        for nth in range(accumulation):
            for reader in range(self.backend.readers):
                # sequences go to the processes batch by batch, in turn
                first = ((step * accumulation + nth) * self.backend.readers + reader) * size
                here = [{"sequence": first + i, "documents": self.documents(first + i)} for i in range(size)]
                parts = every[reader * context : (reader + 1) * context]
                share = sum(losses[nth] for losses in parts) / context * accumulation
                batches.append({"loss": share if math.isfinite(share) else str(share), "sequences": here})
        batches.sort(key=lambda batch: -batch["loss"] if isinstance(batch["loss"], float) else -math.inf)
        line = {"phase": self.name, "step": step + 1, "reason": reason, "loss": loss if math.isfinite(loss) else str(loss),
                "grad_norm": self.norm if math.isfinite(self.norm) else str(self.norm), "batches": batches}  # fmt: skip
        with (self.run / "bad_batches.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


class GuardedTrainer(Trainer):  # type: ignore[misc]
    """transformers.Trainer that shows its guard each batch's loss and each step's gradient norm."""

    guard: Guard | None = None

    def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*arguments, **more)
        if self.guard is not None:
            self.guard.losses.append(loss)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        if self.guard is not None:
            value = found.full_tensor() if hasattr(found, "full_tensor") else found
            self.guard.norm = float(value)
        return found
