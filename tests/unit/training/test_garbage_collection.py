"""Garbage is collected between steps: the losses stay, no tensors pile up, and Python's own collection comes back."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.training import garbage_collection
from azrecipe.training.garbage_collection import GarbageCollection
from tests.unit.training.small_trainer import AtStep, SmallTrainer, assert_equal, build_rows, build_trainer, copy_weights


def count_tensor_bytes() -> int:
    """Bytes of tensors that are not frozen, reachable or not."""
    return sum(each.untyped_storage().nbytes() for each in gc.get_objects() if type(each) is torch.Tensor)


def train(folder: Path, steps: int, *callbacks: Any) -> SmallTrainer:
    trainer = build_trainer(folder, build_rows(2 * steps), callbacks=list(callbacks), logging_steps=steps)
    trainer.train()
    return trainer


def test_training_is_the_same_and_no_tensors_pile_up(tmp_path: Path) -> None:
    usual = train(tmp_path / "usual", 20)
    sizes: dict[int, int] = {}
    enabled: list[bool] = []
    watches = [AtStep(step, lambda step=step: sizes.update({step: count_tensor_bytes()})) for step in (5, 20)]  # type: ignore[misc]
    with GarbageCollection() as collection:
        controlled = train(tmp_path / "controlled", 20, collection, *watches, AtStep(7, lambda: enabled.append(gc.isenabled())))
        assert gc.get_freeze_count() > 0
    assert_equal(copy_weights(controlled.model), copy_weights(usual.model))
    assert enabled == [False]
    assert sizes[20] <= sizes[5]
    assert gc.isenabled() and gc.get_freeze_count() == 0


def test_young_garbage_goes_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(garbage_collection, "STEPS_BETWEEN", 4)
    alive: dict[int, bool] = {}
    made: list[Any] = []

    class Node:
        """An object that refers to itself."""

        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            made.append("gone")

    make = AtStep(2, lambda: Node() and None)
    watches = [AtStep(step, lambda step=step: alive.update({step: not made})) for step in (3, 5)]  # type: ignore[misc]
    with GarbageCollection() as collection:
        train(tmp_path, 6, collection, make, *watches)
    assert alive == {3: True, 5: False}


def test_a_loop_that_fails_leaves_python_s_own_collection(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("a step fails")

    with pytest.raises(RuntimeError, match="a step fails"), GarbageCollection() as collection:
        train(tmp_path, 4, collection, AtStep(3, fail))
    assert gc.isenabled() and gc.get_freeze_count() == 0
