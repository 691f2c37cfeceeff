"""Text to token ids, in this process or in others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # the label that PyTorch's cross entropy leaves out


BATCH = 256

Ints = npt.NDArray[np.int64]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """A name for what a tokenizer does to text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain text, no specials added; special tokens spelled out in the text stay ordinary text."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


@contextmanager
def on_disk(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """A file that other processes open a tokenizer from with `reader`: it is large, and each reads it once."""
    with TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        yield str(file)


@lru_cache(maxsize=1)
def reader(file: str) -> Tokenizer:
    """The backend in a file, set to cut whole texts; how it reads special tokens in them is the caller's to set."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(file)
    backend.no_truncation()
    backend.no_padding()
    return backend


def chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """The texts in lists of BATCH: what the tokenizers library works on in parallel."""
    iterator = iter(texts)
    while chunk := list(islice(iterator, BATCH)):
        yield chunk
