"""Knows what a training step holds in memory after each operator, and what each operator computes and moves.

Sees every operator below autograd and remembers the storages that they return for as long as these live, by kind. Tensors may
have values or shapes only (PyTorch's fake tensors): the count of bytes is the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from azrecipe.planning.simulation.step_cost import KINDS, Event, Pair

if TYPE_CHECKING:
    from collections.abc import Iterator

TILE = "tile"  # a piece of the logits of a loss that never makes all of them: counted apart, as its size is no multiple of the batch's

_aten = torch.ops.aten
_FREE = {_aten.empty.memory_format, _aten.empty_like.default, _aten.empty_strided.default, _aten.new_empty.default}


# Operators that read of their largest input only what they choose
_CHOOSE = {_aten.embedding, _aten.nll_loss_forward, _aten.nll_loss_backward, _aten.gather, _aten.index, _aten.index_select}


def _flash(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _flash_backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad, query, key, value))


def _addmm(_: Any, a: Any, b: Any, *__: Any, **___: Any) -> int:
    return int(2 * a[0] * a[1] * b[1])


# What FlopCounterMode does not know: the CPU's attention (a step on CPU tensors, fake or not, uses it), a product added in place
MORE_FLOPS: dict[Any, Any] = {
    _aten.addmm_: _addmm,
    _aten._scaled_dot_product_flash_attention_for_cpu: _flash,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward,
}


class Tracker(TorchDispatchMode):
    """Records a step. `block`: bytes that a size is rounded up to (512: the GPU allocator's; 1: none).

    `batch`: the step's sequences, a prime that divides no size of the model's: what it divides is in proportion to the batch. 0: nothing is.
    `events` are step_cost's; `place` is the caller's, set as the step goes on.
    """

    def __init__(self, block: int = 512, batch: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.block, self.batch = block, batch
        self.place: tuple[str, int] = ("start", 0)
        self.phase = "activations"  # the kind of what an operator makes, where nothing else is known
        self.scale = 1.0  # of FLOPs and bytes moved, where a part of a loop stands for all of it
        self.more_tiles = False  # whether a larger batch has more tiles, and not larger ones
        self.logits: tuple[int, ...] = ()  # last dimensions that say: these are logits
        self.base = dict.fromkeys((*KINDS, TILE), 0)
        self.each = dict.fromkeys((*KINDS, TILE), 0.0)
        self.live: dict[int, list[Any]] = {}  # id of a storage → (base, each) bytes, kind, weak reference
        self.events: list[Event] = []
        self.let_go: Callable[[], None] | None = None  # called before a storage is freed that its owner keeps

    def label(self, kind: str, tensors: Iterable[Any]) -> None:
        """Count these tensors as a kind from now on."""
        for tensor in tensors:
            if tensor is not None:
                self._see(tensor, kind)

    def _see(self, tensor: Any, kind: str | None) -> None:
        storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # of a sharded one this process' part
        known = self.live.get(id(storage))
        if known is None:
            kind = kind or self._kind(tensor)
            size = self._size(storage.nbytes(), kind)
            self.live[id(storage)] = [size, kind, weakref.ref(storage, partial(self._drop, id(storage)))]
            self._add(kind, size, 1)
            return
        size = self._size(storage.nbytes(), kind or known[1])
        if size != known[0] or (kind is not None and kind != known[1]):
            self._add(known[1], known[0], -1)
            known[:2] = size, kind or known[1]
            self._add(known[1], size, 1)

    def took_over(self, size: int) -> None:
        """So many bytes that earlier batches of the step left are no longer held beside this one: `accumulated` counts down from zero."""
        self.base["accumulated"] -= size

    def rounded(self, size: int) -> int:
        """Bytes that the allocator takes for so many."""
        return -(-size // self.block) * self.block

    def size(self, tensors: Iterable[Any]) -> int:
        """Bytes that tensors hold, each storage once."""
        storages = [getattr(tensor, "_local_tensor", tensor).untyped_storage() for tensor in tensors]
        return sum({id(storage): self.rounded(storage.nbytes()) for storage in storages}.values())

    def _size(self, size: int, kind: str) -> tuple[int, float]:
        """Bytes: those that are there whatever the batch, and those for each sequence of it."""
        if self.batch and size and size % self.batch == 0 and kind != TILE:
            return 0, size / self.batch
        return self.rounded(size), 0.0

    def _add(self, kind: str, size: tuple[int, float], sign: int) -> None:
        self.base[kind] += sign * size[0]
        self.each[kind] += sign * size[1]

    def _pair(self, amount: int) -> tuple[float, float]:
        """An amount of work, base and each; in a tile it stands for all tokens, and so is in proportion to the batch."""
        if self.batch and (amount % self.batch == 0 or self.phase == TILE or (self.scale != 1 and self.more_tiles)):
            return 0.0, amount * self.scale / self.batch
        return amount * self.scale, 0.0

    def _kind(self, tensor: Any) -> str:
        if self.phase == TILE:
            return TILE
        wide = tensor.dim() > 1 and tensor.shape[-1] in self.logits and tensor.is_floating_point() and self.phase != "optimizer"
        return "logits" if wide else self.phase

    def _drop(self, key: int, _: Any) -> None:
        size, kind, _reference = self.live.pop(key)
        self._add(kind, size, -1)

    @contextmanager
    def tile(self, part: float) -> Iterator[None]:
        """Within it what is made is a tile, and what is done is done once for each `part` of the whole."""
        before = self.phase, self.scale
        self.phase, self.scale = TILE, 1 / part
        try:
            yield
        finally:
            self.phase, self.scale = before

    @contextmanager
    def work(self, part: float) -> Iterator[None]:
        """Within it what is done is done once for each `part` of the whole; what is made is no tile."""
        before, self.scale = self.scale, 1 / part
        try:
            yield
        finally:
            self.scale = before

    def note(self, flops: Pair = (0.0, 0.0), moved: Pair = (0.0, 0.0)) -> None:
        """An event: what is held now, and what was done for it."""
        base, each = tuple(map(self.base.__getitem__, KINDS)), tuple(map(self.each.__getitem__, KINDS))
        self.events.append(Event(self.place, base, each, self.base[TILE], flops, moved))

    def did(self, flops: int, tensors: Iterable[Any], some: int) -> None:
        """A product that is none here, of a tile of `some` rows that stands for all: what has those rows is in proportion to the batch."""
        sizes = [(tensor.numel() * tensor.element_size() * self.scale, some in tensor.shape) for tensor in tensors]
        rows, rest = (sum(size for size, of_rows in sizes if of_rows is wanted) for wanted in (True, False))
        if self.more_tiles:
            rows, rest = rows + rest, 0.0
        flops_ = flops * self.scale
        self.note(*((0.0, flops_ / self.batch), (rest, rows / self.batch)) if self.batch else ((flops_, 0.0), (rows + rest, 0.0)))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # fake tensors are asked where they are twice as often as they are worked on
            return func(*args)
        if any("DTensor" in kind.__name__ for kind in types):
            return NotImplemented  # what it does to this process' part comes here by itself
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]
        out = func(*args, **kwargs)
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        for tensor in made:
            self._see(tensor, None)
        name = func.__name__
        if name.startswith("_allgather_base_"):
            self._see(args[0], "communication")
        elif name.startswith("_reduce_scatter_base_"):
            self._see(args[1], "communication")
        self.note(self._flops(func, args, kwargs, out), (0.0, 0.0) if _is_free(func, made) else self._moved(func, made, args))
        return out

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> Pair:
        packet = func._overloadpacket
        count = MORE_FLOPS.get(packet)
        if count is not None:
            shapes = [getattr(argument, "shape", argument) for argument in args]
            return self._pair(int(count(*shapes)))
        known: Any = flop_registry.get(packet)
        return self._pair(int(known(*args, **kwargs, out_val=out))) if known is not None else (0.0, 0.0)

    def _moved(self, func: Any, made: list[Any], args: Any) -> Pair:
        """Bytes that an operator reads and writes at least, each tensor once."""
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if func._overloadpacket in _CHOOSE and sizes:
            sizes.remove(max(sizes))
        base = each = 0.0
        for size in (*sizes, *(tensor.numel() * tensor.element_size() for tensor in made)):
            more = self._pair(size)
            base, each = base + more[0], each + more[1]
        return base, each

    @contextmanager
    def watching(self) -> Iterator[Tracker]:
        """Within it operators are recorded, and storages that change their size: FSDP 2 frees and refills them so."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:
            if not size and self.let_go is not None:
                self.let_go()
            resize(storage, size)
            known = self.live.get(id(storage))
            if known is not None:
                self._add(known[1], known[0], -1)
                known[1] = "unsharded" if size else known[1]
                known[0] = self._size(size, known[1])
                self._add(known[1], known[0], 1)
                self.note()
            return storage

        # No operator tells of it (torch, fsdp/_fully_shard/_fsdp_param.py, alloc_storage and free_storage)
        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        try:
            with self:
                yield self
        finally:
            torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _is_free(func: Any, made: list[Any]) -> bool:
    """Whether an operator moves nothing: it makes a view, or memory that nobody has written."""
    if func in _FREE or func.is_view:
        return True
    return func is _aten.detach.default or not made
