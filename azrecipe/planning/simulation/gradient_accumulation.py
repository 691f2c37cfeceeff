"""Knows what a batch's predecessors in the same optimizer step still hold of its gradients while it runs, without their being run.

Earlier batches leave a gradient of every number that trains. A batch alone makes the same gradients one after the other: from when on one
is there that the others would have been added to, what they left need no longer be counted beside it (`Tracker.took_over`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from azrecipe.planning.simulation.memory_tracker import Tracker
from azrecipe.planning.simulation.step_spec import Asked


def follow(model: nn.Module, asked: Asked, tracker: Tracker) -> Gradients:
    """Follow the gradients of the model's step, under FSDP 2 where it is split."""
    return Sharded(model, asked, tracker) if asked.fsdp else Gradients(model, tracker)


def added(asked: Asked) -> float:
    """The width of a number of a gradient over that of one that gradients are added up in."""
    return 0.5 if asked.fsdp and asked.precision == "bf16_mixed" else 1.0


class Gradients:
    """Gradients that stay where they are made: added up in place."""

    def __init__(self, model: nn.Module, tracker: Tracker) -> None:
        self.tracker = tracker
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.handles: list[Any] = [parameter.register_post_accumulate_grad_hook(self.made) for parameter in self.parameters]

    def made(self, parameter: torch.Tensor) -> None:
        """A gradient is there, as it stays for the optimizer."""
        assert parameter.grad is not None
        self.tracker.label("gradients", [parameter.grad])
        self.tracker.took_over(self.tracker.size([parameter.grad]))

    def forwarded(self) -> None:
        """The forward pass is over."""

    def end(self) -> None:
        for handle in self.handles:
            handle.remove()


class Sharded(Gradients):
    """FSDP 2's: earlier batches left whole ones (as Accelerate's no_sync has it), in the type that they are reduced in.

    Where that is the type that they are computed in, autograd adds to what was left. Else FSDP adds a group's when its backward pass is
    over, before it lets go of the group's parameters, and copies what is then held of it for the reduction.
    """

    def __init__(self, model: nn.Module, asked: Asked, tracker: Tracker) -> None:
        super().__init__(model, tracker)
        self.wider = 1 / added(asked)
        self.seen: set[int] = set()
        self.added = 0
        tracker.let_go = self._added
        modules = [module for module in model.modules() if isinstance(module, torch.distributed.fsdp.FSDPModule)]
        self.handles += [module.register_forward_pre_hook(lambda module, _: self._find(module)) for module in modules]
        self.model = model

    def made(self, parameter: torch.Tensor) -> None:
        """This process' part of a gradient is there: its group has been reduced."""
        assert parameter.grad is not None
        self.tracker.label("gradients", [parameter.grad])

    def forwarded(self) -> None:
        self._find(self.model)  # what lies whole from the forward pass on, though no module was called that has it

    def _find(self, module: nn.Module) -> None:
        """Watch the whole parameters that a module has now; FSDP keeps these tensors, and only frees what they hold."""
        for parameter in module.parameters():
            if parameter.requires_grad and not hasattr(parameter, "_local_tensor") and id(parameter) not in self.seen:
                self.seen.add(id(parameter))
                self.handles.append(parameter.register_post_accumulate_grad_hook(self._whole))

    def _whole(self, parameter: torch.Tensor) -> None:
        """A whole gradient is there."""
        assert parameter.grad is not None
        own = self.tracker.size([parameter.grad])
        if self.wider == 1:
            self.tracker.took_over(own)
        else:
            self.added += own
            left = self.tracker.rounded(round(parameter.grad.untyped_storage().nbytes() * self.wider)) - own
            weakref.finalize(parameter.grad.untyped_storage(), self.tracker.took_over, left)  # once it is copied

    def _added(self) -> None:
        """A group's parameters are let go of."""
        self.tracker.took_over(self.added)
        self.added = 0

    def end(self) -> None:
        super().end()
        self.tracker.let_go = None
