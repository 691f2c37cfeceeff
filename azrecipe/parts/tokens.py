"""Tokenised text on disk: each source once for each tokenizer, memory-mapped, whole or not there.

The store of a source is `tokens.bin` (uint32, all documents one after the other, no special tokens), `offsets.npy`
(int64, documents + 1: where each document starts) and `sizes.npy` (int64: its bytes of UTF-8 text).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from azrecipe.parts import corpus
from azrecipe.parts.files import locked, read_json, whole_folder, write_json
from azrecipe.parts.writing import Tally, nothing_left

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

FORMAT = 1
BATCH = 256


@dataclass(frozen=True)
class Store:
    """One tokenised source: tokens [all tokens] uint32, offsets [documents + 1], sizes [documents] in bytes."""

    key: str
    tokens: npt.NDArray[np.uint32]
    offsets: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    excluded: int
    cleaned: dict[str, Any] | None = None  # Tally.report() of a source with a clean-up

    @property
    def documents(self) -> int:
        return len(self.sizes)

    @cached_property
    def bytes(self) -> int:
        return int(self.sizes.sum())

    @property
    def count(self) -> int:
        """Tokens of all documents."""
        return len(self.tokens)

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of each document [documents]."""
        return np.diff(self.offsets)

    def document(self, nth: int) -> npt.NDArray[np.uint32]:
        """The tokens of one document."""
        return self.tokens[self.offsets[nth] : self.offsets[nth + 1]]


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


def text_hash(text: str) -> bytes:
    """A document's content, for telling whether two are the same."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def held_out_hashes(held_out: Mapping[str, list[str]]) -> frozenset[bytes]:
    """The documents that no training may see."""
    return frozenset(text_hash(text) for texts in held_out.values() for text in texts)


def store(located: corpus.Located, tokenizer: PreTrainedTokenizerBase, cache: Path, exclude: frozenset[bytes]) -> Store:
    """The tokenised source, from the cache or made now. Processes that start together wait for the one that makes it.

    Documents whose `text_hash` is in `exclude` (the held-out ones) are left out and counted. Raises RecipeError for a
    source without any text.
    """
    what = {
        "format": FORMAT,
        "source": corpus.identity(located),
        "tokenizer": tokenizer_hash(tokenizer),
        "exclude": hashlib.sha256(b"".join(sorted(exclude))).hexdigest(),
    }
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache / key
    if not folder.is_dir():
        with locked(cache / f"{key}.lock"):
            if not folder.is_dir():
                _make(located, tokenizer, folder, exclude)
    meta = read_json(folder / "meta.json")
    tokens = np.memmap(folder / "tokens.bin", dtype=np.uint32, mode="r")
    return Store(key, tokens, np.load(folder / "offsets.npy"), np.load(folder / "sizes.npy"), meta["excluded"], meta.get("cleaned"))


def _make(located: corpus.Located, tokenizer: PreTrainedTokenizerBase, folder: Path, exclude: frozenset[bytes]) -> None:
    counts: dict[str, Any] = {"excluded": 0}
    tally = Tally()
    offsets, sizes = array("q", [0]), array("q")
    told = time.monotonic()
    with whole_folder(folder, replace=False) as aside:
        with (aside / "tokens.bin").open("wb") as out:
            for batch in chunks(_kept(corpus.texts(located, tally=tally), exclude, counts)):
                for text, ids in zip(batch, encode(tokenizer, batch), strict=True):
                    out.write(np.asarray(ids, dtype=np.uint32).tobytes())
                    offsets.append(offsets[-1] + len(ids))
                    sizes.append(len(text.encode()))
                if time.monotonic() > told + 15:
                    told = time.monotonic()
                    print(f"  tokenising {located.title}: {len(sizes):,} documents, {offsets[-1]:,} tokens", file=sys.stderr, flush=True)
        if not sizes:
            why = f" ({counts['excluded']} documents are all held out)" if counts["excluded"] else ""
            raise located.wrong(f"{located.title} holds no text{why}{nothing_left(tally)}")
        if located.cleaned:
            counts["cleaned"] = tally.report()
        np.save(aside / "offsets.npy", np.asarray(offsets, dtype=np.int64))
        np.save(aside / "sizes.npy", np.asarray(sizes, dtype=np.int64))
        write_json(
            aside / "meta.json", {"title": located.title, "documents": len(sizes), "tokens": offsets[-1], "bytes": sum(sizes), **counts}
        )


def _kept(texts: Iterable[str], exclude: frozenset[bytes], counts: dict[str, Any]) -> Iterator[str]:
    for text in texts:
        if exclude and text_hash(text) in exclude:
            counts["excluded"] += 1
        else:
            yield text
