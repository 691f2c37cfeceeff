"""What a model will be shown, for people: an example with the tokens marked that the loss covers, and what each phase trains."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from azrecipe.recipe.load import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from azrecipe.modeling.parameter_groups import Trained
    from azrecipe.tokenization.chat_templates import Example

SHOWN = 400  # tokens of an example
BEGIN = 24  # tokens of a document


def show_tuning(recipe: Recipe, checked: Any) -> None:
    """Counts, and the first example; of a preference both answers."""
    rows, plan, tokenizer = checked.examples, checked.plan, checked.base.tokenizer
    counts = rows.counts
    print(f"{recipe.path}: {counts['train']:,} rows to train on, {counts['held_out']:,} held out, {counts['duplicates']:,} duplicates, {counts['dropped']:,} "
          f"dropped, {counts['truncated']:,} cut; {plan.steps:,} steps; {counts['trained_tokens']:,} trained tokens")  # fmt: skip
    if checked.new_tokens:
        print(f"  the template adds {', '.join(tokenizer.convert_ids_to_tokens(checked.new_tokens))}")
    print(f"  a turn ends with {tokenizer.eos_token}, padding is {tokenizer.pad_token}")
    first = rows.train[0].example
    shown = [("chosen", first.side(True)), ("rejected", first.side(False))] if hasattr(first, "side") else [("", first)]
    console = Console(highlight=False, soft_wrap=True)
    for name, example in shown:
        console.print(f"\nThe first example{f', {name}' if name else ''}; the loss covers what is marked:")
        console.print(marked(tokenizer, example, console.is_terminal and not console.no_color))
    console.print()


def marked(tokenizer: PreTrainedTokenizerBase, example: Example, colour: bool) -> Text:
    """An example's tokens, those that the loss covers green on a terminal, between ⟦ ⟧ elsewhere; a dot stands between tokens."""
    text = Text()
    ids, on = example.input_ids[:SHOWN], [label != -100 for label in example.labels[:SHOWN]]
    for begin, end, trained in _runs(on):
        if trained and not colour:
            text.append("⟦")
        for n, piece in enumerate(_pieces(tokenizer, ids[begin:end])):
            text.append("·" if n else "", "dim")
            text.append(piece, "bold green" if trained else "")
        if trained and not colour:
            text.append("⟧")
    if len(example.input_ids) > SHOWN:
        text.append(f" … {len(example.input_ids) - SHOWN} tokens more", "dim")
    return text


def _runs(on: Sequence[bool]) -> list[tuple[int, int, bool]]:
    """Stretches of the same kind: begin, end, kind."""
    borders = [0, *(n for n in range(1, len(on)) if on[n] != on[n - 1]), len(on)]
    return [(a, b, on[a]) for a, b in pairwise(borders) if a < b]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token; those that are part of a character are shown with the ones that complete it."""
    found, held = [], list[int]()
    for token in ids:
        held.append(token)
        piece = str(tokenizer.decode(held, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if not piece.endswith("�"):
            found.append(piece)
            held = []
    return [*found, str(tokenizer.decode(held))] if held else found


def show_phases(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, trained: Sequence[Trained], begins: Sequence[str]) -> None:
    """What each phase trains, and how each source begins as tokens."""
    for phase, each in zip(recipe.config.phases, trained, strict=True):
        shares = ", ".join(f"{pattern} {count:,}" for pattern, count in each.by_pattern.items())
        print(f"{recipe.path}: phase {phase.name} trains {each.trainable:,} of {each.total:,} parameters ({shares})")
    for source, text in zip(recipe.config.data.datasets, begins, strict=True):
        ids = tokenizer(text[:1000], add_special_tokens=False)["input_ids"][:BEGIN]
        print(f"  {source.path} begins: {'·'.join(_pieces(tokenizer, ids))}".replace("\n", "⏎"))
