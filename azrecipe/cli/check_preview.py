"""Show what a model will be trained on, for `azrecipe check`.

It shows an example with the trained tokens marked, and what each phase trains.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console
from rich.text import Text

from azrecipe.data.finetuning_examples import PreferenceExample
from azrecipe.recipe.load import Recipe
from azrecipe.tokenization.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerBase

    from azrecipe.stages.pretrain import PretrainCheck
    from azrecipe.stages.sft import SftInputs
    from azrecipe.tokenization.chat_templates import TokenizedExample

MAX_TOKENS_SHOWN = 400  # tokens of an example
NUM_FIRST_TOKENS = 24  # tokens of a document


class _Span(NamedTuple):
    """Neighbouring tokens that are all trained, or all not."""

    start: int
    end: int
    trained: bool


def show_sft_preview(recipe: Recipe, inputs: SftInputs) -> None:
    """Print the counts and the first example; of a preference, both answers."""
    plan, tokenizer, counts = inputs.plan, inputs.base.tokenizer, inputs.examples.counts
    print(f"{recipe.path}: {counts['train']:,} rows to train on, {counts['held_out']:,} held out, {counts['duplicates']:,} duplicates, {counts['dropped']:,} "
          f"dropped, {counts['truncated']:,} cut; {plan.steps:,} steps; {counts['trained_tokens']:,} trained tokens")  # fmt: skip
    if inputs.new_token_ids:
        print(f"  the template adds {', '.join(tokenizer.convert_ids_to_tokens(inputs.new_token_ids))}")
    print(f"  a turn ends with {tokenizer.eos_token}, padding is {tokenizer.pad_token}")
    first = inputs.examples.train[0].example
    if isinstance(first, PreferenceExample):
        examples = [(", chosen", first.to_example(True)), (", rejected", first.to_example(False))]
    else:
        examples = [("", first)]
    console = Console(highlight=False, soft_wrap=True)
    for label, example in examples:
        console.print(f"\nThe first example{label}; the loss covers what is marked:")
        console.print(format_example(tokenizer, example, console.is_terminal and not console.no_color))
    console.print()


def format_example(tokenizer: PreTrainedTokenizerBase, example: TokenizedExample, colour: bool) -> Text:
    """Format an example's tokens, the trained ones marked.

    Dots separate tokens. Trained tokens are green with `colour`, and between ⟦ and ⟧ without it.
    """
    text = Text()
    ids = example.input_ids[:MAX_TOKENS_SHOWN]
    mask = [label != IGNORE_INDEX for label in example.labels[:MAX_TOKENS_SHOWN]]
    for span in _split_by_mask(mask):
        if span.trained and not colour:
            text.append("⟦")
        for i, token in enumerate(_decode_tokens(tokenizer, ids[span.start : span.end])):
            text.append("·" if i else "", "dim")
            text.append(token, "bold green" if span.trained else "")
        if span.trained and not colour:
            text.append("⟧")
    if len(example.input_ids) > MAX_TOKENS_SHOWN:
        text.append(f" … {len(example.input_ids) - MAX_TOKENS_SHOWN} tokens more", "dim")
    return text


def _split_by_mask(mask: Sequence[bool]) -> list[_Span]:
    borders = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    return [_Span(start, end, mask[start]) for start, end in pairwise(borders) if start < end]


def _decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode each token; the tokens of one character are decoded together."""
    texts, pending = [], list[int]()
    for token in ids:
        pending.append(token)
        text = str(tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if not text.endswith("�"):
            texts.append(text)
            pending = []
    return [*texts, str(tokenizer.decode(pending))] if pending else texts


def show_pretrain_preview(recipe: Recipe, check: PretrainCheck) -> None:
    """Print what each phase trains, and the first tokens of each source."""
    for phase, trainable in zip(recipe.config.phases, check.trainable, strict=True):
        shares = ", ".join(f"{pattern} {count:,}" for pattern, count in trainable.by_pattern.items())
        print(f"{recipe.path}: phase {phase.name} trains {trainable.trainable:,} of {trainable.total:,} parameters ({shares})")
    for source, text in zip(recipe.config.data.datasets, check.first_texts, strict=True):
        ids = check.tokenizer(text[:1000], add_special_tokens=False)["input_ids"][:NUM_FIRST_TOKENS]
        print(f"  {source.path} begins: {'·'.join(_decode_tokens(check.tokenizer, ids))}".replace("\n", "⏎"))
