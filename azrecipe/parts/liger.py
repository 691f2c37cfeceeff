"""Liger's kernels: whether a model can have them, and the proof that it has. Liger itself says nothing for a model it does not know."""

from __future__ import annotations

from typing import TYPE_CHECKING

from azrecipe.errors import CannotRun, hint

if TYPE_CHECKING:
    from torch import nn


def check(model_type: str) -> None:
    """Raise CannotRun for an architecture (transformers' model_type) that Liger has no kernels for, or without Liger."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise CannotRun("use_liger_kernel: true needs the package liger-kernel: pip install liger-kernel") from None
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = hint(model_type, MODEL_TYPE_TO_APPLY_LIGER_FN, "It has")
        raise CannotRun(f"Liger has no kernels for a {model_type}, and would say nothing: --set training.use_liger_kernel=false{known}")


def patched(model: nn.Module) -> list[str]:
    """The classes of a model whose forward is Liger's now."""
    return sorted({type(m).__name__ for m in model.modules() if getattr(m.forward, "__module__", "").startswith("liger_kernel")})
