"""Checkpoints that a thread writes: the state of their moment, equal to those written at once, and disks that fail; shards too."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from azrecipe.errors import CannotRun, explain_error
from azrecipe.training import checkpoints
from azrecipe.training.async_checkpoint import AsyncCheckpointWriter, copy_to_cpu
from azrecipe.training.monitor import TrainingMonitor
from tests.conftest import ROOT, Done
from tests.small import called
from tests.unit.training.small_trainer import (
    SINGLE,
    UNITS,
    AtStep,
    SmallTrainer,
    assert_equal,
    build_model,
    build_rows,
    build_trainer,
    copy_weights,
)

WORKER = Path(__file__).with_name("sharded_checkpoint_worker.py")
needs_cpu = pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here: these runs are for the CPU")
SAVING = {"save_strategy": "steps", "save_steps": 2}


def train(folder: Path, *, background: bool, extra: tuple[AtStep, ...] = (), resume: str | None = None, **arguments: Any) -> SmallTrainer:
    folder.mkdir(exist_ok=True)
    monitor = TrainingMonitor(SINGLE, folder, UNITS, keep_last=10)
    trainer = build_trainer(folder, build_rows(12), callbacks=[monitor, *extra], background=background, **SAVING, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def load(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def assert_same_state(left: Any, right: Any) -> None:
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_same_state(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right, strict=True):
            assert_same_state(one, other)
    else:
        assert left == right


def test_a_copy_has_the_numbers_of_its_moment() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    state = {"weight": weight, "nested": {"list": [weight[0], 3], "pair": (weight.T, "text")}, "none": None}
    copy = copy_to_cpu(state)
    weight.fill_(-1)
    assert torch.equal(copy["weight"], torch.arange(6.0).reshape(2, 3))
    assert torch.equal(copy["nested"]["list"][0], torch.arange(3.0)) and copy["nested"]["list"][1] == 3
    assert torch.equal(copy["nested"]["pair"][0], torch.arange(6.0).reshape(2, 3).T) and copy["nested"]["pair"][0].is_contiguous()
    assert isinstance(copy["nested"]["pair"], tuple) and copy["none"] is None


def test_a_tensor_that_occurs_twice_is_copied_once() -> None:
    weight = torch.ones(4, 4)
    copy = copy_to_cpu({"embeddings": weight, "head": weight, "rows": weight[:2], "turned": weight.T, "bits": weight.view(torch.int32)})
    assert copy["embeddings"] is copy["head"]
    assert copy["rows"].shape == (2, 4) and copy["bits"].dtype == torch.int32
    assert len({tensor.data_ptr() for tensor in copy.values()}) == 4
    empty = copy_to_cpu([torch.empty(0), torch.empty(0)])  # both have no address
    assert empty[0] is not empty[1]


def test_a_copied_state_needs_no_gradient() -> None:
    copy = copy_to_cpu({"weight": torch.nn.Parameter(torch.ones(2))})
    assert not copy["weight"].requires_grad


def test_a_written_checkpoint_is_complete_and_the_oldest_go(tmp_path: Path) -> None:
    writer = AsyncCheckpointWriter(SINGLE)
    for step in (1, 2, 3):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text("{}")
        weight = torch.full((3,), float(step))
        writer.copy_state("model.safetensors", {"weight": weight})
        writer.copy_state("optimizer.pt", {"state": {0: {"step": torch.tensor(float(step))}}})
        weight.zero_()  # training goes on
        writer.start_writing(folder, keep=2, remote_sizes={})
    writer.wait()
    assert [path.name for path in checkpoints.list_complete(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors")["weight"].tolist() == [3.0] * 3
    assert load(tmp_path / "checkpoint-2" / "optimizer.pt")["state"][0]["step"] == 2.0
    marker = json.loads((tmp_path / "checkpoint-3" / checkpoints.MARKER).read_text())
    assert marker.keys() == {"model.safetensors", "optimizer.pt", "trainer_state.json", checkpoints.BACKEND_FILE}
    assert writer.timings["checkpoints"] == 3 and writer.timings["seconds_written"] >= 0


def test_files_of_other_machines_are_listed(tmp_path: Path) -> None:
    writer = AsyncCheckpointWriter(SINGLE)
    (tmp_path / "checkpoint-1").mkdir()
    writer.copy_state("optimizer.pt", {})
    writer.start_writing(tmp_path / "checkpoint-1", 1, {"rng_state_1.pth": 9})
    writer.wait()
    assert json.loads((tmp_path / "checkpoint-1" / checkpoints.MARKER).read_text())["rng_state_1.pth"] == 9


def test_a_full_disk_is_said_once_and_leaves_no_checkpoint(tmp_path: Path) -> None:
    """/dev/full answers every write as a full disk does."""
    writer = AsyncCheckpointWriter(SINGLE)
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "optimizer.pt").symlink_to("/dev/full")
    writer.copy_state("optimizer.pt", {"state": torch.zeros(200_000)})
    writer.start_writing(folder, 1)
    with pytest.raises(Exception) as error:  # OSError or an error of PyTorch, by its version
        writer.wait()
    explained = explain_error(error.value)
    assert isinstance(explained, CannotRun) and "the disk is full" in str(explained)
    assert not folder.exists()
    writer.raise_if_failed()
    writer.wait()


@pytest.mark.parametrize("tied", [True, False])
def test_a_checkpoint_in_the_background_is_the_one_written_at_once(tmp_path: Path, tied: bool) -> None:
    folders = {background: tmp_path / str(background) for background in (False, True)}
    trainers = {background: train(folder, background=background, model=build_model(tied=tied)) for background, folder in folders.items()}
    assert_equal(copy_weights(trainers[True].model), copy_weights(trainers[False].model))
    for step in (2, 4, 6):
        plain, threaded = (folders[background] / "checkpoints" / f"checkpoint-{step}" for background in (False, True))
        assert checkpoints.is_complete(plain) and checkpoints.is_complete(threaded)
        assert_equal(load_file(threaded / "model.safetensors"), load_file(plain / "model.safetensors"))
        assert ("lm_head.weight" in load_file(threaded / "model.safetensors")) is not tied
        for name in ("optimizer.pt", "scheduler.pt"):
            assert_same_state(load(threaded / name), load(plain / name))
        assert (threaded / "rng_state.pth").exists()
    assert trainers[True].checkpoint_writer is not None and trainers[True].checkpoint_writer.timings["checkpoints"] == 3


def test_a_run_goes_on_from_a_checkpoint_in_the_background_exactly(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", background=True)
    train(tmp_path / "parts", background=True, max_steps=4)
    resumed = train(tmp_path / "parts", background=True, resume=str(tmp_path / "parts" / "checkpoints" / "checkpoint-4"))
    assert_equal(copy_weights(resumed.model), copy_weights(whole.model))
    assert_same_state(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_a_failed_checkpoint_ends_training_at_the_next_step(tmp_path: Path) -> None:
    """Something takes the place of the second checkpoint's file while the run goes on; the first checkpoint stays."""
    blocked = tmp_path / "checkpoints" / "checkpoint-4" / "optimizer.pt"
    steps: list[int] = []
    trainer: SmallTrainer

    def wait_for_the_thread() -> None:
        assert trainer.checkpoint_writer is not None and trainer.checkpoint_writer.thread is not None
        trainer.checkpoint_writer.thread.join()

    actions = [AtStep(3, lambda: blocked.mkdir(parents=True)), AtStep(5, wait_for_the_thread, begin=True)]
    actions += [AtStep(step, lambda step=step: steps.append(step)) for step in range(1, 7)]  # type: ignore[misc]
    monitor = TrainingMonitor(SINGLE, tmp_path, UNITS, keep_last=10)
    trainer = build_trainer(tmp_path, build_rows(12), callbacks=[monitor, *actions], background=True, **SAVING)
    with pytest.raises(Exception, match=r"Is a directory|cannot be opened"):
        trainer.train()
    assert steps == [1, 2, 3, 4]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["checkpoint-2"]
    assert checkpoints.is_complete(tmp_path / "checkpoints" / "checkpoint-2")


