"""Liger's kernels: which a model can have, and the proof that it has them. Liger says nothing where it leaves one out."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from azrecipe.errors import CannotRun, hint

if TYPE_CHECKING:
    from torch import nn

    from azrecipe.recipe.load import Recipe
    from azrecipe.recipe.types import Training

KERNELS = ("rope", "rms_norm", "swiglu", "geglu", "layer_norm", "cross_entropy", "fused_linear_cross_entropy")


def choice(training: Training) -> dict[str, bool] | None:
    """TrainingArguments.liger_kernel_config: the kernels that a recipe names, and the fused loss off where another one runs."""
    if not training.use_liger_kernel:
        return None
    given = training.liger_kernel_config
    named = {name: value for name, value in asdict(given).items() if value is not None} if given is not None else {}
    loss = getattr(training, "fused_linear_cross_entropy", None)
    if loss == "torch":
        named |= {"cross_entropy": False, "fused_linear_cross_entropy": False}
    elif loss == "liger":
        named |= {"cross_entropy": False, "fused_linear_cross_entropy": True}
    elif named.get("cross_entropy") or named.get("fused_linear_cross_entropy"):  # Liger refuses both, and one of them is its default
        named = {"cross_entropy": False, "fused_linear_cross_entropy": False, **named}
    return named or None


def check(recipe: Recipe, model_type: str) -> None:
    """Raise CannotRun without Liger or for an architecture (transformers' model_type) that it has no kernels for, RecipeError
    for a kernel that is asked for and that this architecture has none of."""
    has = _parameters(model_type)
    training = recipe.config.training
    for name, value in (choice(training) or {}).items():
        if not value or name in has:
            continue
        place = ("liger_kernel_config", name)
        if getattr(training.liger_kernel_config, name, None) is None:
            place = ("fused_linear_cross_entropy",)  # type: ignore[assignment]
        there = ", ".join(kernel for kernel in KERNELS if kernel in has)
        raise recipe.problem(f"Liger has no {name} for a {model_type}. It has: {there}", "training", *place)


def _parameters(model_type: str) -> dict[str, bool]:
    """What Liger can put into an architecture, and whether it does so by itself."""
    try:
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN
    except ImportError:
        raise CannotRun("use_liger_kernel: true needs the package liger-kernel: pip install liger-kernel") from None
    if model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        known = hint(model_type, MODEL_TYPE_TO_APPLY_LIGER_FN, "It has")
        raise CannotRun(f"Liger has no kernels for a {model_type}, and would say nothing: --set training.use_liger_kernel=false{known}")
    parameters = inspect.signature(MODEL_TYPE_TO_APPLY_LIGER_FN[model_type]).parameters
    return {name: bool(parameters[name].default) for name in KERNELS if name in parameters}


def patched(model: nn.Module) -> list[str]:
    """The kernels that run in a live model, whatever is wrapped around it; one that some layers lack says how many have it."""
    return [name if has == of else f"{name} in {has} of {of}" for name, (has, of) in _found(model).items() if has]


def missing(model: nn.Module, asked: Mapping[str, bool] | None) -> list[str]:
    """The kernels that were asked for by name, or that Liger puts in by itself, and that run nowhere in a live model."""
    named, found = asked or {}, _found(model)
    wanted = {name for name, by_itself in _parameters(_model_type(model)).items() if by_itself and name != "layer_norm"}
    wanted = (wanted - {name for name, value in named.items() if not value}) | {name for name, value in named.items() if value}
    return [name for name in KERNELS if name in wanted and not found[name][0]]


def _found(model: nn.Module) -> dict[str, tuple[int, int]]:
    """For each kernel, in how many places of a live model it runs, of how many; looked for in the places, not asked of Liger."""
    import torch

    modules = list(model.modules())
    heads = [m for m in modules if "lm_head" in m._modules]
    return {
        "rope": _count(_rotary(model)),
        "rms_norm": _count(m.forward for m in modules if "RMSNorm" in type(m).__name__),
        "swiglu": _count(_feed_forwards(model), "SwiGLU", "BlockSparseTop2MLP", "Experts"),
        "geglu": _count(_feed_forwards(model), "GEGLU"),
        "layer_norm": _count(m.forward for m in modules if isinstance(m, torch.nn.LayerNorm)),
        "cross_entropy": _count([torch.nn.functional.cross_entropy]),
        # Accelerate keeps the forward that its autocast is wrapped around
        "fused_linear_cross_entropy": _count(getattr(m, "_original_forward", m.forward) for m in heads),
    }


def _model_type(model: nn.Module) -> str:
    configs = (getattr(m, "config", None) for m in model.modules())
    return next(str(config.model_type) for config in configs if hasattr(config, "model_type"))  # type: ignore[union-attr]


def _feed_forwards(model: nn.Module) -> list[Any]:
    return [m.forward for m in model.modules() if type(m).__name__.endswith(("MLP", "Experts")) or _is_ligers(m.forward, "LU", "Experts")]


def _rotary(model: nn.Module) -> list[Any]:
    """The functions that turn queries and keys, in the modules of transformers that the model's attention is written in."""
    homes = {type(m).__module__ for m in model.modules() if "Attention" in type(m).__name__}
    functions = [getattr(sys.modules.get(home), "apply_rotary_pos_emb", None) for home in homes]
    return [function for function in functions if function is not None]


def _is_ligers(function: Any, *names: str) -> bool:
    """Whether a function or bound method is Liger's, and its name holds one of `names`, if any are given."""
    inner: Any = inspect.unwrap(getattr(function, "__func__", function))
    is_ligers = str(getattr(inner, "__module__", "")).startswith("liger_kernel")
    return is_ligers and (not names or any(name in inner.__qualname__ for name in names))


def _count(functions: Iterable[Any], *names: str) -> tuple[int, int]:
    there = [_is_ligers(function, *names) for function in functions]
    return sum(there), len(there)
