"""Count and sample what a clean-up and filters changed and dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any, NamedTuple

from azrecipe.data import unicode_scripts

MAX_SAMPLES = 5
CONTEXT_CHARACTERS = 30
EXCERPT_CHARACTERS = 200
LONG_DOCUMENT = "max_document_bytes"  # the reason under which such documents are counted


class Edit(NamedTuple):
    """A replacement for the characters from `start` to before `end`."""

    start: int
    end: int
    replacement: str


def apply_edits(text: str, edits: list[Edit]) -> str:
    """Apply ordered edits that do not overlap to a text."""
    pieces, position = [], 0
    for edit in edits:
        pieces += [text[position : edit.start], edit.replacement]
        position = edit.end
    return "".join([*pieces, text[position:]])


class Samples:
    """A few examples, those with the lowest hashes.

    So they are spread over all that was offered, and the same in every run.
    """

    def __init__(self) -> None:
        self.by_hash: dict[bytes, dict[str, Any]] = {}

    def offer(self, text: str, build: Callable[[], dict[str, Any]]) -> None:
        """Keep the sample that `build` returns if the text's hash is low."""
        key = hashlib.blake2b(text.encode(), digest_size=8).digest()
        if key in self.by_hash or (len(self.by_hash) == MAX_SAMPLES and key > max(self.by_hash)):
            return
        self.by_hash[key] = build()
        if len(self.by_hash) > MAX_SAMPLES:
            del self.by_hash[max(self.by_hash)]

    def to_list(self) -> list[dict[str, Any]]:
        return [self.by_hash[key] for key in sorted(self.by_hash)]

    def to_state(self) -> dict[str, Any]:
        return {key.hex(): sample for key, sample in self.by_hash.items()}

    @classmethod
    def from_state(cls, data: Mapping[str, Any]) -> Samples:
        samples = cls()
        samples.by_hash = {bytes.fromhex(key): sample for key, sample in data.items()}
        return samples

    def merge(self, other: Samples) -> None:
        """Merge the samples that were offered to another after this one."""
        both = {**other.by_hash, **self.by_hash}
        self.by_hash = {key: both[key] for key in sorted(both)[:MAX_SAMPLES]}


