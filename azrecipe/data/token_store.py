"""Tokenised text: the arrays that a source becomes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from azrecipe.data.sources import text_hash
from azrecipe.tokenization.encoding import Ints


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


def held_out_hashes(held_out: Mapping[str, list[str]], came: Iterable[bytes] = ()) -> frozenset[bytes]:
    """The documents that no training may see: as they are measured, and by the hashes `came` as they were before a clean-up."""
    return frozenset((*(text_hash(text) for texts in held_out.values() for text in texts), *came))
