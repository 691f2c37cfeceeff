"""Two processes (torchrun, FSDP 2, gloo) write checkpoints while they train; rank 0 prints what became of it.

python -m torch.distributed.run --nproc-per-node 2 sharded_checkpoint_worker.py whole|killed|resumed|full FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState

from azrecipe.distributed import process_group
from azrecipe.distributed.local_storage import all_gather_object
from azrecipe.errors import explain_error
from azrecipe.training import checkpoints
from azrecipe.training.async_checkpoint import SHARDED_FOLDERS, create_checkpoint_writer
from azrecipe.training.monitor import TrainingMonitor
from azrecipe.training.trainer import gather_state_dict
from tests.unit.training.fsdp_worker import set_up_fsdp
from tests.unit.training.small_trainer import UNITS, AtStep, SmallTrainer, build_model, build_rows, build_trainer

BACKEND = set_up_fsdp()


def train(folder: Path, *, background: bool, resume: Path | None = None, extra: tuple[AtStep, ...] = ()) -> SmallTrainer:
    """Six steps, a checkpoint after each second one."""
    if BACKEND.main:
        folder.mkdir(exist_ok=True)
    dist.barrier()
    monitor = TrainingMonitor(BACKEND, folder, UNITS, keep_last=10)
    trainer = build_trainer(
        folder, build_rows(12), model=build_model(num_hidden_layers=2), callbacks=[monitor, *extra],
        use_cpu=False, per_device_train_batch_size=1, save_strategy="steps", save_steps=2,
    )  # fmt: skip
    trainer.checkpoint_writer = create_checkpoint_writer(trainer, BACKEND, background)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer


def gather(trainer: SmallTrainer) -> dict[str, torch.Tensor]:
    state = gather_state_dict(trainer, BACKEND)
    assert state is not None
    return {name: value.clone() for name, value in state.items()}


def place(checkpoint: Path, file: str, target: str | None) -> None:
    """Put a link, or a FIFO whose reader never comes, in the place of a file that is written later."""
    path = checkpoint / file
    path.parent.mkdir(parents=True)
    if target is None:
        os.mkfifo(path)
    else:
        path.symlink_to(target)


def is_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def main(mode: str, folder: Path) -> None:
    PartialState()
    answers: dict[str, Any] = {}
    checkpoint = folder / mode / "checkpoints" / "checkpoint-4"
    if mode == "whole":
        whole = train(folder / "at once", background=False)
        beside = train(folder / mode, background=True)
        assert beside.checkpoint_writer is not None
        answers["same"] = is_equal(gather(whole), gather(beside))
        answers["complete"] = [path.name for path in checkpoints.list_complete(checkpoint.parent)]
        answers["checkpoints"] = beside.checkpoint_writer.timings["checkpoints"]
        resumed = {name: gather(train(folder / mode, background=True, resume=path)) for name, path in (
            ("at once", folder / "at once" / "checkpoints" / "checkpoint-4"), ("beside", checkpoint))}  # fmt: skip
        answers["resumed"] = is_equal(resumed["at once"], resumed["beside"]) and is_equal(resumed["beside"], gather(whole))
        process_group.set_timeout(60)  # of a step, which is no limit for a disk
        options = process_group.get_checkpoint_group()._get_backend(torch.device("cpu")).options
        answers["timeout"] = options._timeout.total_seconds()
        state = gather(whole)
        if BACKEND.main:
            torch.save(state, folder / "whole.pt")
    elif mode == "killed":
        extra = (
            AtStep(3, lambda: place(checkpoint, f"{SHARDED_FOLDERS[1]}/__1_0.distcp", None) if BACKEND.main else None),
            AtStep(6, lambda: os.kill(os.getpid(), signal.SIGKILL)),
        )
        train(folder / mode, background=True, extra=extra)
    elif mode == "resumed":
        newest, _ = checkpoints.find_latest_common(folder / "killed" / "checkpoints")
        answers["newest"] = newest.name if newest else None
        dist.barrier()
        if BACKEND.main:
            checkpoints.remove_incomplete(folder / "killed" / "checkpoints")
        state = gather(train(folder / "killed", background=True, resume=newest))
        answers["same"] = not BACKEND.main or is_equal(state, torch.load(folder / "whole.pt", weights_only=True))
    else:
        place_full = AtStep(3, lambda: place(checkpoint, f"{SHARDED_FOLDERS[0]}/__1_0.distcp", "/dev/full") if BACKEND.main else None)
        try:
            train(folder / mode, background=True, extra=(place_full,))
        except BaseException as error:
            explained = explain_error(error)
            answers["error"] = [type(explained).__name__, str(explained)]
        answers["left"] = [path.name for path in checkpoints.list_complete(checkpoint.parent)]
    gathered = all_gather_object(answers)
    if BACKEND.main:
        print(json.dumps(gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
