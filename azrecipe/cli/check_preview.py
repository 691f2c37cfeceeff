"""Print what a model will be trained on, for `azrecipe check`.

It shows an example with the trained tokens marked, and what each phase trains.
"""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from azrecipe.operations.check_preview import ExamplePreview, PretrainPreview, SftPreview
from azrecipe.utils.console import escape_controls, print_line
from azrecipe.utils.rich_console import open_console


def show_sft_preview(path: Path, preview: SftPreview) -> None:
    """Print the counts and the first example; of a preference, both answers."""
    counts = preview.counts
    print_line(f"{path}: {counts['train']:,} rows to train on, {counts['held_out']:,} held out, {counts['duplicates']:,} duplicates, {counts['dropped']:,} "
          f"dropped, {counts['truncated']:,} cut; {preview.steps:,} steps; {counts['trained_tokens']:,} trained tokens")  # fmt: skip
    if preview.new_tokens:
        print_line(f"  the template adds {', '.join(preview.new_tokens)}")
    print_line(f"  a turn ends with {preview.eos_token}, padding is {preview.pad_token}")
    console = open_console(None)
    for example in preview.examples:
        label = f", {example.label}" if example.label else ""
        console.print(f"\nThe first example{label}; the loss covers what is marked:")
        console.print(format_example(example, console.is_terminal and not console.no_color))
    console.print()


def format_example(example: ExamplePreview, colour: bool) -> Text:
    """Format an example's tokens, the trained ones marked.

    Dots separate tokens. Trained tokens are green with `colour`, and between ⟦ and ⟧ without it.
    """
    text = Text()
    for span in example.spans:
        if span.trained and not colour:
            text.append("⟦")
        for i, token in enumerate(span.tokens):
            text.append("·" if i else "", "dim")
            text.append(escape_controls(token), "bold green" if span.trained else "")
        if span.trained and not colour:
            text.append("⟧")
    if example.num_hidden_tokens:
        text.append(f" … {example.num_hidden_tokens} tokens more", "dim")
    return text


def show_pretrain_preview(path: Path, preview: PretrainPreview) -> None:
    """Print what each phase trains, and the first tokens of each source."""
    for phase in preview.phases:
        shares = ", ".join(f"{pattern} {count:,}" for pattern, count in phase.by_pattern.items())
        print_line(f"{path}: phase {phase.name} trains {phase.trainable:,} of {phase.total:,} parameters ({shares})")
        if phase.shares:
            read = zip(preview.sources, phase.shares, strict=True)
            print_line("  it reads " + ", ".join(f"{source.path} {share:.1%}" for source, share in read))
    for source in preview.sources:
        print_line(f"  {source.path} begins: {'·'.join(source.first_tokens)}".replace("\n", "⏎"))
