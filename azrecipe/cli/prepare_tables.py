"""Print what `azrecipe prepare` tokenised, as tables.

The tables show the sources, the lengths of documents, and how often the phases read them.
"""

from __future__ import annotations

from rich.table import Table

from azrecipe.operations.prepare import RecipePreparation, ScheduleSummary
from azrecipe.utils.rich_console import open_console

WIDTH = 160  # columns


def show_sources(preparation: RecipePreparation) -> None:
    """Print the size of each source, and the lengths of its documents."""
    sizes = Table(title=f"{preparation.path.name}: text")
    sizes.add_column("source", overflow="fold")
    for column in ("documents", "bytes", "tokens", "bytes/token"):
        sizes.add_column(column, justify="right")
    sizes.add_column("left out (documents)", overflow="fold")
    lengths = Table(title="Tokens in a document, at percentiles")
    fits = Table(
        title="Share of the documents that fit so many tokens",
        caption=f"max_length is {preparation.max_length:,}; special tokens not counted",
    )
    for table in (lengths, fits):
        table.add_column("source", overflow="fold")
    first = preparation.sources[0]
    for percentile in first.length_percentiles:
        lengths.add_column("longest" if percentile == 100 else f"{percentile} %", justify="right")
    for length in first.fitting_shares:
        fits.add_column(f"{length:,}", justify="right", style="bold" if length == preparation.max_length else None)
    for source in preparation.sources:
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in source.dropped.items())
        bytes_per_token = f"{source.num_bytes / max(source.num_tokens, 1):.2f}"
        counts = (f"{count:,}" for count in (source.num_documents, source.num_bytes, source.num_tokens))
        sizes.add_row(source.title, *counts, bytes_per_token, dropped)
        lengths.add_row(source.title, *(f"{value:,}" for value in source.length_percentiles.values()))
        fits.add_row(source.title, *(f"{share:.1%}" for share in source.fitting_shares.values()))
    console = open_console(WIDTH)
    for table in (sizes, lengths, fits):
        console.print(table)


def show_schedule(preparation: RecipePreparation, schedule: ScheduleSummary) -> None:
    """Print what the phases read."""
    phases = Table(title="Phases")
    phases.add_column("phase")
    for column in ("steps", "sequences", "tokens", "fill"):
        phases.add_column(column, justify="right")
    for phase in schedule.phases:
        phases.add_row(phase.name, f"{phase.steps:,}", f"{phase.sequences:,}", f"{phase.tokens:,}", f"{phase.fill:.2%}")
    reads = Table(title="Epochs of each source, to the end of the last phase")
    reads.add_column("source", overflow="fold")
    reads.add_column("epochs", justify="right")
    for source, epochs in zip(preparation.sources, schedule.epochs, strict=True):
        reads.add_row(source.title, f"{epochs:.2f}")
    tables = [phases, reads]
    if any(phase.shares for phase in schedule.phases):
        mix = Table(title="Share of each source in the text of a phase")
        mix.add_column("source", overflow="fold")
        for phase in schedule.phases:
            mix.add_column(phase.name, justify="right")
        for i, source in enumerate(preparation.sources):
            mix.add_row(source.title, *(f"{phase.shares[i]:.1%}" for phase in schedule.phases))
        tables.append(mix)
    console = open_console(WIDTH)
    for table in tables:
        console.print(table)
