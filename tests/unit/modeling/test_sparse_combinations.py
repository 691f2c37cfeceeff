"""Sums of other vectors, against slow and plain references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from azrecipe.modeling import sparse_combinations
from azrecipe.modeling.sparse_combinations import SparseCombinations, combine_by_pursuit, combine_by_sparsemax, sparsemax


def projected(scores: np.ndarray) -> np.ndarray:
    """Sparsemax by bisection for the threshold whose weights add up to 1: no sorting, no support."""
    low, high = scores.max() - 1.0, scores.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(scores - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(scores - low, 0)


def dense(ids: torch.Tensor, weights: torch.Tensor, width: int) -> np.ndarray:
    return torch.zeros(len(ids), width, dtype=weights.dtype).scatter_add_(1, ids, weights).numpy()


@settings(deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 90),
    st.sampled_from([1, 2, 7, 64, 1000]),
    st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 20.0]),
    st.integers(0, 2**31),
)
def test_sparsemax_is_the_projection_however_few_scores_are_looked_at_first(
    rows: int, width: int, first: int, scale: float, seed: int
) -> None:
    scores = torch.from_numpy(np.random.default_rng(seed).normal(0, scale, (rows, width))).float()
    if seed % 3 == 0:
        scores = (scores / scale).round() * scale  # ties
    found = dense(*sparsemax(scores, first), width)
    for row, wanted in zip(found, scores.double().numpy(), strict=True):
        np.testing.assert_allclose(row, projected(wanted), atol=1e-9)
        assert abs(row.sum() - 1) < 1e-9


def test_a_support_larger_than_what_is_looked_at_first_is_found_row_by_row() -> None:
    scores = torch.rand(3, 5000, generator=torch.Generator().manual_seed(1)) * 1e-4  # 5,000 weights of almost 1/5,000
    scores[1, 17] = 2.0  # and one row where a single one takes all
    found = dense(*sparsemax(scores), 5000)
    assert ((found > 0).sum(1) == [5000, 1, 5000]).all()
    for row, wanted in zip(found, scores.double().numpy(), strict=True):
        np.testing.assert_allclose(row, projected(wanted), atol=1e-9)


def unit(generator: np.random.Generator, *shape: int) -> np.ndarray:
    vectors = generator.normal(size=shape)
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def pursued(target: np.ndarray, atoms: np.ndarray, picks: int) -> np.ndarray:
    """Orthogonal matching pursuit as the textbook has it, each least squares solved afresh."""
    picked: list[int] = []
    left = target
    for _ in range(picks):
        picked.append(int(np.argmax(np.abs(atoms @ left))))
        solution = np.linalg.lstsq(atoms[picked].T, target, rcond=None)[0]
        left = target - solution @ atoms[picked]
    weights = np.zeros(len(atoms))
    weights[picked] = solution
    return weights


def rebuilt(sums: SparseCombinations, atoms: np.ndarray) -> np.ndarray:
    return sums.apply(torch.from_numpy(atoms)).numpy()


@pytest.mark.parametrize("picks", [1, 3, 12])
def test_pursuit_picks_and_weighs_as_the_textbook_does(monkeypatch: pytest.MonkeyPatch, picks: int) -> None:
    monkeypatch.setattr(sparse_combinations, "MAX_BLOCK_ELEMENTS", 300)  # blocks of a few targets
    generator = np.random.default_rng(3)
    atoms, targets = unit(generator, 60, 24), unit(generator, 25, 24)
    sums = combine_by_pursuit(torch.from_numpy(targets), torch.from_numpy(atoms), picks)
    wanted = np.stack([pursued(target.astype(float), atoms.astype(float), picks) for target in targets])
    np.testing.assert_allclose(sums.apply(torch.eye(60)).numpy(), wanted, atol=2e-4)


def test_pursuit_stops_when_nothing_is_left_and_at_atoms_that_say_nothing_new() -> None:
    generator = np.random.default_rng(4)
    atoms = unit(generator, 5, 16)
    atoms = np.concatenate([atoms, atoms + 1e-6 * generator.normal(size=atoms.shape).astype(np.float32)])  # each twice, almost
    inside = 0.6 * atoms[0] - 0.8 * atoms[3]
    outside = unit(generator, 16)
    targets = np.stack([atoms[2], inside / np.linalg.norm(inside), outside])
    sums = combine_by_pursuit(torch.from_numpy(targets), torch.from_numpy(atoms), 10)
    assert (sums.offsets.diff()[:2] <= torch.tensor([1, 3])).all()
    np.testing.assert_allclose(rebuilt(sums, atoms)[:2], targets[:2], atol=1e-3)
    assert sums.weights.abs().max() < 10
    best = atoms[:5].T @ np.linalg.lstsq(atoms[:5].T.astype(float), outside.astype(float), rcond=None)[0]
    assert np.linalg.norm(outside - rebuilt(sums, atoms)[2]) < np.linalg.norm(outside - best) + 1e-3


def test_parts_of_sums_are_the_sums_and_none_may_be_asked_for() -> None:
    generator = np.random.default_rng(5)
    atoms, targets = torch.from_numpy(unit(generator, 40, 8)), torch.from_numpy(unit(generator, 11, 8))
    sums = combine_by_sparsemax(targets, atoms)
    rows = torch.randn(40, 6)
    assert torch.equal(torch.cat([sums.slice(first, 4).apply(rows) for first in (0, 4, 8)]), sums.apply(rows))
    assert combine_by_sparsemax(targets[:0], atoms).apply(rows).shape == (0, 6)
