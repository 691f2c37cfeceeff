"""The bytes that move where a compiler fuses operators.

Between two operators that stay by themselves (products, attention, collectives), pointwise operators and reductions run as one kernel. It
reads what it does not compute itself, once, and writes what others read. Where a later kernel needs a value of an earlier one, it computes
the value again from what that one read, or reads it: whichever moves less. So torch.compile works, with its partition of the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

_aten = torch.ops.aten
# Fused besides what PyTorch tags as pointwise: copies, reductions, and what compilers split into both
_FUSED_PACKETS = {
    _aten._to_copy, _aten.clone, _aten.copy_, _aten.cat, _aten.sum, _aten.mean, _aten.var_mean, _aten.amax, _aten.stack,
    _aten.native_dropout, _aten.native_layer_norm, _aten.native_layer_norm_backward, _aten._softmax, _aten._softmax_backward_data,
    _aten._fused_rms_norm, _aten._fused_rms_norm_backward, _aten.slice_backward, _aten.select_backward, _aten.fill_,
}  # fmt: skip


def is_fusible(func: Any) -> bool:
    """Return whether a compiler fuses an operator with others."""
    return torch.Tag.pointwise in func.tags or func._overloadpacket in _FUSED_PACKETS


class StorageUse(NamedTuple):
    """A storage, by its number, and the bytes that an operator touches."""

    number: int
    size: int


@dataclass
class _FusedValue:
    """A value that a fused kernel computed.

    roots: bytes of what the kernel read for it, by storage. is_written: whether it is in memory.
    """

    size: int
    kernel: int
    roots: Mapping[int, int]
    is_written: bool = False


@dataclass
class FusedTraffic:
    """Counts the bytes that fused kernels read and write, operator by operator."""

    kernel: int = 0
    loaded: set[int] = field(default_factory=set)  # storages that the present kernel has read
    values: dict[int, _FusedValue] = field(default_factory=dict)

    def start_kernel(self) -> None:
        """Let what follows run in another kernel."""
        self.kernel += 1
        self.loaded.clear()

    def count_alone(self, reads: Iterable[StorageUse], writes: Iterable[StorageUse]) -> list[int]:
        """Count what fused kernels write for an operator that stays by itself.

        The operator's own bytes are not counted.
        """
        self.start_kernel()
        amounts = [size for use in reads for size in self.write_value(use.number)]
        for use in writes:
            self.values.pop(use.number, None)
        return amounts

    def write_value(self, number: int) -> list[int]:
        """Count the writing of a value that is not in memory yet."""
        value = self.values.get(number)
        if value is None or value.is_written:
            return []
        value.is_written = True
        return [value.size]

    def count_fused(self, reads: Iterable[StorageUse], writes: Iterable[StorageUse]) -> list[int]:
        """Count what a fused operator adds to the traffic of its kernel."""
        amounts: list[int] = []
        roots: dict[int, int] = {}
        for use in reads:
            roots |= self._load(use, amounts)
        for use in writes:
            self.values[use.number] = _FusedValue(use.size, self.kernel, roots)
        return amounts

    def _load(self, use: StorageUse, amounts: list[int]) -> Mapping[int, int]:
        """Load a value into the present kernel; return its roots there."""
        value, itself = self.values.get(use.number), {use.number: use.size}
        if value is not None and value.kernel == self.kernel:
            return value.roots
        if use.number in self.loaded:
            return itself
        if value is not None:
            missing = [size for number, size in value.roots.items() if number not in self.loaded]
            if sum(missing) <= use.size + value.size * (not value.is_written):
                amounts += missing
                self.loaded |= set(value.roots)
                return value.roots
            amounts += self.write_value(use.number)
        amounts.append(use.size)
        self.loaded.add(use.number)
        return itself

    def forget(self, number: int) -> None:
        """Forget a storage that is gone."""
        self.values.pop(number, None)
