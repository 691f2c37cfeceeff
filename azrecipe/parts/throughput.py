"""How fast a training loop is, in the units that a reader wants: text bytes, words, and the chip's peak. docs/metrics.md defines them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from azrecipe.parts.backend import has_accelerator
from azrecipe.parts.tokens import encode

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # a mixture's configuration has one of them
SAMPLE = 1_000_000  # characters of held-out text that the words a token makes are counted on, at most

# Peak of dense bfloat16 matrix products with float32 sums, in TFLOP/s, from NVIDIA's data sheets and architecture papers (without
# sparsity; for GeForce cards these give half of what they give for float16 sums). The first name found in the device's counts.
PEAK_TFLOPS = {
    "B200": 2250,  # DGX B200 data sheet: 4.5 PFLOP/s with sparsity
    "H200 NVL": 835.5,  # H200 data sheet: 1,671 with sparsity
    "H200": 989.5,  # H200 data sheet: 1,979 with sparsity
    "GH200": 989.5,
    "H100 NVL": 835.5,  # H100 data sheet: 1,671 with sparsity
    "H100 PCIe": 756.5,  # H100 data sheet: 1,513 with sparsity
    "H100": 989.5,  # H100 data sheet, SXM: 1,979 with sparsity
    "A100": 312,  # A100 data sheet
    "L40S": 362.05,  # L40S data sheet
    "L4": 121,  # L4 data sheet: 242 with sparsity
    "A10G": 70,  # AWS' G5 and NVIDIA's A10G: 70 (the A10's data sheet says 125)
    "RTX 3090": 71,  # GA102 paper
    "RTX 4090": 165.2,  # Ada paper
    "RTX 5090": 209.5,  # RTX Blackwell paper
}


def peak_flops(device: str) -> float | None:
    """The peak of a device by its name, dense bfloat16 FLOP/s; None for one that is not known."""
    words = f" {device.replace('-', ' ')} ".upper()
    if " LAPTOP " in words:
        return None
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if f" {name.upper()} " in words), None)


def chips_peak() -> float | None:
    """The same of the GPU that this process trains on; None without one, or for one that is not known."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() and has_accelerator() else None


def flops_per_token(model: nn.Module, length: float) -> float | None:
    """Model FLOPs that training needs for a token of a sequence of `length`, for what trains in this model now.

    For each weight of a matrix: 2 forward, 2 for its own gradient where it trains, 2 for the gradient that passes through it to
    what trains below; attention likewise (PaLM, arXiv 2204.02311, appendix B). None for a mixture of experts.
    """
    causal: Any = model
    config = causal.config.get_text_config()
    if any(getattr(config, name, None) for name in EXPERTS):
        return None
    head, table = causal.get_output_embeddings().weight, causal.get_input_embeddings().weight
    body = [p for p in model.parameters() if p is not head and p is not table]
    order = [(0, table.requires_grad), *((_size(p) if p.dim() > 1 else 0, p.requires_grad) for p in body)]
    below = next((i for i, (_, trains) in enumerate(order) if trains), len(order))  # nothing trains below it
    passed = sum(size for size, _ in order[below + 1 :])
    every = sum(size for size, _ in order)
    own = sum(size for size, trains in order if trains)
    heads = getattr(config, "num_attention_heads", None) or 0
    width = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
    attention = 4.0 * config.num_hidden_layers * width * length
    in_head = _size(head) * (2 + 2 * head.requires_grad + 2 * (below < len(order)))
    return float(2 * (every + own + passed) + in_head + attention * (1 + 2 * passed / max(every, 1)))


def _size(parameter: torch.Tensor) -> int:
    return int(getattr(parameter, "ds_numel", 0) or parameter.numel())  # DeepSpeed's ZeRO 3 leaves an empty tensor in its place


def tokens_a_word(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Fertility on the first million characters of some documents: tokens / words, a word being what white space separates."""
    chosen, held = [], 0
    for text in texts:
        chosen.append(text)
        held += len(text)
        if held >= SAMPLE:
            break
    words = sum(len(text.split()) for text in chosen)
    return sum(map(len, encode(tokenizer, chosen))) / words if words else 0.0
