"""Liger's kernels: choose them, and prove that a model runs them.

Liger says nothing where it leaves a kernel out.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from azrecipe.errors import CannotRun, suggest_choices

if TYPE_CHECKING:
    from torch import nn

    from azrecipe.recipe.load import Recipe
    from azrecipe.recipe.types import Training

KERNELS = ("rope", "rms_norm", "swiglu", "geglu", "layer_norm", "cross_entropy", "fused_linear_cross_entropy")

LOSS_CHUNK_FACTOR = 8  # a chunk of logits is so many times larger than Liger's own, so that the float32 gradient is passed fewer times


def choose_kernels(training: Training) -> dict[str, bool] | None:
    """Choose the kernels for TrainingArguments.liger_kernel_config.

    Liger's fused loss is off where the recipe names another loss. None leaves the choice to Liger.
    """
    if not training.use_liger_kernel:
        return None
    settings = training.liger_kernel_config
    kernels = {name: value for name, value in asdict(settings).items() if value is not None} if settings is not None else {}
    loss = getattr(training, "fused_linear_cross_entropy", None)
    if loss == "torch":
        kernels |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    elif loss == "liger":
        kernels |= {"cross_entropy": False, "fused_linear_cross_entropy": True}
    elif kernels.get("cross_entropy") or kernels.get("fused_linear_cross_entropy"):
        # Liger refuses both at once, and one of them is its default
        kernels = {"cross_entropy": False, "fused_linear_cross_entropy": False, **kernels}
    return kernels or None


def build_loss_arguments(model: nn.Module) -> dict[str, Any]:
    """Build a model's arguments for Liger's fused loss; {} where another runs.

    The head's gradient is summed in float32, whatever its weights are in: in bfloat16 each part of the sum is rounded. The parts are
    larger than Liger's own, which pass a float32 gradient of the whole head once each; logits of a part take the room of 8 hidden states.
    """
    import torch

    if not _count_kernels(model)["fused_linear_cross_entropy"][0]:
        return {}
    return {"accum_dtype": torch.float32, "chunk_mem_const": LOSS_CHUNK_FACTOR}


def check_liger_kernels(recipe: Recipe, model_type: str) -> None:
    """Check that Liger has the kernels that a recipe names.

    Args:
        recipe: The recipe, with training.use_liger_kernel on.
        model_type: The architecture, as transformers names it.

    Raises:
        CannotRun: Liger is not installed, or has no kernels for this architecture.
        RecipeError: Liger lacks a kernel that the recipe names.
    """
    available = _list_available_kernels(model_type)
    training = recipe.config.training
    chosen = asdict(training.liger_kernel_config) if training.liger_kernel_config is not None else {}
    for name, value in (choose_kernels(training) or {}).items():
        if not value or name in available:
            continue
        keys = ("liger_kernel_config", name)
        if chosen.get(name) is None:
            keys = ("fused_linear_cross_entropy",)  # type: ignore[assignment]
        names = ", ".join(kernel for kernel in KERNELS if kernel in available)
        raise recipe.error(f"Liger has no {name} for a {model_type}. It has: {names}", "training", *keys)


def _list_available_kernels(model_type: str) -> dict[str, bool]:
    """List Liger's kernels for an architecture.

    The value tells whether a kernel is on by default.
    """
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise CannotRun("use_liger_kernel: true needs the package liger-kernel: pip install liger-kernel") from None
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        suggestion = suggest_choices(model_type, MODEL_TYPE_TO_APPLY_LIGER_FN, "It has")
        raise CannotRun(f"Liger has no kernels for a {model_type}: --set training.use_liger_kernel=false{suggestion}")
    parameters = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]).parameters
    return {name: bool(parameters[name].default) for name in KERNELS if name in parameters}


def list_active_kernels(model: nn.Module) -> list[str]:
    """List the kernels that run in a live model, wrapped or not.

    An entry says how many layers have the kernel where some lack it.
    """
    return [
        name if active == places else f"{name} in {active} of {places}"
        for name, (active, places) in _count_kernels(model).items()
        if active
    ]


def list_missing_kernels(model: nn.Module, kernel_config: Mapping[str, bool] | None) -> list[str]:
    """List the expected kernels that run nowhere in a live model.

    Expected are the kernels that `kernel_config` turns on and Liger's defaults that it does not turn off.
    """
    choices, counts = kernel_config or {}, _count_kernels(model)
    expected = {name for name, is_default in _list_available_kernels(_get_model_type(model)).items() if is_default and name != "layer_norm"}
    expected = (expected - {name for name, value in choices.items() if not value}) | {name for name, value in choices.items() if value}
    return [name for name in KERNELS if name in expected and not counts[name][0]]


def _count_kernels(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Count the places of a live model that run each kernel.

    It looks at the model's own functions and does not ask Liger. Returns (running, all) places by kernel.
    """
    import torch

    modules = list(model.modules())
    heads = [m for m in modules if "lm_head" in m._modules]
    return {
        "rope": _count_ligers(_list_rotary_functions(model)),
        "rms_norm": _count_ligers(m.forward for m in modules if "RMSNorm" in type(m).__name__),
        "swiglu": _count_ligers(_list_feed_forwards(model), "SwiGLU", "BlockSparseTop2MLP", "Experts"),
        "geglu": _count_ligers(_list_feed_forwards(model), "GEGLU"),
        "layer_norm": _count_ligers(m.forward for m in modules if isinstance(m, torch.nn.LayerNorm)),
        "cross_entropy": _count_ligers([torch.nn.functional.cross_entropy]),
        # Accelerate keeps the forward that its autocast wraps
        "fused_linear_cross_entropy": _count_ligers(getattr(m, "_original_forward", m.forward) for m in heads),
    }


def _get_model_type(model: nn.Module) -> str:
    """Get the architecture of a live model, wrapped or not."""
    configs = (getattr(m, "config", None) for m in model.modules())
    return next(str(config.model_type) for config in configs if hasattr(config, "model_type"))  # type: ignore[union-attr]


def _list_feed_forwards(model: nn.Module) -> list[Any]:
    """List the forward functions of the model's feed-forward layers."""
    return [m.forward for m in model.modules() if type(m).__name__.endswith(("MLP", "Experts")) or _is_ligers(m.forward, "LU", "Experts")]


def _list_rotary_functions(model: nn.Module) -> list[Any]:
    """List the rotary functions of the modules that define the model's attention."""
    modules_with_attention = {type(m).__module__ for m in model.modules() if "Attention" in type(m).__name__}
    functions = [getattr(sys.modules.get(module), "apply_rotary_pos_emb", None) for module in modules_with_attention]
    return [function for function in functions if function is not None]


def _is_ligers(function: Any, *names: str) -> bool:
    """Tell whether a function is Liger's.

    Its name must hold one of `names`, if there are any.
    """
    inner: Any = inspect.unwrap(getattr(function, "__func__", function))
    is_ligers = str(getattr(inner, "__module__", "")).startswith("liger_kernel")
    return is_ligers and (not names or any(name in inner.__qualname__ for name in names))


def _count_ligers(functions: Iterable[Any], *names: str) -> tuple[int, int]:
    """Count the functions that are Liger's, and all of them."""
    flags = [_is_ligers(function, *names) for function in functions]
    return sum(flags), len(flags)
