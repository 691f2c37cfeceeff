"""An account of what a clean-up and filters changed and dropped."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from typing import Any

from azrecipe.data import unicode_scripts

SAMPLES = 5
CONTEXT = 30
EXCERPT = 200
Edit = tuple[int, int, str]  # from, to (exclusive), what stands there afterwards


def apply(text: str, edits: list[Edit]) -> str:
    """The text with its edits made; they stand in order and do not overlap."""
    pieces, at = [], 0
    for start, end, new in edits:
        pieces += [text[at:start], new]
        at = end
    return "".join([*pieces, text[at:]])


class Samples:
    """A few examples, those whose hash is lowest: spread over all that was offered, and the same in every run."""

    def __init__(self) -> None:
        self.kept: dict[bytes, dict[str, Any]] = {}

    def offer(self, what: str, make: Callable[[], dict[str, Any]]) -> None:
        """Keep make()'s sample of `what` if it is among the lowest; the same is kept once."""
        key = hashlib.blake2b(what.encode(), digest_size=8).digest()
        if key in self.kept or (len(self.kept) == SAMPLES and key > max(self.kept)):
            return
        self.kept[key] = make()
        if len(self.kept) > SAMPLES:
            del self.kept[max(self.kept)]

    def list(self) -> list[dict[str, Any]]:
        return [self.kept[key] for key in sorted(self.kept)]

    def packed(self) -> dict[str, Any]:
        return {key.hex(): sample for key, sample in self.kept.items()}

    @classmethod
    def unpacked(cls, data: Mapping[str, Any]) -> Samples:
        found = cls()
        found.kept = {bytes.fromhex(key): sample for key, sample in data.items()}
        return found

    def add(self, other: Samples) -> None:
        """Take over what was offered to another after this one."""
        both = {**other.kept, **self.kept}
        self.kept = {key: both[key] for key in sorted(both)[:SAMPLES]}


@dataclass
class Tally:
    """What was read of a source, bytes of UTF-8 text as it came; and what its clean-up changed, and then dropped."""

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

    def add(self, other: Tally) -> None:
        """Count in what another counted of the same source, after this one."""
        for name in ("documents", "bytes", "dropped_documents", "dropped_lines", "dropped_bytes", "changed_documents"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for mine, theirs in ((self.changed, other.changed), (self.filtered, other.filtered)):
            mine.update({key: mine.get(key, 0) + count for key, count in theirs.items()})
        self.dropped.add(other.dropped)
        for held, offered in ((self.edited, other.edited), (self.refused, other.refused)):
            for key, samples in offered.items():
                held.setdefault(key, Samples()).add(samples)

    def packed(self) -> dict[str, Any]:
        """As plain data, for `unpacked`."""
        found: dict[str, Any] = {**vars(self), "dropped": self.dropped.packed()}
        return found | {name: {key: held.packed() for key, held in getattr(self, name).items()} for name in ("edited", "refused")}

    @classmethod
    def unpacked(cls, data: Mapping[str, Any]) -> Tally:
        """What was packed."""
        found = {**data, "dropped": Samples.unpacked(data["dropped"])}
        return cls(**found | {name: {key: Samples.unpacked(held) for key, held in data[name].items()} for name in ("edited", "refused")})

    def refuse(self, reason: str, text: str, found: dict[str, Any]) -> None:
        """Count a document that a filter drops; `found` is what it found in it."""
        self.filtered[reason] = self.filtered.get(reason, 0) + 1
        self.refused.setdefault(reason, Samples()).offer(text[:EXCERPT], lambda: {"text": text[:EXCERPT], **found})

    def edit(self, step: str, text: str, edits: list[Edit]) -> None:
        """Count the characters that a step replaced or removed; the first of its edits is offered as a sample."""
        self.changed[step] = self.changed.get(step, 0) + sum(end - start for start, end, _ in edits)
        first, last = max(0, edits[0][0] - CONTEXT), edits[0][1] + CONTEXT
        before = text[first:last]
        near = [(start - first, end - first, new) for start, end, new in takewhile(lambda edit: edit[1] <= last, edits)]
        self.edited.setdefault(step, Samples()).offer(before, lambda: {"before": before, "after": apply(before, near)})

    def drop(self, text: str, kept: unicode_scripts.Kept) -> None:
        """Count what the script filter dropped of a document."""
        self.dropped_bytes += len(text.encode()) - len(kept.text.encode())
        self.dropped_documents += kept.document
        self.dropped_lines += len(kept.lines)
        for piece in kept.lines or (text,):
            self.dropped.offer(piece[:EXCERPT], partial(_excerpt, piece))

    def report(self) -> dict[str, Any]:
        """Counts and samples for meta.json and result.json."""
        samples = {"dropped": self.dropped.list(), **{name: held.list() for name, held in [*self.edited.items(), *self.refused.items()]}}
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "dropped_documents": self.dropped_documents,
            "dropped_lines": self.dropped_lines,
            "dropped_bytes": self.dropped_bytes,
            "changed_documents": self.changed_documents,
            "changed": dict(self.changed),
            **({"filtered": dict(self.filtered)} if self.filtered else {}),
            "samples": {name: found for name, found in samples.items() if found},
        }


def _excerpt(dropped: str) -> dict[str, Any]:
    return {"text": dropped[:EXCERPT], "scripts": unicode_scripts.shares(dropped)}


def nothing_left(tally: Tally) -> str:
    """The end of a complaint about a source without text: what its clean-up dropped of it."""
    dropped = tally.dropped_documents + sum(tally.filtered.values())
    who = "filters drop" if tally.filtered and not tally.dropped_documents else "clean-up drops"
    return f" (its {who} {dropped} of {tally.documents} documents)" if dropped else ""
