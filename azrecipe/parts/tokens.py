"""Tokenised text: the arrays that a source becomes, and the tokenizer that makes them, in this process or in others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from azrecipe.parts.corpus import text_hash

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

__all__ = ["Store", "chunks", "encode", "held_out_hashes", "on_disk", "reader", "text_hash", "tokenizer_hash"]

BATCH = 256

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Store:
    """One tokenised source. Documents are numbered among those that are kept.

    tokens [all tokens] uint32 and offsets [all documents + 1] are of everything that was tokenised; sizes [documents] in
    bytes of UTF-8 text are of the kept ones, and so are kept [documents], their numbers among all (None: all are), hashes
    [documents, 2] uint64 of their text, and signatures [documents, hashes] uint32 for MinHash. `duplicates` says what a
    deduplication left out.
    """

    key: str
    tokens: npt.NDArray[np.uint32]
    offsets: Ints
    sizes: Ints
    excluded: int
    cleaned: dict[str, Any] | None = None  # Tally.report() of a source with a clean-up or filters
    hashes: npt.NDArray[np.uint64] | None = None
    signatures: npt.NDArray[np.uint32] | None = None
    kept: Ints | None = None
    duplicates: dict[str, Any] | None = None

    @property
    def documents(self) -> int:
        return len(self.sizes)

    @cached_property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def lengths(self) -> Ints:
        """Tokens of each document, [documents]."""
        lengths: Ints = np.diff(self.offsets)
        return lengths if self.kept is None else lengths[self.kept]

    @cached_property
    def count(self) -> int:
        """Tokens of all documents together."""
        return int(self.lengths.sum())

    def document(self, nth: int) -> npt.NDArray[np.uint32]:
        """The tokens of a document, no special ones."""
        raw = nth if self.kept is None else int(self.kept[nth])
        return self.tokens[self.offsets[raw] : self.offsets[raw + 1]]

    def only(self, kept: Ints, key: str, duplicates: dict[str, Any]) -> Store:
        """The same with no documents but those numbered in `kept`, under a key of its own."""
        before = kept if self.kept is None else self.kept[kept]
        return replace(self, key=key, sizes=self.sizes[kept], kept=before, duplicates=duplicates).light()

    def light(self) -> Store:
        """The same without what only the search for duplicates reads."""
        return replace(self, hashes=None, signatures=None)


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


def held_out_hashes(held_out: Mapping[str, list[str]], came: Iterable[bytes] = ()) -> frozenset[bytes]:
    """The documents that no training may see: as they are measured, and by the hashes `came` as they were before a clean-up."""
    return frozenset((*(text_hash(text) for texts in held_out.values() for text in texts), *came))
