"""What each kind of attention needs, and what `auto` stands for."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from azrecipe.distributed.backend import has_accelerator
from azrecipe.distributed.requirements import find_launcher_problem
from azrecipe.errors import CannotRun
from azrecipe.recipe import attention_kinds
from azrecipe.recipe.attention_kinds import AUTO, FLASH_PACKAGES, FLEX, ONLY_CAUSAL, VARLEN, find_width_problem

if TYPE_CHECKING:
    from azrecipe.recipe.load import Recipe

MIN_CAPABILITY = (8, 0)  # of a GPU: FlashAttention needs Ampere or newer


@dataclass(frozen=True)
class AttentionDevice:
    """A device, as far as attention depends on it.

    Attributes:
        name: The GPU's name; "" for a CPU.
        capability: Its compute capability.
        has_varlen: Whether its PyTorch has torch.nn.attention.varlen.
    """

    name: str = ""
    capability: tuple[int, int] = (0, 0)
    has_varlen: bool = True


@dataclass(frozen=True)
class AttentionUse:
    """What a run needs of its attention.

    Attributes:
        stage: The recipe's stage.
        precision: float32, bf16_mixed, bf16_pure or bfloat16.
        packed: Whether a sequence holds several documents.
        context_parallel_size: Processes that share a sequence.
        obstacles: Why this model cannot run a kind, by kind; `flash` stands for all kinds of flash attention.
        default: What transformers takes for this model by itself.
    """

    stage: str
    precision: str
    packed: bool = False
    context_parallel_size: int = 1
    obstacles: Mapping[str, str] = field(default_factory=dict)
    default: str = "sdpa"


class AttentionChoice(NamedTuple):
    """The attention of a run, and why `auto` took it."""

    name: str
    reason: str


def find_attention_device() -> AttentionDevice:
    """Find this process' device."""
    import torch

    has_varlen = importlib.util.find_spec("torch.nn.attention.varlen") is not None
    if not (torch.cuda.is_available() and has_accelerator()):
        return AttentionDevice(has_varlen=has_varlen)
    return AttentionDevice(torch.cuda.get_device_name(), torch.cuda.get_device_capability(), has_varlen)


def find_obstacle(name: str, use: AttentionUse, device: AttentionDevice) -> str:
    """Say why a kind of attention cannot run, or ""."""
    if reason := _find_model_obstacle(name, use):
        return reason
    if name == VARLEN:
        return _find_varlen_obstacle(use, device)
    if name == FLEX:
        training = use.stage in ("pretrain", "sft")
        return "PyTorch has no backward pass of it on a CPU" if training and not device.name else _find_flex_obstacle(device)
    return _find_flash_obstacle(name, use, device) if attention_kinds.is_flash(name) else ""


def _find_model_obstacle(name: str, use: AttentionUse) -> str:
    return use.obstacles.get(name) or (use.obstacles.get("flash", "") if attention_kinds.is_flash(name) else "")


def _find_varlen_obstacle(use: AttentionUse, device: AttentionDevice) -> str:
    if use.stage == "evaluate":
        return "it attends within packed documents, and prompts of different lengths are padded, which needs a mask"
    if not device.has_varlen:
        import torch

        return f"torch {torch.__version__} has no torch.nn.attention.varlen: torch 2.10 or newer"
    return _find_gpu_obstacle(use, device) if device.name else ""  # on a CPU a loop gives the same numbers, for tests


def _find_flex_obstacle(device: AttentionDevice) -> str:
    if device.name:
        problem = find_launcher_problem()
        return f"transformers compiles it, which needs {problem}" if problem else ""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["clang++" if sys.platform == "darwin" else "g++"]
    return "" if any(map(shutil.which, names)) else f"transformers compiles it, which needs a C++ compiler, and there is no {names[0]} here"


