"""Asynchronous checkpoints: copied to memory at once, written by a thread.

A checkpoint is finalised when it is complete.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.constants import FSDP_MODEL_NAME
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME

from azrecipe.distributed import local_storage, process_group
from azrecipe.distributed.backend import Backend
from azrecipe.errors import RunFailed
from azrecipe.training import checkpoints

SHARDED_FOLDERS = (f"{FSDP_MODEL_NAME}_0", "optimizer_0")  # in a checkpoint of FSDP, as Accelerate names and reads them


def copy_to_cpu(value: Any, copies: dict[tuple[Any, ...], torch.Tensor] | None = None) -> Any:
    """Copy nested state to main memory.

    A tensor that occurs twice in it (a tied matrix) is copied once. Of a sharded tensor this process' shard is copied.
    """
    copies = {} if copies is None else copies
    if isinstance(value, torch.Tensor):
        local = value.to_local() if isinstance(value, DTensor) else value
        key = (local.data_ptr(), value.dtype, value.shape, value.stride())
        if key not in copies or not local.numel():
            copies[key] = value.detach().to("cpu", copy=True).contiguous()
        return copies[key]
    if isinstance(value, Mapping):
        return {name: copy_to_cpu(inner, copies) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copy_to_cpu(inner, copies) for inner in value)
    return value


class AsyncCheckpointWriter:
    """Writes one checkpoint at a time in a thread.

    `raise_if_failed` and `wait` raise what went wrong. Under FSDP each process has a writer, and their threads write the shards together.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.pending: dict[str, Any] = {}
        self.group = process_group.get_checkpoint_group() if backend.uses_fsdp else None
        self.thread: threading.Thread | None = None
        self.error: BaseException | None = None
        self.num_checkpoints = 0
        self.seconds_blocked = self.seconds_written = 0.0

    @property
    def is_collective(self) -> bool:
        """Whether the threads of all processes write a checkpoint together."""
        return self.group is not None

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
        self.thread = threading.Thread(target=self._write, args=(folder, pending, keep, remote_sizes or {}), name=f"write {folder.name}")
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
                if name in SHARDED_FOLDERS:
                    self._write_shards(state, folder / name)
            if self.is_collective:
                remote_sizes = self._write_together(folder, pending)
            else:
                _write_files(folder, pending)
            if self.backend.main:
                checkpoints.finalize(folder, self.backend, remote_sizes)
                checkpoints.rotate(folder.parent, keep)
        except BaseException as error:
            self.error = error
            if local_storage.is_writer(self.backend.main):
                shutil.rmtree(folder, ignore_errors=True)  # an incomplete one would take the disk space of the next
        self.seconds_written += time.monotonic() - started

    def _write_shards(self, state: dict[str, Any], folder: Path) -> None:
        """Write this process' shards and sync them, as the other processes do theirs.

        A failure of one process is raised in all of them.
        """
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        folder.mkdir(parents=True, exist_ok=True)
        save(state, storage_writer=FileSystemWriter(folder), process_group=self.group)

    def _write_together(self, folder: Path, pending: dict[str, Any]) -> dict[str, checkpoints.FileRecord]:
        """Write what is not sharded, and sync the other machines' files.

        Every process waits until all have written their own.

        Returns:
            The records of the files on other machines.

        Raises:
            Exception: A file of this process could not be written.
            RunFailed: One of another process could not.
        """
        records: dict[str, checkpoints.FileRecord] = {}
        failure: Exception | None = None
        try:
            _write_files(folder, pending)
            if local_storage.is_writer(self.backend.main) and not self.backend.main:
                records = checkpoints.sync_checkpoint(folder, self.backend)
        except Exception as error:  # whatever it is, the others wait for this process
            failure = error
        answers = local_storage.all_gather_object((records, str(failure or "")), self.group)
        if failure is not None:
            raise failure
        texts = [text for _, text in answers if text]
        if texts:
            raise RunFailed(f"{folder.name} could not be written by another process: {texts[0]}")
        return {name: record for files, _ in answers for name, record in files.items()}


def _write_files(folder: Path, pending: dict[str, Any]) -> None:
    """Write the copied files that are not sharded."""
    for name, state in pending.items():
        if name == SAFE_WEIGHTS_NAME:
            save_file(state, folder / name, metadata={"format": "pt"})
        elif name not in SHARDED_FOLDERS:
            torch.save(state, folder / name)


def create_checkpoint_writer(trainer: Trainer, backend: Backend, writes_shards: bool) -> AsyncCheckpointWriter | None:
    """Create what writes a trainer's checkpoints beside training; None where training waits.

    Args:
        trainer: The trainer.
        backend: How processes share the run. A collective under FSDP.
        writes_shards: Whether the shards of FSDP are written so.
    """
    if backend.sharded:
        plugin = trainer.accelerator.state.fsdp_plugin if backend.uses_fsdp and writes_shards else None
        if plugin is None or plugin.state_dict_type.name != "SHARDED_STATE_DICT":
            return None
    return AsyncCheckpointWriter(backend)


class AsyncCheckpointMixin(Trainer):  # type: ignore[misc]
    """A mixin for Trainer that writes checkpoints in a thread.

    Training waits for the copy off the device only. It is for a model that each process holds completely, and for FSDP's shards.
    `checkpoint_writer` is None for other backends: then the libraries write, and training waits. The callback's on_save starts the writing.
    """

    checkpoint_writer: AsyncCheckpointWriter | None = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Copy a checkpoint's weights; save anything else as usual."""
        if self.checkpoint_writer is None or not _internal_call:
            super().save_model(output_dir, _internal_call)
        elif self.checkpoint_writer.is_collective:
            self._copy_shards()
        elif self.args.should_save:
            model = self.accelerator.unwrap_model(self.model)
            self.checkpoint_writer.copy_state(SAFE_WEIGHTS_NAME, _drop_tied(model.state_dict()))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.checkpoint_writer is None:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            if not self.checkpoint_writer.is_collective:
                self.checkpoint_writer.copy_state(OPTIMIZER_NAME, self.optimizer.state_dict())
            self.checkpoint_writer.copy_state(SCHEDULER_NAME, self.lr_scheduler.state_dict())

    def _copy_shards(self) -> None:
        """Copy this process' shards of weights and optimizer state."""
        from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

        assert self.checkpoint_writer is not None
        weights_folder, optimizer_folder = SHARDED_FOLDERS
        self.checkpoint_writer.copy_state(weights_folder, {"model": get_model_state_dict(self.model)})
        self.checkpoint_writer.copy_state(optimizer_folder, {"optimizer": get_optimizer_state_dict(self.model, self.optimizer)})

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