def test_a_model_that_is_saved_by_name_is_written_at_once(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path, build_rows(2), background=True)
    trainer.save_model(str(tmp_path / "final"))
    assert load_file(tmp_path / "final" / "model.safetensors").keys()
    assert trainer.checkpoint_writer is not None and not trainer.checkpoint_writer.pending


def start(mode: str, folder: Path) -> Done:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER), mode, str(folder)]
    return called(command, ROOT)


def read_answers(done: Done) -> list[dict[str, Any]]:
    assert done.code == 0, done.text
    answers: list[dict[str, Any]] = json.loads(done.out.splitlines()[-1])
    return answers


@needs_cpu
@pytest.mark.long
def test_a_sharded_checkpoint_is_the_one_written_at_once(tmp_path: Path) -> None:
    """And a kill while one is written, which a FIFO without a reader makes last for ever, leaves the one before."""
    for answer in read_answers(start("whole", tmp_path)):
        assert answer == {
            "same": True, "complete": ["checkpoint-2", "checkpoint-4", "checkpoint-6"], "checkpoints": 3, "resumed": True, "timeout": 7200,
        }  # fmt: skip
    killed = start("killed", tmp_path)
    assert killed.code != 0
    assert (tmp_path / "killed" / "checkpoints" / "checkpoint-4").exists()
    assert '"step": 5' in (tmp_path / "killed" / "metrics.jsonl").read_text()  # training went on
    for answer in read_answers(start("resumed", tmp_path)):
        assert answer == {"newest": "checkpoint-2", "same": True}


@needs_cpu
def test_a_full_disk_under_a_shard_ends_every_process_at_the_next_step(tmp_path: Path) -> None:
    """/dev/full answers the second process' writes as a full disk does; the checkpoint before stays."""
    for answer in read_answers(start("full", tmp_path)):
        name, message = answer["error"]
        assert name == "CannotRun" and "the disk is full" in message
        assert answer["left"] == ["checkpoint-2"]
    assert not (tmp_path / "full" / "checkpoints" / "checkpoint-4").exists()
