"""The text that tokenizers are trained on: documents mixed by weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from azrecipe.data.cleaning_report import CleaningReport
from azrecipe.data.readers import DataSource
from azrecipe.data.sources import announce_long_documents, hash_text, mix_documents

PORTION_CHARACTERS = 1_000_000  # the most that a trainer gets at a time


@dataclass
class TokenizerCorpus:
    """The text that tokenizers are trained on, read anew by each iteration.

    Held-out documents are left out, and added tokens are cut out of the text. The counts are those of the last iteration.

    Attributes:
        sources: The sources, which are mixed by weight.
        max_bytes: Where the text ends; None: when the first source runs out.
        excluded_hashes: Hashes of the held-out documents.
        added_tokens: The tokens outside BPE.
        source_bytes: The bytes of text of each source.
        num_documents: The documents of all sources.
        num_held_out: The held-out documents that were left out.
        num_special_tokens: The added tokens that were cut out.
        cleaning_reports: What the clean-up of each source did.
    """

    sources: list[DataSource]
    max_bytes: int | None
    excluded_hashes: frozenset[bytes]
    added_tokens: Sequence[str]
    source_bytes: list[int] = field(default_factory=list)
    num_documents: int = 0
    num_held_out: int = 0
    num_special_tokens: int = 0
    cleaning_reports: list[CleaningReport] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        self.source_bytes = [0] * len(self.sources)
        self.num_documents = self.num_held_out = self.num_special_tokens = 0
        self.cleaning_reports = [CleaningReport() for _ in self.sources]
        names = re.compile("|".join(map(re.escape, sorted(self.added_tokens, key=len, reverse=True)))) if self.added_tokens else None
        for i, text in mix_documents(self.sources, self.max_bytes, self.cleaning_reports):
            if hash_text(text) in self.excluded_hashes:
                self.num_held_out += 1
                continue
            self.source_bytes[i] += len(text.encode())
            self.num_documents += 1
            pieces = names.split(text) if names else [text]
            self.num_special_tokens += len(pieces) - 1
            for piece in filter(None, pieces):
                yield from _split_portions(piece)
        for source, report in zip(self.sources, self.cleaning_reports, strict=True):
            announce_long_documents(source, report)

    def to_dict(self) -> dict[str, Any]:
        """Summarise what was read for result.json."""
        total = sum(self.source_bytes)
        return {
            "documents": self.num_documents,
            "bytes": total,
            "held_out_left_out": self.num_held_out,
            "special_tokens_in_text": self.num_special_tokens,
            "sources": [
                {
                    "source": source.title,
                    "bytes": size,
                    "share": round(size / total, 4) if total else 0.0,
                    **({"cleaned": report.to_dict()} if source.has_report(report) else {}),
                }
                for source, size, report in zip(self.sources, self.source_bytes, self.cleaning_reports, strict=True)
            ],
        }


def _split_portions(text: str) -> Iterator[str]:
    """Split a very long text at ends of lines.

    A whole corpus can be one .txt file.
    """
    begin = 0
    while len(text) - begin > PORTION_CHARACTERS:
        end = text.rfind("\n", begin, begin + PORTION_CHARACTERS) + 1 or begin + PORTION_CHARACTERS
        yield text[begin:end]
        begin = end
    yield text[begin:] if begin else text
