"""The kinds of attention that a recipe can name, and their limits."""

from __future__ import annotations

AUTO = "auto"
VARLEN = "varlen"  # PyTorch's variable-length kernel: documents are isolated by their borders, without a mask
FLEX = "flex_attention"
FLASH_PACKAGES = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}  # the module of each package
MAX_HEAD_WIDTH, HEAD_WIDTH_MULTIPLE = 256, 8  # of FlashAttention's kernels
ONLY_CAUSAL = "PyTorch's variable-length kernel is for plain causal attention only"


def is_hub_kernel(name: str) -> bool:
    """Tell whether a name is a kernel's on the Hugging Face hub."""
    return "/" in name


def is_flash(name: str) -> bool:
    """Tell whether transformers runs a kind through its flash attention."""
    return name in FLASH_PACKAGES or is_hub_kernel(name)


def needs_borders(name: str) -> bool:
    """Tell whether a kind gets the borders of documents from the collator."""
    return name == VARLEN or is_flash(name)


def needs_half_precision(name: str) -> bool:
    """Tell whether a kind has no kernel for float32 on a GPU."""
    return needs_borders(name)


def makes_mask(name: str) -> bool:
    """Tell whether packed documents need a mask [tokens, tokens]."""
    return name in ("sdpa", "eager")


def find_width_problem(width: int) -> str:
    """Say why FlashAttention's kernels do not take a head's width, or ""."""
    if width > MAX_HEAD_WIDTH or width % HEAD_WIDTH_MULTIPLE:
        return f"its heads are {width} wide, and FlashAttention takes multiples of {HEAD_WIDTH_MULTIPLE} up to {MAX_HEAD_WIDTH}"
    return ""
