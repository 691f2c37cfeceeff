"""Checkpoints written while training goes on: copied in memory at once, written by a thread, sealed when they are whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from azrecipe.distributed.backend import Backend
from azrecipe.training import checkpoints


def copied(value: Any, seen: dict[tuple[Any, ...], torch.Tensor] | None = None) -> Any:
    """A copy in main memory of nested state; a tensor that stands in it twice (a tied matrix) is copied once."""
    seen = {} if seen is None else seen
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in seen or not value.numel():
            seen[key] = value.detach().to("cpu", copy=True).contiguous()
        return seen[key]
    if isinstance(value, Mapping):
        return {name: copied(inner, seen) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(inner, seen) for inner in value)
    return value


class Saver:
    """One checkpoint on its way to disk at a time. What goes wrong on the way is raised by `check` and `wait`."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pending: dict[str, Any] = {}
        self.thread: Thread | None = None
        self.error: BaseException | None = None
        self.count = 0
        self.blocked = self.written = 0.0

    def take(self, name: str, state: Any) -> None:
        """Copy what the file `name` of the next checkpoint will hold. Waits for the checkpoint before it."""
        started = time.monotonic()
        self.wait()
        self.pending[name] = copied(state)
        self.blocked += time.monotonic() - started

    def start(self, folder: Path, keep: int, elsewhere: Mapping[str, int] | None = None) -> None:
        """Write what was taken into a checkpoint folder, seal it (`elsewhere`: as `seal` has it), and then delete all but the newest `keep`."""
        pending, self.pending = self.pending, {}
        self.count += 1
        self.thread = Thread(target=self._write, args=(folder, pending, keep, elsewhere or {}), name=f"write {folder.name}")
        self.thread.start()

    def check(self) -> None:
        """Raise what has gone wrong, without waiting."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Wait until the checkpoint is whole on disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.check()

    @property
    def seconds(self) -> dict[str, float]:
        """How many checkpoints, how long training stood still for them, how long their writing took beside it."""
        return {"checkpoints": self.count, "seconds_blocked": round(self.blocked, 3), "seconds_written": round(self.written, 3)}

    def _write(self, folder: Path, pending: dict[str, Any], keep: int, elsewhere: Mapping[str, int]) -> None:
        started = time.monotonic()
        try:
            for name, state in pending.items():
                if name == SAFE_WEIGHTS_NAME:
                    save_file(state, folder / name, metadata={"format": "pt"})
                else:
                    torch.save(state, folder / name)
            checkpoints.seal(folder, self.backend, elsewhere)
            checkpoints.rotate(folder.parent, keep)
        except BaseException as error:
            self.error = error
            shutil.rmtree(folder, ignore_errors=True)  # what is left of it would take the room that the next one needs
        self.written += time.monotonic() - started


class BackgroundSaving(Trainer):  # type: ignore[misc]
    """transformers.Trainer whose checkpoints block training no longer than the copy off the parameters.

    For a model that each process holds whole. `saver` is None where the backend shards it: there the libraries write, and
    training waits. The callback that answers on_save starts the writing.
    """

    saver: Saver | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Take the weights of a checkpoint; anything else is saved as ever."""
        if self.saver is None or not _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
            self.saver.take(SAFE_WEIGHTS_NAME, _without_ties(model.state_dict()))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.saver is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            self.saver.take(OPTIMIZER_NAME, self.optimizer.state_dict())
            self.saver.take(SCHEDULER_NAME, self.lr_scheduler.state_dict())

    def training_step(self, *arguments: Any, **more: Any) -> torch.Tensor:
        """One batch; a checkpoint that could not be written ends the run here rather than hours later."""
        if self.saver is not None:
            self.saver.check()
        loss: torch.Tensor = super().training_step(*arguments, **more)
        return loss

    def train(self, *arguments: Any, **more: Any) -> Any:
        """Train; the last checkpoint is whole when this returns, on every process: a launcher ends the others when one leaves."""
        try:
            done = super().train(*arguments, **more)
        finally:
            if self.saver is not None:
                self.saver.wait()
        self.accelerator.wait_for_everyone()
        return done


def _without_ties(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each stored matrix under its first name only, as safetensors wants it and transformers ties it again."""
    first: dict[tuple[int, int], str] = {}
    return {name: tensor for name, tensor in state.items() if first.setdefault((tensor.data_ptr(), tensor.numel()), name) == name}
