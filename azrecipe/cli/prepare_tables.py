"""Print what `azrecipe prepare` tokenised, as tables.

The tables show the sources, the lengths of documents, and how often the phases read them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from azrecipe.cli.console import build_console
from azrecipe.data.preparation import PERCENTILES, PreparedText, count_dropped

if TYPE_CHECKING:
    from azrecipe.data.phase_schedule import PhaseSchedule

WIDTH = 160  # columns


def show_preparation(name: str, text: PreparedText) -> None:
    """Print the size of each source, and the lengths of its documents."""
    sizes = Table(title=f"{name}: text")
    sizes.add_column("source", overflow="fold")
    for column in ("documents", "bytes", "tokens", "bytes/token"):
        sizes.add_column(column, justify="right")
    sizes.add_column("left out (documents)", overflow="fold")
    lengths = Table(title="Tokens in a document, at percentiles")
    fits = Table(
        title="Share of the documents that fit so many tokens", caption=f"max_length is {text.max_length:,}; special tokens not counted"
    )
    for table in (lengths, fits):
        table.add_column("source", overflow="fold")
    for percentile in PERCENTILES:
        lengths.add_column("longest" if percentile == 100 else f"{percentile} %", justify="right")
    for length in text.compute_fitting_shares(0):
        fits.add_column(f"{length:,}", justify="right", style="bold" if length == text.max_length else None)
    for i, (source, store) in enumerate(zip(text.sources, text.stores, strict=True)):
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in count_dropped(store).items())
        bytes_per_token = f"{store.num_bytes / max(store.num_tokens, 1):.2f}"
        sizes.add_row(source.title, f"{store.num_documents:,}", f"{store.num_bytes:,}", f"{store.num_tokens:,}", bytes_per_token, dropped)
        lengths.add_row(source.title, *(f"{value:,}" for value in text.compute_percentiles(i).values()))
        fits.add_row(source.title, *(f"{share:.1%}" for share in text.compute_fitting_shares(i).values()))
    console = build_console(WIDTH)
    for table in (sizes, lengths, fits):
        console.print(table)


def show_schedule(text: PreparedText, schedule: PhaseSchedule) -> None:
    """Print what the phases read."""
    phases = Table(title="Phases")
    phases.add_column("phase")
    for column in ("steps", "sequences", "tokens", "fill"):
        phases.add_column(column, justify="right")
    for i, phase in enumerate(schedule.phases):
        sequences = phase.steps * schedule.global_batch_size
        tokens = schedule.build_dataset(i).count_tokens(sequences)
        phases.add_row(phase.name, f"{phase.steps:,}", f"{sequences:,}", f"{tokens:,}", f"{schedule.measure_fill(i):.2%}")
    reads = Table(title="Epochs of each source, to the end of the last phase")
    reads.add_column("source", overflow="fold")
    reads.add_column("epochs", justify="right")
    for source, epochs in zip(text.sources, schedule.source_epochs, strict=True):
        reads.add_row(source.title, f"{epochs:.2f}")
    console = build_console(WIDTH)
    for table in (phases, reads):
        console.print(table)
