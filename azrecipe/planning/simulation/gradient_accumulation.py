"""The gradients that earlier batches of an optimizer step left.

Only one batch is run. Earlier batches leave a gradient of every trainable number. The batch computes its gradients one after the other, and
each is added to what was left: from then on both need memory only once (`MemoryTracker.release_accumulated`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from azrecipe.planning.simulation.memory_tracker import MemoryTracker
from azrecipe.planning.simulation.step_spec import StepSpec


def track_gradients(model: nn.Module, spec: StepSpec, tracker: MemoryTracker) -> GradientTracker:
    """Track the gradients of the model's step."""
    return ShardedGradientTracker(model, spec, tracker) if spec.uses_fsdp else GradientTracker(model, tracker)


def get_grad_dtype_ratio(spec: StepSpec) -> float:
    """Return the size of a gradient's numbers over that of their sum's."""
    return 0.5 if spec.uses_fsdp and spec.precision == "bf16_mixed" else 1.0


class GradientTracker:
    """Tracks gradients that are summed in place."""

    def __init__(self, model: nn.Module, tracker: MemoryTracker) -> None:
        self.tracker = tracker
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.handles: list[Any] = [parameter.register_post_accumulate_grad_hook(self.on_gradient) for parameter in self.parameters]

    def on_gradient(self, parameter: torch.Tensor) -> None:
        """Label a gradient and release what earlier batches left of it."""
        assert parameter.grad is not None
        self.tracker.label("gradients", [parameter.grad])
        self.tracker.release_accumulated(self.tracker.count_bytes([parameter.grad]))

    def on_forward_end(self) -> None:
        """Note that the forward pass is over."""

    def remove_hooks(self) -> None:
        """Remove the hooks from the model."""
        for handle in self.handles:
            handle.remove()


class ShardedGradientTracker(GradientTracker):
    """Tracks FSDP 2's gradients.

    With Accelerate's no_sync, earlier batches leave unsharded gradients, in the dtype of the reduction. Where that is the dtype of the
    computation, autograd adds to them. Else FSDP adds a group's gradients when the group's backward pass is over, before it frees the
    group's parameters, and then copies what it holds of them for the reduction.
    """

    def __init__(self, model: nn.Module, spec: StepSpec, tracker: MemoryTracker) -> None:
        super().__init__(model, tracker)
        self.sum_ratio = 1 / get_grad_dtype_ratio(spec)
        self.watched: set[int] = set()  # ids of unsharded parameters with a hook
        self.group_bytes = 0  # gradients of the group that runs its backward pass
        tracker.on_free = self._release_group
        modules = [module for module in model.modules() if isinstance(module, torch.distributed.fsdp.FSDPModule)]
        self.handles += [module.register_forward_pre_hook(lambda module, _: self._watch_unsharded(module)) for module in modules]
        self.model = model

    def on_gradient(self, parameter: torch.Tensor) -> None:
        """Label this process' part of a gradient: its group has been reduced."""
        assert parameter.grad is not None
        self.tracker.label("gradients", [parameter.grad])

    def on_forward_end(self) -> None:
        """Watch parameters that were gathered without a call of their module."""
        self._watch_unsharded(self.model)

    def _watch_unsharded(self, module: nn.Module) -> None:
        """Watch the unsharded parameters that a module has now.

        FSDP keeps these tensors, and frees only their storage.
        """
        for parameter in module.parameters():
            if parameter.requires_grad and not hasattr(parameter, "_local_tensor") and id(parameter) not in self.watched:
                self.watched.add(id(parameter))
                self.handles.append(parameter.register_post_accumulate_grad_hook(self._on_unsharded_gradient))

    def _on_unsharded_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        size = self.tracker.count_bytes([parameter.grad])
        if self.sum_ratio == 1:
            self.tracker.release_accumulated(size)
        else:
            self.group_bytes += size
            storage = parameter.grad.untyped_storage()
            remainder = self.tracker.round_up(round(storage.nbytes() * self.sum_ratio)) - size
            weakref.finalize(storage, self.tracker.release_accumulated, remainder)  # when FSDP has copied it

    def _release_group(self) -> None:
        """Release the gradients of a group whose parameters FSDP frees."""
        self.tracker.release_accumulated(self.group_bytes)
        self.group_bytes = 0

    def remove_hooks(self) -> None:
        """Remove the hooks from the model and the tracker."""
        super().remove_hooks()
        self.tracker.on_free = None
