"""The arithmetic of merging: one tensor of several models into one.

Tensors are read, converted to float32 and combined in blocks of rows, so a large matrix takes little more memory than its result.
Where all models have one vocabulary, linear, slerp, task_arithmetic and ties compute what mergekit 0.1.4 computes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

BLOCK_NUMBERS = 1 << 22  # numbers of a tensor that are combined at once
COLINEAR_COSINE = 0.9995  # above it slerp is linear interpolation, as in mergekit
TASK_VECTOR_METHODS = ("task_arithmetic", "ties", "dare_ties")  # methods that add differences to a base


@dataclass(frozen=True)
class MergeMethod:
    """How tensors are combined.

    Attributes:
        name: linear, slerp, task_arithmetic, ties or dare_ties.
        density: The share of each difference's numbers that ties and dare_ties keep.
        seed: Of the numbers that dare_ties drops.
    """

    name: str
    density: float = 1.0
    seed: int = 0

    @property
    def needs_base(self) -> bool:
        return self.name in TASK_VECTOR_METHODS


def merge_tensors(
    method: MergeMethod, tensors: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor | None = None, salt: int = 0
) -> torch.Tensor:
    """Combine the same tensor of several models.

    Args:
        method: The method.
        tensors: The tensor of each model, of one shape and of any floating-point type.
        weights: The weight of each model.
        base: The base model's tensor, for methods that need one.
        salt: Makes the random numbers of this tensor other ones than those of the next.

    Returns:
        A float32 tensor of the same shape.
    """
    merged = torch.empty(tensors[0].shape, dtype=torch.float32)
    flat = merged.view(-1, 1) if merged.dim() == 0 else merged
    combine = _prepare(method, tensors, weights, base, salt)
    for block in _split_rows(flat):
        flat[block] = combine(block)
    return merged


class _Combine:
    """Combines a block of rows: the weighted mean."""

    def __init__(self, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
        self.tensors = [tensor.view(-1, 1) if tensor.dim() == 0 else tensor for tensor in tensors]
        self.weights = weights

    def __call__(self, block: slice) -> torch.Tensor:
        total = sum(self.weights)
        return _sum_weighted([tensor[block] for tensor in self.tensors], [weight / total for weight in self.weights])


class _CombineSlerp(_Combine):
    """Moves on the great circle between two tensors (Shoemake 1985).

    Each tensor is one vector. The share of the way is the second weight's share of both.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> None:
        super().__init__(tensors, weights)
        share = weights[1] / sum(weights)
        angle = self._measure_angle()
        if angle is None:
            self.weights = (1 - share, share)
        else:
            self.weights = (math.sin(angle * (1 - share)) / math.sin(angle), math.sin(angle * share) / math.sin(angle))

    def _measure_angle(self) -> float | None:
        """Return the angle between the tensors; None where they are nearly colinear."""
        first, second = self.tensors
        dot = first_norm = second_norm = 0.0
        for block in _split_rows(first):
            a, b = (tensor[block].double() for tensor in (first, second))
            dot += float((a * b).sum())
            first_norm += float((a * a).sum())
            second_norm += float((b * b).sum())
        if not first_norm or not second_norm:
            return None
        cosine = dot / math.sqrt(first_norm * second_norm)
        return None if abs(cosine) > COLINEAR_COSINE else math.acos(cosine)

    def __call__(self, block: slice) -> torch.Tensor:
        return _sum_weighted([tensor[block] for tensor in self.tensors], self.weights)


class _CombineTaskVectors(_Combine):
    """Adds the weighted differences from a base to it (Ilharco et al. 2023)."""

    def __init__(self, tensors: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor) -> None:
        super().__init__(tensors, weights)
        self.base = base.view(-1, 1) if base.dim() == 0 else base

    def list_differences(self, block: slice) -> list[torch.Tensor]:
        """List each model's difference from the base, in a block of rows."""
        base = self.base[block].float()
        return [tensor[block].float() - base for tensor in self.tensors]

    def __call__(self, block: slice) -> torch.Tensor:
        return self.base[block].float() + _sum_weighted(self.list_differences(block), self.weights)


