"""Asynchronous checkpoints: copied to memory at once, written by a thread.

A checkpoint is finalised when it is complete.
"""

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


def copy_to_cpu(value: Any, copies: dict[tuple[Any, ...], torch.Tensor] | None = None) -> Any:
    """Copy nested state to main memory.

    A tensor that occurs twice in it (a tied matrix) is copied once.
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        key = (value.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in copies or not value.numel():
            copies[key] = value.detach().to("cpu", copy=True).contiguous()
        return copies[key]
    if isinstance(value, Mapping):
        return {name: copy_to_cpu(inner, copies) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(inner, copies) for inner in value)
    return value


class AsyncCheckpointWriter:
    """Writes one checkpoint at a time in a thread.

    `raise_if_failed` and `wait` raise what went wrong.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pending: dict[str, Any] = {}
        self.thread: Thread | None = None
        self.error: BaseException | None = None
        self.num_checkpoints = 0
        self.seconds_blocked = self.seconds_written = 0.0

    def copy_state(self, name: str, state: Any) -> None:
        """Copy the content of the next checkpoint's file `name`.

        It waits for the checkpoint before.
        """
        started = time.monotonic()
        self.wait()
        self.pending[name] = copy_to_cpu(state)
        self.seconds_blocked += time.monotonic() - started

    def start_writing(self, folder: Path, keep: int, remote_sizes: Mapping[str, checkpoints.FileRecord] | None = None) -> None:
        """Write the copied files into a checkpoint folder and finalise it.

        Then all but the newest checkpoints are deleted.

        Args:
            folder: The checkpoint's folder.
            keep: How many checkpoints stay.
            remote_sizes: Records of the files on other machines, as `checkpoints.finalize` takes them.
        """
        pending, self.pending = self.pending, {}
        self.num_checkpoints += 1
        self.thread = Thread(target=self._write, args=(folder, pending, keep, remote_sizes or {}), name=f"write {folder.name}")
        self.thread.start()

    def raise_if_failed(self) -> None:
        """Raise what went wrong, without waiting."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def wait(self) -> None:
        """Wait until the checkpoint is complete on disk."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        self.raise_if_failed()

    @property
    def timings(self) -> dict[str, float]:
        """The number of checkpoints and their seconds.

        `seconds_blocked` is how long training waited, `seconds_written` how long the threads wrote.
        """
        return {
            "checkpoints": self.num_checkpoints,
            "seconds_blocked": round(self.seconds_blocked, 3),
            "seconds_written": round(self.seconds_written, 3),
        }

    def _write(self, folder: Path, pending: dict[str, Any], keep: int, remote_sizes: Mapping[str, checkpoints.FileRecord]) -> None:
        started = time.monotonic()
        try:
            for name, state in pending.items():
                if name == SAFE_WEIGHTS_NAME:
                    save_file(state, folder / name, metadata={"format": "pt"})
                else:
                    torch.save(state, folder / name)
            checkpoints.finalize(folder, self.backend, remote_sizes)
            checkpoints.rotate(folder.parent, keep)
        except BaseException as error:
            self.error = error
            shutil.rmtree(folder, ignore_errors=True)  # an incomplete one would take the disk space of the next
        self.seconds_written += time.monotonic() - started


class AsyncCheckpointMixin(Trainer):  # type: ignore[misc]
    """A mixin for Trainer that writes checkpoints in a thread.

    Training waits for the copy off the device only. It is for a model that each process holds completely. `checkpoint_writer` is None
    where the backend shards the model: then the libraries write, and training waits. The callback's on_save starts the writing.
    """

    checkpoint_writer: AsyncCheckpointWriter | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Copy a checkpoint's weights; save anything else as usual."""
        if self.checkpoint_writer is None or not _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            self.checkpoint_writer.copy_state(SAFE_WEIGHTS_NAME, _drop_tied(model.state_dict()))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.checkpoint_writer is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            self.checkpoint_writer.copy_state(OPTIMIZER_NAME, self.optimizer.state_dict())
            self.checkpoint_writer.copy_state(SCHEDULER_NAME, self.lr_scheduler.state_dict())

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        """Train one batch; a failed checkpoint ends the run here."""
        if self.checkpoint_writer is not None:
            self.checkpoint_writer.raise_if_failed()
        loss: torch.Tensor = super().training_step(*arguments, **options)
        return loss

    def train(self, *arguments: Any, **options: Any) -> Any:
        """Train, and wait until the last checkpoint is complete on every process.

        A launcher ends the other processes when one leaves.
        """
        try:
            output = super().train(*arguments, **options)
        finally:
            if self.checkpoint_writer is not None:
                self.checkpoint_writer.wait()
        self.accelerator.wait_for_everyone()
        return output


def _drop_tied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Keep each stored matrix under its first name only.

    safetensors needs this, and transformers ties the matrices again.
    """
    first_names: dict[tuple[int, int], str] = {}
    return {name: tensor for name, tensor in state.items() if first_names.setdefault((tensor.data_ptr(), tensor.numel()), name) == name}
