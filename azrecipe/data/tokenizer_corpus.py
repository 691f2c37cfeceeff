"""The text that tokenizers are trained on: documents mixed by weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from azrecipe.data.cleaning_report import Tally
from azrecipe.data.readers import Located
from azrecipe.data.sources import mixed, text_hash

PORTION = 1_000_000  # characters that a trainer is given at a time


@dataclass
class Text:
    """What tokenizers are trained on: documents mixed by weight, held-out ones left out, tokens that stand outside BPE cut out.

    Iterating reads it once more, from the start; the counts are those of the last time.
    """

    sources: list[Located]
    max_bytes: int | None
    excluded: frozenset[bytes]
    outside: Sequence[str]
    bytes: list[int] = field(default_factory=list)
    documents: int = 0
    left_out: int = 0
    spelled_out: int = 0
    tallies: list[Tally] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        self.bytes = [0] * len(self.sources)
        self.documents = self.left_out = self.spelled_out = 0
        self.tallies = [Tally() for _ in self.sources]
        names = re.compile("|".join(map(re.escape, sorted(self.outside, key=len, reverse=True)))) if self.outside else None
        for i, text in mixed(self.sources, self.max_bytes, self.tallies):
            if text_hash(text) in self.excluded:
                self.left_out += 1
                continue
            self.bytes[i] += len(text.encode())
            self.documents += 1
            pieces = names.split(text) if names else [text]
            self.spelled_out += len(pieces) - 1
            for piece in filter(None, pieces):
                yield from _portions(piece)

    def report(self) -> dict[str, Any]:
        """What was read, for result.json."""
        total = sum(self.bytes)
        return {
            "documents": self.documents,
            "bytes": total,
            "held_out_left_out": self.left_out,
            "special_tokens_in_text": self.spelled_out,
            "sources": [
                {
                    "source": s.title,
                    "bytes": size,
                    "share": round(size / total, 4) if total else 0.0,
                    **({"cleaned": tally.report()} if s.cleaned else {}),
                }
                for s, size, tally in zip(self.sources, self.bytes, self.tallies, strict=True)
            ],
        }


def _portions(text: str) -> Iterator[str]:
    """A text, or a very long one (a whole corpus as one .txt file) in parts that end with a line."""
    at = 0
    while len(text) - at > PORTION:
        end = text.rfind("\n", at, at + PORTION) + 1 or at + PORTION
        yield text[at:end]
        at = end
    yield text[at:] if at else text
