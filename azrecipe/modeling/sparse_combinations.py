"""Knows how a vector is written as a weighted sum of others: sparsemax over similarities, and orthogonal matching pursuit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

FIRST = 64  # similarities that sparsemax looks at first; rarely more carry weight
BLOCK = 1 << 24  # numbers in the largest matrix held at a time
DEPENDENT = 1e-4  # an atom with less than this outside the span of those picked says nothing new, and would weigh without bound


@dataclass(frozen=True)
class Sums:
    """Weighted sums, one after the other: sum i has `ids` and `weights` from offsets[i] to offsets[i + 1]. On the CPU.

    offsets int64 [n + 1], ids int64 [all], weights float32 [all].
    """

    offsets: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def part(self, first: int, count: int) -> Sums:
        """The sums from number `first` on, at most `count` of them."""
        offsets = self.offsets[first : first + count + 1]
        start, end = int(offsets[0]), int(offsets[-1])
        return Sums(offsets - start, self.ids[start:end], self.weights[start:end])

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """The sums of `rows` [more than any id, width] float32: [n, width]."""
        return torch.nn.functional.embedding_bag(
            self.ids, rows, self.offsets, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )


def sparsemax_sums(targets: torch.Tensor, atoms: torch.Tensor) -> Sums:
    """FOCUS (Dobler and de Melo 2023, arXiv 2305.14481): the atoms weighted by sparsemax of their cosines with each target.

    targets [n, dim] and atoms [m ≥ 1, dim], both float32 of length one. Ids are rows of `atoms`; weights are positive and
    add up to 1.
    """
    found = [_nonzero(*sparsemax(part @ atoms.T)) for part in _blocks(targets, len(atoms))]
    return _joined(found)


def sparsemax(scores: torch.Tensor, first: int = FIRST) -> tuple[torch.Tensor, torch.Tensor]:
    """The projection of each row of `scores` [n, m] onto the simplex (Martins and Astudillo 2016, arXiv 1602.02068), exact.

    Returns ids and weights float64, [n, k] each, weight 0 where a row has fewer than k. With z sorted downwards the support is
    {i : 1 + i z_i > Σ_{j≤i} z_j}, a beginning of the order: where the condition fails within the `first` largest, nothing
    beyond them belongs to it; for the rows where it does not fail, more are sorted.
    """
    size = min(first, scores.shape[1])
    values, ids = scores.topk(size)
    ordered = values.double()
    sums = ordered.cumsum(1)
    inside = 1 + torch.arange(1, size + 1) * ordered > sums
    support = inside.sum(1, keepdim=True)
    weights = (ordered - (sums.gather(1, support - 1) - 1) / support).clamp(min=0)
    if size == scores.shape[1]:
        return ids, weights
    open_ended = inside[:, -1].nonzero()[:, 0]
    if not len(open_ended):
        return ids, weights
    more_ids, more_weights = sparsemax(scores[open_ended], 4 * first)
    beyond = more_ids.shape[1] - size
    ids, weights = (torch.nn.functional.pad(part, (0, beyond)) for part in (ids, weights))
    ids[open_ended], weights[open_ended] = more_ids, more_weights
    return ids, weights


def pursuit_sums(targets: torch.Tensor, atoms: torch.Tensor, picks: int) -> Sums:
    """Orthogonal matching pursuit (as arXiv 2506.06607 uses it): each target as a sum of at most `picks` atoms.

    targets [n, dim] and atoms [m ≥ 1, dim], both float32 of length one. Again and again the atom with the largest |inner product|
    with what is left is picked, and the weights of all picked so far are the least squares; until nothing is left or the
    next atom would depend on them. Ids are rows of `atoms`.
    """
    picks = min(picks, *atoms.shape)
    found = [_nonzero(*_pursuit(part, atoms, picks)) for part in _blocks(targets, len(atoms))]
    return _joined(found)


def _pursuit(targets: torch.Tensor, atoms: torch.Tensor, picks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and weights [n, picks] of the pursuit, by Gram-Schmidt: the residual needs no solving, the weights one at the end."""
    count, dim = targets.shape
    basis = torch.zeros(count, picks, dim, dtype=torch.float64)
    triangle = torch.eye(picks, dtype=torch.float64).repeat(count, 1, 1)
    along = torch.zeros(count, picks, 1, dtype=torch.float64)
    ids = torch.zeros(count, picks, dtype=torch.int64)
    left = targets.double()
    going = torch.ones(count, dtype=torch.bool)
    for n in range(picks):
        match = (left.float() @ atoms.T).abs_()
        if n:
            match.scatter_(1, ids[:, :n], -1.0)
        ids[:, n] = match.argmax(1)
        atom = atoms[ids[:, n]].double().unsqueeze(2)
        fresh, shadow, picked = atom, torch.zeros(count, n, 1, dtype=torch.float64), basis[:, :n]
        for _ in range(2):  # once loses orthogonality between near-parallel atoms, twice is enough
            part = picked @ fresh
            fresh, shadow = fresh - picked.mT @ part, shadow + part
        length = fresh.norm(dim=1)
        going &= (length[:, 0] > DEPENDENT) & (left.norm(dim=1) > DEPENDENT)
        direction = torch.where(going[:, None], (fresh / length.unsqueeze(2).clamp(min=DEPENDENT))[..., 0], 0.0)
        basis[:, n] = direction
        triangle[:, :n, n] = torch.where(going[:, None], shadow[..., 0], 0.0)
        triangle[:, n, n] = torch.where(going, length[:, 0], 1.0)
        along[:, n, 0] = (direction * left).sum(1)
        left = left - along[:, n] * direction
    return ids, torch.linalg.solve_triangular(triangle, along, upper=True)[..., 0]


def _blocks(targets: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """The targets in parts whose similarities to `width` atoms fit in memory."""
    yield from targets.split(max(1, BLOCK // max(width, 1)))


def _nonzero(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = weights != 0
    return kept.sum(1), ids[kept], weights[kept].float()


def _joined(parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> Sums:
    if not parts:
        return Sums(torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    counts, ids, weights = (torch.cat(column) for column in zip(*parts, strict=True))
    return Sums(torch.nn.functional.pad(counts.cumsum(0), (1, 0)), ids, weights)
