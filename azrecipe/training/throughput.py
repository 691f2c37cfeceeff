"""How fast a training loop is, in the units that a reader wants: text bytes, words, and the chip's peak. docs/metrics.md defines them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from azrecipe.distributed.backend import has_accelerator
from azrecipe.hardware import card_of
from azrecipe.tokenization.encoding import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 1_000_000  # characters of held-out text that the words a token makes are counted on, at most


def peak_flops(device: str) -> float | None:
    """The peak of a device by its name, dense bfloat16 FLOP/s; None for one that is not known."""
    card = card_of(device)
    return None if card is None else card.bf16_tflops * 1e12


def chips_peak() -> float | None:
    """The same of the GPU that this process trains on; None without one, or for one that is not known."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() and has_accelerator() else None


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
