"""Previews of what a model will be trained on, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Phase, PretrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from azrecipe.stages.pretrain import PretrainCheck
    from azrecipe.stages.sft import SftInputs
    from azrecipe.tokenization.chat_templates import TokenizedExample

MAX_EXAMPLE_TOKENS = 400  # tokens of an example
NUM_FIRST_TOKENS = 24  # tokens of a document


@dataclass(frozen=True)
class TokenSpan:
    """Neighbouring tokens, as text, that are all trained or all not."""

    tokens: tuple[str, ...]
    trained: bool


@dataclass(frozen=True)
class ExamplePreview:
    """An example's tokens, to MAX_EXAMPLE_TOKENS.

    Attributes:
        label: "", or chosen and rejected for the answers of a preference.
        spans: The tokens in order.
        num_hidden_tokens: How many tokens follow.
    """

    label: str
    spans: tuple[TokenSpan, ...]
    num_hidden_tokens: int


@dataclass(frozen=True)
class SftPreview:
    """What an sft recipe trains on.

    Attributes:
        counts: Rows by kind (train, held_out, duplicates, dropped, truncated), and trained_tokens.
        steps: Optimizer steps.
        new_tokens: Tokens that the chat template adds.
        eos_token: The token that ends a turn.
        pad_token: The token for padding.
        examples: The first example; of a preference, both answers.
    """

    counts: Mapping[str, int]
    steps: int
    new_tokens: tuple[str, ...]
    eos_token: str
    pad_token: str
    examples: tuple[ExamplePreview, ...]


@dataclass(frozen=True)
class PhasePreview:
    """What a phase trains.

    Attributes:
        name: The phase.
        trainable: The parameters that it trains.
        total: All parameters.
        by_pattern: The parameters that each pattern names.
        shares: The share of each source by its weight, in order; empty where no phase has a mix of its own.
    """

    name: str
    trainable: int
    total: int
    by_pattern: Mapping[str, int]
    shares: tuple[float, ...] = ()


@dataclass(frozen=True)
class SourcePreview:
    """A source, and the first tokens of its first document, as text."""

    path: str
    first_tokens: tuple[str, ...]


@dataclass(frozen=True)
class PretrainPreview:
    """What a pretrain recipe trains, and on what."""

    phases: tuple[PhasePreview, ...]
    sources: tuple[SourcePreview, ...]


def build_sft_preview(inputs: SftInputs) -> SftPreview:
    """Build the preview of an sft recipe from its checked inputs."""
    from azrecipe.data.finetuning_examples import PreferenceExample

    tokenizer, first = inputs.base.tokenizer, inputs.examples.train[0].example
    if isinstance(first, PreferenceExample):
        examples = [("chosen", first.to_example(True)), ("rejected", first.to_example(False))]
    else:
        examples = [("", first)]
    return SftPreview(
        dict(inputs.examples.counts),
        inputs.plan.steps,
        tuple(tokenizer.convert_ids_to_tokens(inputs.new_token_ids)),
        str(tokenizer.eos_token),
        str(tokenizer.pad_token),
        tuple(build_example_preview(tokenizer, example, label) for label, example in examples),
    )


def build_example_preview(tokenizer: PreTrainedTokenizerBase, example: TokenizedExample, label: str = "") -> ExamplePreview:
    """Decode an example's tokens, the trained ones apart from the others."""
    from azrecipe.tokenization.encoding import IGNORE_INDEX

    ids, mask = example.input_ids[:MAX_EXAMPLE_TOKENS], [token != IGNORE_INDEX for token in example.labels[:MAX_EXAMPLE_TOKENS]]
    borders = [0, *(i for i in range(1, len(mask)) if mask[i] != mask[i - 1]), len(mask)]
    spans = (
        TokenSpan(tuple(decode_tokens(tokenizer, ids[start:end])), mask[start])
        for start, end in pairwise(borders) if start < end
    )  # fmt: skip
    return ExamplePreview(label, tuple(spans), max(len(example.input_ids) - MAX_EXAMPLE_TOKENS, 0))


def build_pretrain_preview(recipe: Recipe, check: PretrainCheck) -> PretrainPreview:
    """Build the preview of a pretrain recipe from its check."""
    phases = (
        PhasePreview(phase.name, trainable.trainable, trainable.total, dict(trainable.by_pattern), _list_shares(recipe.config, phase))
        for phase, trainable in zip(recipe.config.phases, check.trainable, strict=True)
    )
    sources = []
    for source, text in zip(recipe.config.data.datasets, check.first_texts, strict=True):
        ids = check.tokenizer(text[:1000], add_special_tokens=False)["input_ids"][:NUM_FIRST_TOKENS]
        sources.append(SourcePreview(source.path, tuple(decode_tokens(check.tokenizer, ids))))
    return PretrainPreview(tuple(phases), tuple(sources))


def _list_shares(config: PretrainConfig, phase: Phase) -> tuple[float, ...]:
    """List the sources' shares in a phase; none where they never change."""
    weights = config.list_weights(phase)
    return tuple(weight / sum(weights) for weight in weights) if config.changes_mix else ()


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """Decode each token; the tokens of one character are decoded together."""
    texts, pending = [], list[int]()
    for token in ids:
        pending.append(token)
        text = str(tokenizer.decode(pending, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if not text.endswith("�"):
            texts.append(text)
            pending = []
    return [*texts, str(tokenizer.decode(pending))] if pending else texts