def _find_flash_obstacle(name: str, use: AttentionUse, device: AttentionDevice) -> str:
    has_kernels = importlib.util.find_spec("kernels") is not None
    if attention_kinds.is_hub_kernel(name):
        if not has_kernels:
            return "a kernel of the hub needs the package kernels: pip install kernels"
    elif not has_kernels and importlib.util.find_spec(FLASH_PACKAGES[name]) is None:
        package = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}[name]
        return (
            f"it needs a package that is not installed: {package}, or kernels (pip install kernels), which fetches a built one from the hub"
        )
    return _find_gpu_obstacle(use, device) if device.name else "it needs a GPU"


def _find_gpu_obstacle(use: AttentionUse, device: AttentionDevice) -> str:
    """Say why FlashAttention cannot run on a GPU, or ""."""
    if device.capability < MIN_CAPABILITY:
        major, minor = device.capability
        return f"a {device.name} has compute capability {major}.{minor}, and FlashAttention needs 8.0 or newer"
    if use.precision == "float32":
        return "it computes in bfloat16 only, and precision: float32 asks for float32: bf16_mixed, or another attention"
    return ""


def check_attention(name: str, use: AttentionUse, device: AttentionDevice | None = None) -> None:
    """Raise CannotRun for a named attention that cannot run here."""
    if reason := find_obstacle(name, use, device or find_attention_device()):
        key = "attn_implementation" if use.stage == "evaluate" else "model.attn_implementation"
        raise CannotRun(f"attn_implementation: {name}: {reason}. What runs here: --set {key}=auto")


def check_model_attention(recipe: Recipe, use: AttentionUse) -> None:
    """Raise RecipeError for a named attention that the model cannot run."""
    keys = ("attn_implementation",) if use.stage == "evaluate" else ("model", "attn_implementation")
    name = str(recipe.config.attn_implementation if use.stage == "evaluate" else recipe.config.model.attn_implementation)
    if reason := _find_model_obstacle(name, use):
        raise recipe.error(f"attn_implementation: {name}: {reason}", *keys)


def choose_attention(name: str, use: AttentionUse, device: AttentionDevice, earlier: str | None = None) -> AttentionChoice:
    """Choose the attention of a run.

    Args:
        name: What the recipe names.
        use: What the run needs.
        device: Its device.
        earlier: What an earlier start of the run took.

    Raises:
        CannotRun: The recipe names a kind that cannot run.
    """
    if name != AUTO:
        check_attention(name, use, device)
        return AttentionChoice(name, "")
    if earlier is not None and not find_obstacle(earlier, use, device):
        return AttentionChoice(earlier, "as at the run's earlier start")
    default = use.default if not use.obstacles.get(use.default) else "eager"
    if use.stage != "pretrain" or not use.packed:
        return AttentionChoice(default, "varlen is for pretraining on packed documents")
    if use.context_parallel_size > 1:
        return AttentionChoice(default, "sequences are split over processes")
    if not device.name:
        return AttentionChoice(default, "no GPU")
    if obstacle := find_obstacle(VARLEN, use, device):
        return AttentionChoice(default, f"no {VARLEN}: {obstacle}")
    return AttentionChoice(VARLEN, "packed documents without masks")


def find_config_obstacles(config: Mapping[str, Any]) -> dict[str, str]:
    """Find what a model's configuration says against varlen.

    A run asks the model itself (modeling/attention.py). A plan has its configuration alone.
    """
    has_window = config.get("sliding_window") is not None and config.get("use_sliding_window", True)
    features = [
        *(["a sliding window"] if has_window or "sliding_attention" in (config.get("layer_types") or ()) else []),
        *(["a soft cap"] if config.get("attn_logit_softcapping") else []),
        *(["dropout"] if config.get("attention_dropout") else []),
    ]
    if features:
        return {VARLEN: f"its attention has {' and '.join(features)}, and {ONLY_CAUSAL}"}
    width = config.get("head_dim") or config.get("hidden_size", 0) // max(config.get("num_attention_heads") or 1, 1)
    return {VARLEN: problem} if (problem := find_width_problem(int(width))) else {}
