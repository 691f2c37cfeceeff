"""What `azrecipe prepare` found, as tables in a terminal: sources, lengths of documents, and how often phases read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from azrecipe.data.preparation import PERCENTILES, Prepared, dropped

if TYPE_CHECKING:
    from azrecipe.data.phase_schedule import Schedule


def show(name: str, made: Prepared) -> None:
    """What each source came to, and how long its documents are, on stdout."""
    sources = Table(title=f"{name}: text")
    sources.add_column("source", overflow="fold")
    for column in ("documents", "bytes", "tokens", "bytes/token"):
        sources.add_column(column, justify="right")
    sources.add_column("left out (documents)", overflow="fold")
    lengths = Table(title="Tokens in a document, at percentiles")
    fits = Table(
        title="Share of the documents that fit so many tokens", caption=f"max_length is {made.max_length:,}; special tokens not counted"
    )
    for table in (lengths, fits):
        table.add_column("source", overflow="fold")
    for percentile in PERCENTILES:
        lengths.add_column("longest" if percentile == 100 else f"{percentile} %", justify="right")
    for length in made.fits(0):
        fits.add_column(f"{length:,}", justify="right", style="bold" if length == made.max_length else None)
    for nth, (source, stored) in enumerate(zip(made.sources, made.stores, strict=True)):
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in dropped(stored).items())
        per_token = f"{stored.bytes / max(stored.count, 1):.2f}"
        sources.add_row(source.title, f"{stored.documents:,}", f"{stored.bytes:,}", f"{stored.count:,}", per_token, reasons)
        lengths.add_row(source.title, *(f"{value:,}" for value in made.percentiles(nth).values()))
        fits.add_row(source.title, *(f"{share:.1%}" for share in made.fits(nth).values()))
    for table in (sources, lengths, fits):
        _console().print(table)


def show_schedule(made: Prepared, schedule: Schedule) -> None:
    """What the phases read, on stdout."""
    phases = Table(title="Phases")
    phases.add_column("phase")
    for column in ("steps", "sequences", "tokens", "fill"):
        phases.add_column(column, justify="right")
    for nth, planned in enumerate(schedule.phases):
        sequences = planned.steps * schedule.global_batch_size
        tokens = schedule.dataset(nth).tokens_until(sequences)
        phases.add_row(planned.name, f"{planned.steps:,}", f"{sequences:,}", f"{tokens:,}", f"{schedule.fill(nth):.2%}")
    read = Table(title="Epochs of each source, to the end of the last phase")
    read.add_column("source", overflow="fold")
    read.add_column("epochs", justify="right")
    for source, epochs in zip(made.sources, schedule.epochs, strict=True):
        read.add_row(source.title, f"{epochs:.2f}")
    for table in (phases, read):
        _console().print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=160)
