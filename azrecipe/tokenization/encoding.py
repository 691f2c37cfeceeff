"""Encode text to token ids, in this process or in others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # the label that PyTorch's cross entropy leaves out
BATCH_TEXTS = 256


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what a tokenizer does to text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode plain text without special tokens.

    Special tokens spelled out in the text stay ordinary text.
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


@contextmanager
def write_backend_file(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Write a tokenizer's backend to a temporary file for other processes.

    It is large, so each process reads it once, with `load_backend`.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        yield str(file)


@lru_cache(maxsize=1)
def load_backend(file: str) -> Tokenizer:
    """Load the backend in a file, without truncation and padding.

    The caller sets how it reads special tokens in texts.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(file)
    backend.no_truncation()
    backend.no_padding()
    return backend


def batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Batch texts, for the tokenizers library to encode in parallel."""
    iterator = iter(texts)
    while chunk := list(islice(iterator, BATCH_TEXTS)):
        yield chunk
