"""The speed of a training loop: text bytes, words, and peak FLOP/s.

docs/metrics.md defines the units.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from azrecipe.distributed.backend import has_accelerator
from azrecipe.hardware import find_card
from azrecipe.tokenization.encoding import encode_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_SAMPLE_CHARACTERS = 1_000_000  # of held-out text that fertility is measured on


def get_peak_flops(device: str) -> float | None:
    """Get a device's peak dense bfloat16 FLOP/s, or None if unknown."""
    card = find_card(device)
    return None if card is None else card.bf16_tflops * 1e12


def get_local_peak_flops() -> float | None:
    """Get the peak FLOP/s of this process' GPU, or None."""
    return get_peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() and has_accelerator() else None


def measure_fertility(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Measure tokens per word on the first million characters of documents.

    Words are what white space separates.
    """
    sample, num_characters = [], 0
    for text in texts:
        sample.append(text)
        num_characters += len(text)
        if num_characters >= MAX_SAMPLE_CHARACTERS:
            break
    num_words = sum(len(text.split()) for text in sample)
    return sum(map(len, encode_texts(tokenizer, sample))) / num_words if num_words else 0.0
