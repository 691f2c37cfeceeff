"""Two processes (torchrun, gloo) share checkpoints or steps; rank 0 prints what each of them has.

python -m torch.distributed.run --nproc-per-node 2 two_processes.py checkpoints|steps|signal FOLDER
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerControl, TrainerState, TrainingArguments

from azrecipe.distributed.backend import Backend
from azrecipe.distributed.local_storage import all_gather_object
from azrecipe.errors import CannotRun
from azrecipe.training import checkpoints
from azrecipe.training.bad_step_guard import BadStepGuard
from azrecipe.training.monitor import LoopUnits, TrainingMonitor
from azrecipe.training.stop_signal import SignalExchange
from tests.unit.training.test_checkpoints import write_checkpoint


def share_checkpoints(folder: Path, rank: int) -> dict[str, Any]:
    """Each process has a folder of its own, as machines without shared storage have."""
    os.environ |= {"AZRECIPE_STORAGE": "local", "LOCAL_RANK": "0"}  # each is the first process of its machine
    here = folder / f"machine{rank}"
    for step in (2, 4):
        write_checkpoint(here, step)
    answers: dict[str, Any] = {"same": checkpoints.find_latest_common(here).path}
    if rank == 1:
        (here / "checkpoint-4" / "model.safetensors").unlink()
    answers["one is behind"], answers["warning"] = checkpoints.find_latest_common(here)
    if rank == 0:
        checkpoints.remove_after(here, 2)
    checkpoints.mirror_deletions(here, rank == 0)
    answers["left"] = sorted(path.name for path in here.iterdir())
    (here / "checkpoint-2" / ("model.safetensors" if rank else "state/optimizer.pt")).unlink()
    try:
        answers["scattered"] = checkpoints.find_latest_common(here).path
    except CannotRun as error:
        answers["scattered"] = str(error)
    return answers


def share_steps(folder: Path, rank: int) -> dict[str, Any]:
    """One process gets a signal in the third step, and a loss of NaN in the second."""
    backend = Backend("ddp", 2, rank, replicate_size=2)
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, per_device_train_batch_size=1)
    monitor = TrainingMonitor(backend, folder, LoopUnits("phase", 8, lambda step: step), keep_last=1)
    guard = BadStepGuard(backend, folder, "phase", lambda sequence: [{"document": sequence}])
    guard.skip_bad_steps = True
    guard.trainer = Steps()  # type: ignore[assignment]
    stopped = 0
    with monitor:
        for step in range(1, 6):
            state, control = TrainerState(global_step=step - 1), TrainerControl()
            guard.on_step_begin(arguments, state, control)
            guard.batch_losses.append(torch.tensor(torch.nan if (rank, step) == (1, 2) else float(rank + step)))
            guard.on_pre_optimizer_step(arguments, state, control)
            if (rank, step) == (1, 3):
                os.kill(os.getpid(), signal.SIGTERM)
            state.global_step = step
            monitor.on_step_end(arguments, state, control)
            if control.should_training_stop and control.should_save:
                stopped = step
                break
    return {"stopped": stopped, "signal": monitor.shared_signal, "losses": list(guard.recent_losses), "skipped": guard.skipped_steps}


def share_signal(folder: Path, rank: int) -> dict[str, Any]:
    """One process gets signals; the answers of each step, by what the step does."""
    exchange = SignalExchange(torch.device("cpu"))
    later = [exchange.exchange(15 if (rank, step) == (1, 2) else 0, at_once=False) for step in range(4)]
    at_once = exchange.exchange(2 * rank, at_once=True)
    return {"later": later, "at once": at_once, "after": exchange.exchange(0, at_once=False)}


class Steps:
    """What the guard reads of a Trainer."""

    def __init__(self) -> None:
        self._tr_loss = torch.tensor(0.0)
        self.model_wrapped = torch.nn.Linear(2, 2)
        self.args = TrainingArguments(output_dir=".", report_to="none", use_cpu=True, per_device_train_batch_size=1)


def main(name: str, folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    actions: dict[str, Callable[[Path, int], dict[str, Any]]] = {
        "checkpoints": share_checkpoints,
        "steps": share_steps,
        "signal": share_signal,
    }
    answers = all_gather_object(actions[name](folder, rank))
    if rank == 0:
        print(json.dumps(answers, default=str))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
