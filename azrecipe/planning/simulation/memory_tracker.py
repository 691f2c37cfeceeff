"""A tracker of live bytes, FLOPs and bytes moved, operator by operator.

The tracker sees every operator below autograd. It follows the storages that operators return, by kind, for as long as they live. Tensors
may have values or only shapes (PyTorch's fake tensors): the bytes are the same.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from azrecipe.planning.simulation.fused_traffic import FusedTraffic, StorageUse, is_fusible
from azrecipe.planning.simulation.recorded_step import StepEvent, StepPosition
from azrecipe.planning.simulation.step_cost import MEMORY_KINDS, NO_BYTES, NO_WORK, BatchLinear, OperatorWork

if TYPE_CHECKING:
    from collections.abc import Iterator

TILE = "tile"  # a tile of the logits, for a loss that computes them in tiles: a kind of its own, as its size is not linear in the batch

_aten = torch.ops.aten
# Operators that reserve memory and write nothing
_ALLOCATIONS = {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default}
# Operators that read only selected parts of their largest input
_SELECTIONS = {_aten.embedding, _aten.nll_loss_forward, _aten.nll_loss_backward, _aten.gather, _aten.index, _aten.index_select}


def _count_pairs(queries: int, keys: int, is_causal: bool) -> int:
    """Count the pairs of query and key that attention computes.

    Fused kernels skip what a causal attention does not look at. A mask of the caller's skips nothing.
    """
    return sum(range(max(keys - queries, 0) + 1, keys + 1)) if is_causal else queries * keys


def _flash(
    query: Any, key: Any, value: Any, _dropout: float = 0.0, is_causal: bool = False, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    """Count the two products of each query head.

    Written out because torch's own formula counts all pairs, and takes equal heads only before 2.13.
    """
    batch, heads, queries, width = query
    return int(2 * batch * heads * _count_pairs(queries, key[2], is_causal) * (width + value[3]))


def _flash_backward(grad: Any, query: Any, key: Any, value: Any, *rest: Any, out_shape: Any = None, **__: Any) -> int:
    """Count five products: the scores again, and four gradients."""
    batch, heads, queries, width = query
    is_causal = len(rest) > 3 and bool(rest[3])  # after the output, its logsumexp and the dropout
    return int(2 * batch * heads * _count_pairs(queries, key[2], is_causal) * (3 * width + 2 * value[3]))


def _addmm(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


# Formulas that FlopCounterMode lacks: the CPU's attention (steps on CPU tensors, fake or not, use it), and an in-place product
EXTRA_FLOP_FORMULAS: dict[Any, Any] = {
    _aten.addmm_: _addmm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


@dataclass
class _LiveStorage:
    """A live storage: its bytes, kind, weak reference and unique number."""

    size: BatchLinear
    kind: str
    reference: Any
    number: int


class MemoryTracker(TorchDispatchMode):
    """Records a step's events.

    Attributes:
        block: Bytes that a size is rounded up to (512: the GPU allocator's; 1: none).
        batch: Sequences of the step: a prime that divides no size of the model. Sizes that it divides are linear in the batch. 0: none are.
        position: Where the step is; the caller sets it.
        phase: The kind of what an operator returns, where nothing else decides it.
        scale: Factor for FLOPs and bytes moved, where one part of a loop stands for the whole.
        more_tiles: Whether a larger batch has more tiles (else larger ones).
        logit_sizes: Last dimensions of tensors that are logits.
        num_blocks: Decoder layers, which a compiler compiles.
        on_free: Called before a storage is emptied whose owner keeps it.
        events: The recorded events.
    """

    def __init__(self, block: int = 512, batch: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block, self.batch = block, batch
        self.position = StepPosition("start")
        self.phase = "activations"
        self.scale = 1.0
        self.more_tiles = False
        self.logit_sizes: tuple[int, ...] = ()
        self.num_blocks = 0
        self.base = dict.fromkeys((*MEMORY_KINDS, TILE), 0)
        self.each = dict.fromkeys((*MEMORY_KINDS, TILE), 0.0)
        self.live: dict[int, _LiveStorage] = {}  # by id of the storage
        self.events: list[StepEvent] = []
        self.on_free: Callable[[], None] | None = None
        self._is_paused = False
        self.fused_traffic, self._traffic_position, self._numbers = FusedTraffic(), self.position, itertools.count()

    def label(self, kind: str, tensors: Iterable[Any]) -> None:
        """Count these tensors as a kind from now on.

        A gradient is in memory from then on, whatever computed it.
        """
        for tensor in tensors:
            if tensor is not None:
                self._follow(tensor, kind)
                if kind == "gradients":
                    self._record_traffic([size for use in self._list_uses([tensor]) for size in self.fused_traffic.write_value(use.number)])

    def _follow(self, tensor: Any, kind: str | None) -> None:
        """Follow a tensor's storage, or update its size and kind."""
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of a sharded tensor, this process' part
        live = self.live.get(id(storage))
        if live is None:
            kind = kind or self._get_kind(tensor)
            size = self._split_size(storage.nbytes(), kind)
            self.live[id(storage)] = _LiveStorage(size, kind, weakref.ref(storage, partial(self._drop, id(storage))), next(self._numbers))
            self._add(kind, size, 1)
            return
        size = self._split_size(storage.nbytes(), kind or live.kind)
        if size != live.size or (kind is not None and kind != live.kind):
            self._add(live.kind, live.size, -1)
            live.size, live.kind = size, kind or live.kind
            self._add(live.kind, size, 1)

    def release_accumulated(self, size: int) -> None:
        """Release bytes that earlier batches of the step left.

        This batch's gradient replaces them. `accumulated` counts down from zero.
        """
        self.base["accumulated"] -= size

    def round_up(self, size: int) -> int:
        """Round a size up to the allocator's block."""
        return -(-size // self.block) * self.block

    def count_bytes(self, tensors: Iterable[Any]) -> int:
        """Count the bytes of tensors, each storage once."""
        storages = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]
        return sum({id(storage): self.round_up(storage.nbytes()) for storage in storages}.values())

    def _split_size(self, size: int, kind: str) -> BatchLinear:
        """Split a size into bytes at any batch and bytes a sequence."""
        if self.batch and size and size % self.batch == 0 and kind != TILE:
            return BatchLinear(0, size / self.batch)
        return BatchLinear(self.round_up(size), 0.0)

    def _add(self, kind: str, size: BatchLinear, sign: int) -> None:
        self.base[kind] += sign * int(size.base)
        self.each[kind] += sign * size.each

    def _split_work(self, amount: int) -> BatchLinear:
        """Split an amount of work into a constant and a linear part.

        In a tile it stands for all tokens, and is linear in the batch.
        """
        if self.batch and (amount % self.batch == 0 or self.phase == TILE or (self.scale != 1 and self.more_tiles)):
            return BatchLinear(0.0, amount * self.scale / self.batch)
        return BatchLinear(amount * self.scale, 0.0)

    def _get_kind(self, tensor: Any) -> str:
        if self.phase == TILE:
            return TILE
        can_be_logits = tensor.dim() > 1 and tensor.is_floating_point() and self.phase != "optimizer_temporary"
        return "logits" if can_be_logits and tensor.shape[-1] in self.logit_sizes else self.phase

    def _drop(self, key: int, _: Any) -> None:
        live = self.live.pop(key)
        self.fused_traffic.forget(live.number)
        self._add(live.kind, live.size, -1)

    @contextmanager
    def within_tile(self, share: float) -> Iterator[None]:
        """Count new tensors as tiles, work as a share of all."""
        phase, scale = self.phase, self.scale
        self.phase, self.scale = TILE, 1 / share
        try:
            yield
        finally:
            self.phase, self.scale = phase, scale

    @contextmanager
    def scale_work(self, share: float) -> Iterator[None]:
        """Count work as a share of all; new tensors are no tiles."""
        scale, self.scale = self.scale, 1 / share
        try:
            yield
        finally:
            self.scale = scale

    def record_event(self, work: OperatorWork = NO_WORK) -> None:
        """Record the live bytes, and the work of an operator."""
        base, each = tuple(map(self.base.__getitem__, MEMORY_KINDS)), tuple(map(self.each.__getitem__, MEMORY_KINDS))
        self.events.append(StepEvent(self.position, base, each, self.base[TILE], work))

    def record_op(self, flops: int, tensors: Iterable[torch.Tensor], tile_rows: int) -> None:
        """Record an operator on a tile, which stands for all tiles.

        The operator itself is not run. Tensors with `tile_rows` rows are linear in the batch.
        """
        tensors = list(tensors)
        sizes = [(tensor.numel() * tensor.element_size() * self.scale, tile_rows in tensor.shape) for tensor in tensors]
        linear, constant = (sum(size for size, has_rows in sizes if has_rows is with_rows) for with_rows in (True, False))
        if self.more_tiles:
            linear, constant = linear + constant, 0.0
        scaled = flops * self.scale
        work = BatchLinear(scaled, 0.0), BatchLinear(linear + constant, 0.0)
        if self.batch:
            work = BatchLinear(0.0, scaled / self.batch), BatchLinear(constant, linear / self.batch)
        self.record_event(OperatorWork(*work, work[1], _multiplies_float32(tensors)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and record it."""
        kwargs = kwargs or {}
        if self._is_paused:
            return func(*args, **kwargs)
        if func is torch.ops.prim.device.default:  # no work; fake tensors are asked for their device at every operator
            return func(*args)
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented  # its operators on this process' part arrive here too
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        out = func(*args, **kwargs)
        for tensor in _list_tensors(out):
            self._follow(tensor, None)
        name = func.__name__
        if name.startswith("_allgather_base_"):
            self._follow(args[0], "communication")
        elif name.startswith("_reduce_scatter_base_"):
            self._follow(args[1], "communication")
        self.record_event(self._count_work(func, args, kwargs, out))
        return out

    def _count_work(self, func: Any, args: Any, kwargs: Any, out: Any) -> OperatorWork:
        results, inputs = _list_tensors(out), _list_tensors((args, kwargs))
        flops = self._count_flops(func, args, kwargs, out)
        if _moves_nothing(func, results):
            return OperatorWork(flops, NO_BYTES, NO_BYTES, False)
        moved = self._count_bytes_moved(func, results, args)
        reads, writes = self._list_uses(inputs), self._list_uses(results)
        if self.position != self._traffic_position:  # each layer is compiled by itself
            self.fused_traffic.start_kernel()
            self._traffic_position = self.position
        if self._is_compiled() and is_fusible(func):
            return OperatorWork(flops, moved, self._split_amounts(self.fused_traffic.count_fused(reads, writes)), False)
        self._record_traffic(self.fused_traffic.count_alone(reads, writes))
        return OperatorWork(flops, moved, moved, _multiplies_float32(inputs))

    def _record_traffic(self, amounts: list[int]) -> None:
        """Record what fused kernels write beside an operator."""
        if amounts:
            self.record_event(OperatorWork(NO_BYTES, NO_BYTES, self._split_amounts(amounts), False))

    def _is_compiled(self) -> bool:
        """Return whether the step is in a decoder layer."""
        stage, layer = self.position
        return stage == "forward" or (stage == "backward" and layer < self.num_blocks)

    def _list_uses(self, tensors: list[torch.Tensor]) -> list[StorageUse]:
        """List storages, and the bytes that a tensor's operator touches of each."""
        uses = {}
        for tensor in tensors:
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()
            live = self.live.get(id(storage))
            if live is not None:
                uses[live.number] = min(tensor.numel() * tensor.element_size(), storage.nbytes())
        return [StorageUse(number, size) for number, size in uses.items()]

    def _count_flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> BatchLinear:
        packet = func._overloadpacket
        formula = EXTRA_FLOP_FORMULAS.get(packet)
        if formula is not None:
            shapes = [getattr(argument, "shape", argument) for argument in args]
            return self._split_work(int(formula(*shapes)))
        torch_formula: Any = flop_registry.get(packet)
        return NO_BYTES if torch_formula is None else self._split_work(int(torch_formula(*args, **kwargs, out_val=out)))

    def _count_bytes_moved(self, func: Any, results: list[Any], args: Any) -> BatchLinear:
        """Count the bytes that an operator must read and write."""
        sizes = [tensor.numel() * tensor.element_size() for tensor in _list_tensors(args)]
        if func._overloadpacket in _SELECTIONS and sizes:
            sizes.remove(max(sizes))
        return self._split_amounts([*sizes, *(tensor.numel() * tensor.element_size() for tensor in results)])

    def _split_amounts(self, amounts: Iterable[int]) -> BatchLinear:
        base = each = 0.0
        for amount in map(self._split_work, amounts):
            base, each = base + amount.base, each + amount.each
        return BatchLinear(base, each)

    @contextmanager
    def record(self) -> Iterator[MemoryTracker]:
        """Record operators and changes of storages' sizes.

        FSDP 2 frees and refills storages. DTensor runs an operator on tensors of the whole shape to learn the result's: those never exist.
        """
        resize, infer_shape = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

        def infer_unrecorded(*args: Any) -> Any:
            self._is_paused = True
            try:
                return infer_shape(*args)
            finally:
                self._is_paused = False

        def record_resize(storage: Any, size: int) -> Any:
            if not size and self.on_free is not None:
                self.on_free()
            resize(storage, size)
            live = self.live.get(id(storage))
            if live is not None:
                self._add(live.kind, live.size, -1)
                live.kind = "unsharded" if size else live.kind
                live.size = self._split_size(size, live.kind)
                self._add(live.kind, live.size, 1)
                self.record_event()
            return storage

        # A resize is no operator (torch, fsdp/_fully_shard/_fsdp_param.py, alloc_storage and free_storage)
        torch.UntypedStorage.resize_ = record_resize  # type: ignore[method-assign, assignment]
        ShardingPropagator._propagate_tensor_meta_non_cached = infer_unrecorded  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
            ShardingPropagator._propagate_tensor_meta_non_cached = infer_shape  # type: ignore[method-assign]


def _moves_nothing(func: Any, results: list[Any]) -> bool:
    """Return whether an operator only makes a view, or reserves memory."""
    if func in _ALLOCATIONS or func.is_view:
        return True
    return func is _aten.detach.default or not results


def _list_tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _multiplies_float32(inputs: Iterable[torch.Tensor]) -> bool:
    """Return whether a product's matrices are all float32."""
    return all(tensor.dtype == torch.float32 for tensor in inputs if tensor.is_floating_point())
