"""Count what was tokenised of a source, and print the progress."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from azrecipe.data.cleaning_report import CleaningReport
from azrecipe.utils.console import print_progress

PROGRESS_SECONDS = 15


@dataclass
class PieceStats:
    """Counts of a piece, or of all pieces so far.

    Attributes:
        num_held_out: The documents that were left out because they are held out.
        bytes_read: The bytes of text with these documents.
        documents: The documents without them.
        tokens: The tokens of these.
        bytes: The bytes of text of these.
        report: What the clean-up did.
    """

    num_held_out: int = 0
    bytes_read: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    report: CleaningReport = field(default_factory=CleaningReport)

    def merge(self, other: PieceStats) -> None:
        """Add the counts of a later piece."""
        for name in ("num_held_out", "bytes_read", "documents", "tokens", "bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.report.merge(other.report)

    def to_state(self) -> dict[str, Any]:
        """Convert to plain data for state.json."""
        return {
            "excluded": self.num_held_out,
            "read": self.bytes_read,
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "tally": self.report.to_state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PieceStats:
        """Convert back what `to_state` returned."""
        return cls(
            num_held_out=state["excluded"],
            bytes_read=state["read"],
            documents=state["documents"],
            tokens=state["tokens"],
            bytes=state["bytes"],
            report=CleaningReport.from_state(state["tally"]),
        )


class TokenizeProgress:
    """Prints a line about the progress every PROGRESS_SECONDS."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.start_time = self.line_time = time.monotonic()
        self.first_counts: tuple[int, int] | None = None  # tokens and bytes of the first update

    def update(self, stats: PieceStats) -> None:
        """Print a line if it is time for one."""
        if self.first_counts is None:
            self.first_counts = (stats.tokens, stats.bytes_read)
        if time.monotonic() > self.line_time + PROGRESS_SECONDS:
            self.print_line(stats)

    def print_line(self, stats: PieceStats, message: str = "", min_seconds: float = 0) -> None:
        """Print a line about the progress after at least `min_seconds`."""
        self.line_time = time.monotonic()
        seconds = self.line_time - self.start_time
        if seconds < min_seconds:
            return
        first_tokens, first_bytes = self.first_counts or (stats.tokens, stats.bytes_read)
        tokens_rate, bytes_rate = (stats.tokens - first_tokens) / max(seconds, 1), (stats.bytes_read - first_bytes) / max(seconds, 1)
        rate = f", {tokens_rate:,.0f} tokens/s, {bytes_rate / 1e6:.1f} MB/s" if seconds > 1 else ""
        counts = f"{stats.documents:,} documents, {stats.tokens:,} tokens{rate}"
        print_progress(f"  tokenising {self.title}: {message or counts}{f' ({counts})' if message else ''}")