@dataclass
class CleaningReport:
    """What was read, changed and dropped of a source.

    Attributes:
        documents: The documents that were read.
        bytes: Their bytes of UTF-8 text before the clean-up.
        dropped_documents: The documents that the clean-up dropped as a whole.
        dropped_lines: The lines that the script filter dropped of others.
        dropped_bytes: The bytes of these documents and lines.
        changed_documents: The documents that the steps of the clean-up changed.
        changed: The characters that each step replaced or removed.
        filtered: The documents that each quality filter dropped.
        dropped: Samples of what the clean-up dropped.
        edited: Samples of the changes of each step.
        refused: Samples of the documents that each quality filter dropped.
        first_long_document: The place of the first document that is longer than max_document_bytes, or "".
    """

    documents: int = 0
    bytes: int = 0
    dropped_documents: int = 0
    dropped_lines: int = 0
    dropped_bytes: int = 0
    changed_documents: int = 0
    changed: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)
    dropped: Samples = field(default_factory=Samples)
    edited: dict[str, Samples] = field(default_factory=dict)
    refused: dict[str, Samples] = field(default_factory=dict)
    first_long_document: str = ""

    def merge(self, other: CleaningReport) -> None:
        """Merge the counts and samples of a later part of the source."""
        for name in ("documents", "bytes", "dropped_documents", "dropped_lines", "dropped_bytes", "changed_documents"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.changed, other.changed), (self.filtered, other.filtered)):
            mine.update({key: mine.get(key, 0) + count for key, count in theirs.items()})
        self.first_long_document = self.first_long_document or other.first_long_document
        self.dropped.merge(other.dropped)
        for mine_samples, their_samples in ((self.edited, other.edited), (self.refused, other.refused)):
            for key, samples in their_samples.items():
                mine_samples.setdefault(key, Samples()).merge(samples)

    def to_state(self) -> dict[str, Any]:
        """Convert to plain data, which `from_state` reads."""
        state: dict[str, Any] = {**vars(self), "dropped": self.dropped.to_state()}
        return state | {name: {key: samples.to_state() for key, samples in getattr(self, name).items()} for name in ("edited", "refused")}

    @classmethod
    def from_state(cls, data: Mapping[str, Any]) -> CleaningReport:
        """Convert back what `to_state` returned."""
        state = {**data, "dropped": Samples.from_state(data["dropped"])}
        return cls(
            **state | {name: {key: Samples.from_state(samples) for key, samples in data[name].items()} for name in ("edited", "refused")}
        )

    def record_refusal(self, reason: str, text: str, values: dict[str, Any]) -> None:
        """Record a document that a quality filter drops, with measured values."""
        self.filtered[reason] = self.filtered.get(reason, 0) + 1
        self.refused.setdefault(reason, Samples()).offer(text[:EXCERPT_CHARACTERS], lambda: {"text": text[:EXCERPT_CHARACTERS], **values})

    def record_long_document(self, place: str, excerpt: str) -> None:
        """Record a document that is longer than max_document_bytes."""
        self.documents += 1
        self.first_long_document = self.first_long_document or place
        self.record_refusal(LONG_DOCUMENT, excerpt, {"place": place})

    def record_edits(self, step: str, text: str, edits: list[Edit]) -> None:
        """Record the edits of a step; the first becomes a sample."""
        self.changed[step] = self.changed.get(step, 0) + sum(edit.end - edit.start for edit in edits)
        first, last = max(0, edits[0].start - CONTEXT_CHARACTERS), edits[0].end + CONTEXT_CHARACTERS
        before = text[first:last]
        near = [Edit(edit.start - first, edit.end - first, edit.replacement) for edit in takewhile(lambda edit: edit.end <= last, edits)]
        self.edited.setdefault(step, Samples()).offer(before, lambda: {"before": before, "after": apply_edits(before, near)})

    def record_drop(self, text: str, filtered: unicode_scripts.ScriptFilterResult) -> None:
        """Record what the script filter dropped of a document."""
        self.dropped_bytes += len(text.encode()) - len(filtered.text.encode())
        self.dropped_documents += filtered.document_dropped
        self.dropped_lines += len(filtered.dropped_lines)
        for piece in filtered.dropped_lines or (text,):
            self.dropped.offer(piece[:EXCERPT_CHARACTERS], partial(_excerpt, piece))

    def to_dict(self) -> dict[str, Any]:
        """Convert to the counts and samples of meta.json and result.json."""
        samples = {
            "dropped": self.dropped.to_list(),
            **{name: entry.to_list() for name, entry in [*self.edited.items(), *self.refused.items()]},
        }
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "dropped_documents": self.dropped_documents,
            "dropped_lines": self.dropped_lines,
            "dropped_bytes": self.dropped_bytes,
            "changed_documents": self.changed_documents,
            "changed": dict(self.changed),
            **({"filtered": dict(self.filtered)} if self.filtered else {}),
            **({"first_long_document": self.first_long_document} if self.first_long_document else {}),
            "samples": {name: entries for name, entries in samples.items() if entries},
        }


def _excerpt(dropped: str) -> dict[str, Any]:
    return {"text": dropped[:EXCERPT_CHARACTERS], "scripts": unicode_scripts.compute_script_shares(dropped)}


def explain_missing_text(report: CleaningReport) -> str:
    """Explain at the end of an error why no text is left."""
    dropped = report.dropped_documents + sum(report.filtered.values())
    if report.first_long_document:
        return f" ({report.filtered[LONG_DOCUMENT]} of {report.documents} documents are longer than max_document_bytes, the first at {report.first_long_document})"
    who = "filters drop" if report.filtered and not report.dropped_documents else "clean-up drops"
    return f" (its {who} {dropped} of {report.documents} documents)" if dropped else ""
