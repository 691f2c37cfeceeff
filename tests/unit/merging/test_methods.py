"""Merging one tensor of several models: against the formulas written out."""

from __future__ import annotations

import math

import pytest
import torch

from azrecipe.merging import methods
from azrecipe.merging.methods import MergeMethod, merge_tensors


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows for the small tensors of these tests."""
    monkeypatch.setattr(methods, "BLOCK_NUMBERS", 20)


def draw(seed: int, shape: tuple[int, ...] = (13, 7)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_linear_is_the_weighted_mean() -> None:
    first, second, third = draw(1), draw(2), draw(3)
    merged = merge_tensors(MergeMethod("linear"), [first, second, third], [1.0, 2.0, 5.0])
    torch.testing.assert_close(merged, (first + 2 * second + 5 * third) / 8)


def test_slerp_moves_on_the_circle() -> None:
    first, second = draw(1), draw(2)
    second = second / second.norm() * first.norm()
    merged = merge_tensors(MergeMethod("slerp"), [first, second], [3.0, 1.0])
    assert float(merged.norm()) == pytest.approx(float(first.norm()), rel=1e-5)
    angles = [math.acos(float((merged * end).sum() / merged.norm() / end.norm())) for end in (first, second)]
    assert angles[1] == pytest.approx(3 * angles[0], rel=1e-4)


def test_slerp_of_colinear_tensors_is_linear() -> None:
    first = draw(1)
    merged = merge_tensors(MergeMethod("slerp"), [first, 2 * first], [1.0, 1.0])
    torch.testing.assert_close(merged, 1.5 * first)


def test_task_arithmetic_adds_the_differences() -> None:
    base, first, second = draw(0), draw(1), draw(2)
    merged = merge_tensors(MergeMethod("task_arithmetic"), [first, second], [1.0, 0.5], base)
    torch.testing.assert_close(merged, first + 0.5 * (second - base))


def test_ties_keeps_the_largest_and_the_elected_sign() -> None:
    base = torch.zeros(1, 4)
    first, second = torch.tensor([[3.0, -2.0, 0.1, 1.0]]), torch.tensor([[1.0, 4.0, -3.0, 0.2]])
    # Density 1/2 keeps 3 and -2 of the first, 4 and -3 of the second. Elected: +, +, -, and + of nothing.
    merged = merge_tensors(MergeMethod("ties", density=0.5), [first, second], [1.0, 1.0], base)
    torch.testing.assert_close(merged, torch.tensor([[3.0, 4.0, -3.0, 0.0]]))


def test_ties_averages_what_agrees_by_weight() -> None:
    base = torch.ones(1, 2)
    first, second = base + torch.tensor([[2.0, 1.0]]), base + torch.tensor([[4.0, -2.0]])
    merged = merge_tensors(MergeMethod("ties"), [first, second], [1.0, 3.0], base)
    torch.testing.assert_close(merged, base + torch.tensor([[(2.0 + 12.0) / 4, -2.0]]))


def test_dare_keeps_the_mean_and_repeats_itself() -> None:
    base, first = torch.zeros(400, 50), torch.ones(400, 50)
    method = MergeMethod("dare_ties", density=0.25, seed=7)
    merged = merge_tensors(method, [first], [1.0], base, salt=1)
    assert set(merged.unique().tolist()) == {0.0, 4.0}
    assert float(merged.mean()) == pytest.approx(1.0, abs=0.05)
    assert torch.equal(merged, merge_tensors(method, [first], [1.0], base, salt=1))
    assert not torch.equal(merged, merge_tensors(method, [first], [1.0], base, salt=2))


@pytest.mark.parametrize("name", ["linear", "slerp", "task_arithmetic", "ties"])
def test_blocks_do_not_change_the_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, base = [draw(1), draw(2)], draw(0)
    by_blocks = merge_tensors(MergeMethod(name, density=0.4), tensors, [1.0, 2.0], base)
    monkeypatch.setattr(methods, "BLOCK_NUMBERS", 1 << 20)
    torch.testing.assert_close(by_blocks, merge_tensors(MergeMethod(name, density=0.4), tensors, [1.0, 2.0], base))


def test_scalars_and_half_types_merge() -> None:
    scalar = merge_tensors(MergeMethod("linear"), [torch.tensor(1.0), torch.tensor(3.0)], [1.0, 1.0])
    assert scalar.shape == () and float(scalar) == 2.0
    half = merge_tensors(MergeMethod("linear"), [draw(1).bfloat16(), draw(2).bfloat16()], [1.0, 1.0])
    assert half.dtype == torch.float32
