"""Write vectors as sparse weighted sums of other vectors.

Two methods: sparsemax over similarities, and orthogonal matching pursuit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

INITIAL_TOP_K = 64  # similarities that sparsemax sorts first; rarely do more have weight
MAX_BLOCK_ELEMENTS = 1 << 24  # numbers in the largest matrix in memory
MIN_RESIDUAL_NORM = 1e-4  # an atom closer than this to the span of the picked ones adds nothing, and its weight would have no bound


@dataclass(frozen=True)
class SparseCombinations:
    """Sparse weighted sums of rows, one after the other, on the CPU.

    Sum i has `ids` and `weights` from offsets[i] to offsets[i + 1].
    offsets: int64 [n + 1]; ids: int64 [all]; weights: float32 [all].
    """

    offsets: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def slice(self, first: int, count: int) -> SparseCombinations:
        """Take at most `count` sums, from number `first` on."""
        offsets = self.offsets[first : first + count + 1]
        start, end = int(offsets[0]), int(offsets[-1])
        return SparseCombinations(offsets - start, self.ids[start:end], self.weights[start:end])

    def apply(self, rows: torch.Tensor) -> torch.Tensor:
        """Compute the sums of some rows.

        rows: float32 [more than any id, width]. Returns [n, width].
        """
        return torch.nn.functional.embedding_bag(
            self.ids, rows, self.offsets, mode="sum", per_sample_weights=self.weights, include_last_offset=True
        )


def combine_by_sparsemax(targets: torch.Tensor, atoms: torch.Tensor) -> SparseCombinations:
    """Combine atoms by the sparsemax of their cosines with each target.

    This is FOCUS (Dobler and de Melo 2023, arXiv 2305.14481).

    Args:
        targets: float32 [n, dim], each of length one.
        atoms: float32 [m ≥ 1, dim], each of length one.

    Returns:
        n sums. Ids are rows of `atoms`; weights are positive and add up to 1.
    """
    blocks = (sparsemax(block @ atoms.T) for block in _split_blocks(targets, len(atoms)))
    return _join_blocks(blocks)


def sparsemax(scores: torch.Tensor, top_k: int = INITIAL_TOP_K) -> tuple[torch.Tensor, torch.Tensor]:
    """Project each row onto the simplex, exactly.

    The method is from Martins and Astudillo 2016, arXiv 1602.02068. With z sorted downwards the support is
    {i : 1 + i z_i > Σ_{j≤i} z_j}, a prefix of the order. If the condition fails within the `top_k` largest, nothing beyond them
    belongs to the support. For the rows where it does not fail, more values are sorted.

    Args:
        scores: [n, m].
        top_k: Values of a row that are sorted at first.

    Returns:
        Ids int64 and weights float64, [n, k] each. The weight is 0 where a row has fewer than k.
    """
    num_sorted = min(top_k, scores.shape[1])
    values, ids = scores.topk(num_sorted)
    ordered = values.double()
    sums = ordered.cumsum(1)
    inside = 1 + torch.arange(1, num_sorted + 1) * ordered > sums
    support = inside.sum(1, keepdim=True)
    weights = (ordered - (sums.gather(1, support - 1) - 1) / support).clamp(min=0)
    if num_sorted == scores.shape[1]:
        return ids, weights
    open_ended = inside[:, -1].nonzero()[:, 0]
    if not len(open_ended):
        return ids, weights
    more_ids, more_weights = sparsemax(scores[open_ended], 4 * top_k)
    num_missing = more_ids.shape[1] - num_sorted
    ids, weights = (torch.nn.functional.pad(tensor, (0, num_missing)) for tensor in (ids, weights))
    ids[open_ended], weights[open_ended] = more_ids, more_weights
    return ids, weights


def combine_by_pursuit(targets: torch.Tensor, atoms: torch.Tensor, max_atoms: int) -> SparseCombinations:
    """Combine at most `max_atoms` atoms for each target by orthogonal matching pursuit.

    As arXiv 2506.06607 uses it. Each step picks the atom with the largest |inner product| with the residual. The weights of all picked
    atoms are the least squares. It ends when the residual is zero or the next atom depends on the picked ones.

    Args:
        targets: float32 [n, dim], each of length one.
        atoms: float32 [m ≥ 1, dim], each of length one.
        max_atoms: Atoms a target at most.

    Returns:
        n sums. Ids are rows of `atoms`.
    """
    max_atoms = min(max_atoms, *atoms.shape)
    blocks = (_pursue(block, atoms, max_atoms) for block in _split_blocks(targets, len(atoms)))
    return _join_blocks(blocks)


def _pursue(targets: torch.Tensor, atoms: torch.Tensor, max_atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the pursuit by Gram-Schmidt; returns ids and weights [n, max_atoms].

    The residual needs no solver, the weights need one at the end.
    """
    count, dim = targets.shape
    basis = torch.zeros(count, max_atoms, dim, dtype=torch.float64)
    triangle = torch.eye(max_atoms, dtype=torch.float64).repeat(count, 1, 1)
    projections = torch.zeros(count, max_atoms, 1, dtype=torch.float64)
    ids = torch.zeros(count, max_atoms, dtype=torch.int64)
    residual = targets.double()
    active = torch.ones(count, dtype=torch.bool)
    for n in range(max_atoms):
        similarity = (residual.float() @ atoms.T).abs_()
        if n:
            similarity.scatter_(1, ids[:, :n], -1.0)
        ids[:, n] = similarity.argmax(1)
        atom = atoms[ids[:, n]].double().unsqueeze(2)
        orthogonal, coefficients, picked_basis = atom, torch.zeros(count, n, 1, dtype=torch.float64), basis[:, :n]
        for _ in range(2):  # one pass loses orthogonality between near-parallel atoms, two suffice
            overlap = picked_basis @ orthogonal
            orthogonal, coefficients = orthogonal - picked_basis.mT @ overlap, coefficients + overlap
        length = orthogonal.norm(dim=1)
        active &= (length[:, 0] > MIN_RESIDUAL_NORM) & (residual.norm(dim=1) > MIN_RESIDUAL_NORM)
        direction = torch.where(active[:, None], (orthogonal / length.unsqueeze(2).clamp(min=MIN_RESIDUAL_NORM))[..., 0], 0.0)
        basis[:, n] = direction
        triangle[:, :n, n] = torch.where(active[:, None], coefficients[..., 0], 0.0)
        triangle[:, n, n] = torch.where(active, length[:, 0], 1.0)
        projections[:, n, 0] = (direction * residual).sum(1)
        residual = residual - projections[:, n] * direction
    return ids, torch.linalg.solve_triangular(triangle, projections, upper=True)[..., 0]


def _split_blocks(targets: torch.Tensor, width: int) -> Iterator[torch.Tensor]:
    """Split the targets so that similarities to `width` atoms fit in memory."""
    yield from targets.split(max(1, MAX_BLOCK_ELEMENTS // max(width, 1)))


def _join_blocks(blocks: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> SparseCombinations:
    """Join blocks of ids and weights [n, k], without the zero weights."""
    counts, ids, weights = [torch.zeros(1, dtype=torch.int64)], [torch.zeros(0, dtype=torch.int64)], [torch.zeros(0)]
    for block_ids, block_weights in blocks:
        nonzero = block_weights != 0
        counts.append(nonzero.sum(1))
        ids.append(block_ids[nonzero])
        weights.append(block_weights[nonzero].float())
    return SparseCombinations(torch.cat(counts).cumsum(0), torch.cat(ids), torch.cat(weights))