class _CombineTies(_CombineTaskVectors):
    """Trims the differences, elects a sign, and averages those that have it.

    Yadav et al. 2023, arXiv:2306.01708 (TIES).
    """

    def __init__(self, tensors: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor, density: float) -> None:
        super().__init__(tensors, weights, base)
        self.limits = [self._find_limit(index, density) for index in range(len(self.tensors))]

    def _find_limit(self, index: int, density: float) -> float:
        """Return the smallest magnitude that is kept of a model's difference."""
        if density >= 1:
            return 0.0
        magnitudes = torch.empty(self.base.shape, dtype=torch.float32)
        for block in _split_rows(self.base):
            magnitudes[block] = (self.tensors[index][block].float() - self.base[block].float()).abs()
        numbers = magnitudes.view(-1).numpy()
        position = numbers.size - max(1, int(density * numbers.size))
        numbers.partition(position)  # in place: the tensor may fill a good part of the memory
        return float(numbers[position])

    def list_differences(self, block: slice) -> list[torch.Tensor]:
        differences = super().list_differences(block)
        return [difference * (difference.abs() >= limit) for difference, limit in zip(differences, self.limits, strict=True)]

    def __call__(self, block: slice) -> torch.Tensor:
        return self.base[block].float() + _average_agreeing(self.list_differences(block), self.weights)


class _CombineDare(_CombineTaskVectors):
    """Drops numbers of the differences at random, then elects signs.

    What is kept is scaled up. Yu et al. 2024, arXiv:2311.03099 (DARE).
    """

    def __init__(self, tensors: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor, density: float, seed: int) -> None:
        super().__init__(tensors, weights, base)
        self.density = density
        self.generator = torch.Generator().manual_seed(seed)

    def list_differences(self, block: slice) -> list[torch.Tensor]:
        differences = super().list_differences(block)
        kept = [torch.rand(difference.shape, generator=self.generator) < self.density for difference in differences]
        return [difference * mask / self.density for difference, mask in zip(differences, kept, strict=True)]

    def __call__(self, block: slice) -> torch.Tensor:
        weighted = [difference * weight for difference, weight in zip(self.list_differences(block), self.weights, strict=True)]
        sign = _elect_sign(weighted)
        return self.base[block].float() + torch.stack([value * (value.sign() == sign) for value in weighted]).sum(0)


def _prepare(
    method: MergeMethod, tensors: Sequence[torch.Tensor], weights: Sequence[float], base: torch.Tensor | None, salt: int
) -> _Combine:
    if method.name == "linear":
        return _Combine(tensors, weights)
    if method.name == "slerp":
        return _CombineSlerp(tensors, weights)
    if base is None:
        raise ValueError(f"{method.name} needs a base")
    if method.name == "ties":
        return _CombineTies(tensors, weights, base, method.density)
    if method.name == "dare_ties":
        return _CombineDare(tensors, weights, base, method.density, (method.seed << 32) ^ salt)
    return _CombineTaskVectors(tensors, weights, base)


def _split_rows(tensor: torch.Tensor) -> Iterator[slice]:
    rows = max(1, BLOCK_NUMBERS // max(1, tensor[:1].numel())) if len(tensor) else 1
    yield from (slice(first, first + rows) for first in range(0, len(tensor), rows))


def _sum_weighted(tensors: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    total = tensors[0].float() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total += tensor.float() * weight
    return total


def _elect_sign(weighted: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sign of the sum of differences; +1 where it is 0."""
    return (torch.stack(list(weighted)).sum(0) >= 0).float() * 2 - 1


def _average_agreeing(differences: Sequence[torch.Tensor], weights: Sequence[float]) -> torch.Tensor:
    """Average, number by number, the differences that have the elected sign."""
    weighted = [difference * weight for difference, weight in zip(differences, weights, strict=True)]
    sign = _elect_sign(weighted)
    total, divisor = torch.zeros_like(sign), torch.zeros_like(sign)
    for value, weight in zip(weighted, weights, strict=True):
        agrees = value.sign() == sign
        total += value * agrees
        divisor += weight * agrees
    return total / torch.where(divisor == 0, torch.ones_like(divisor), divisor)
