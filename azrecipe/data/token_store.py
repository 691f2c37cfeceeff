"""Tokenised text: the arrays of a source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from azrecipe.data.sources import hash_text
from azrecipe.utils.bootstrap import IntArray


@dataclass(frozen=True)
class TokenStore:
    """One tokenised source, perhaps without some of its documents.

    Attributes:
        key: A name for the content.
        tokens: The tokens of everything that was tokenised, [all tokens].
        offsets: Where each document that was tokenised begins and the last ends, [all documents + 1].
        sizes: The bytes of UTF-8 text of each document of this store, [documents].
        num_held_out: The documents that were left out because they are held out.
        cleaning_report: `CleaningReport.to_dict()` of a source with a clean-up or filters.
        hashes: Hashes of the text of each document, [documents, 2].
        signatures: MinHash signatures of each document, [documents, hashes].
        document_indices: The numbers of this store's documents among all that were tokenised, [documents]; None: all.
        duplicates: The counts and samples of what a deduplication left out.
    """

    key: str
    tokens: npt.NDArray[np.uint32]
    offsets: IntArray
    sizes: IntArray
    num_held_out: int
    cleaning_report: dict[str, Any] | None = None
    hashes: npt.NDArray[np.uint64] | None = None
    signatures: npt.NDArray[np.uint32] | None = None
    document_indices: IntArray | None = None
    duplicates: dict[str, Any] | None = None

    @property
    def num_documents(self) -> int:
        return len(self.sizes)

    @cached_property
    def num_bytes(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def lengths(self) -> IntArray:
        """Tokens of each document, [documents]."""
        lengths: IntArray = np.diff(self.offsets)
        return lengths if self.document_indices is None else lengths[self.document_indices]

    @cached_property
    def num_tokens(self) -> int:
        """The tokens of all documents together."""
        return int(self.lengths.sum())

    def read_document(self, document: int) -> npt.NDArray[np.uint32]:
        """Read the tokens of a document, without special tokens, [tokens]."""
        index = document if self.document_indices is None else int(self.document_indices[document])
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def select_documents(self, selected: IntArray, key: str, duplicates: dict[str, Any]) -> TokenStore:
        """Copy the store with some of its documents.

        Args:
            selected: The numbers of the documents, [selected].
            key: A name for the content of the copy.
            duplicates: What the other documents repeat.
        """
        indices = selected if self.document_indices is None else self.document_indices[selected]
        return replace(self, key=key, sizes=self.sizes[selected], document_indices=indices, duplicates=duplicates).without_hashes()

    def without_hashes(self) -> TokenStore:
        """Copy the store without what only the search for duplicates reads."""
        return replace(self, hashes=None, signatures=None)


def hash_held_out(held_out: Mapping[str, list[str]], raw_hashes: Iterable[bytes] = ()) -> frozenset[bytes]:
    """Hash the held-out documents, which no training may see.

    Args:
        held_out: The documents of each validation set, after their clean-up.
        raw_hashes: Hashes of the documents before their clean-up.
    """
    return frozenset((*(hash_text(text) for texts in held_out.values() for text in texts), *raw_hashes))
