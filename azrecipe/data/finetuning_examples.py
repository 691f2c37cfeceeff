"""Turn rows into finetuning examples: tokenised, split, mixed and packed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from azrecipe.data import conversations
from azrecipe.data.best_fit_packing import pack_best_fit
from azrecipe.data.conversations import PreferencePair
from azrecipe.data.readers import DataSource
from azrecipe.data.sources import find_furthest_behind, is_below_fraction
from azrecipe.errors import CommandError, Problem, RecipeError
from azrecipe.recipe.types import SftConfig
from azrecipe.tokenization.chat_templates import Messages, TokenizedExample, render_conversation, render_prompt, tokenize_conversation
from azrecipe.tokenization.encoding import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PreferenceExample:
    """A preference as tokens: TRL's prompt_ids, chosen_ids and rejected_ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def to_example(self, chosen: bool) -> TokenizedExample:
        """Join the prompt and one answer, with the loss on the answer."""
        answer = self.chosen_ids if chosen else self.rejected_ids
        return TokenizedExample(self.prompt_ids + answer, [IGNORE_INDEX] * len(self.prompt_ids) + answer)

    def __len__(self) -> int:
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class TrainingRow:
    """An example to train on, with its source and bytes of text."""

    example: Any
    source_index: int
    num_bytes: int


@dataclass
class FinetuningExamples:
    """The examples of both sides, and their counts.

    Attributes:
        train: The examples to train on.
        held_out: The held-out examples.
        counts: The rows of each kind, and the trained tokens.
        num_sources: The number of sources.
    """

    train: list[TrainingRow] = field(default_factory=list)
    held_out: list[Any] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    num_sources: int = 0

    def summarize_sources(self, plan: FinetuningPlan) -> list[dict[str, float]]:
        """Summarise the rows, bytes and epochs of each source in a run."""
        available, rows, sizes = Counter(row.source_index for row in self.train), Counter[int](), Counter[int]()
        for number in plan.rows:
            rows[self.train[number].source_index] += 1
            sizes[self.train[number].source_index] += self.train[number].num_bytes
        return [{"rows": rows[n], "bytes": sizes[n], "epochs": round(rows[n] / max(available[n], 1), 3)} for n in range(self.num_sources)]


def read_sources(config: SftConfig, sources: Sequence[DataSource]) -> list[list[Any]]:
    """Read the conversations, or the preferences, of each source.

    Raises:
        RecipeError: Rows are wrong; the error has those of all sources.
    """
    rows: list[list[Any]] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            rows.append(
                list(conversations.read_preferences(source) if config.method == "dpo" else conversations.read_conversations(source))
            )
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return rows


def build_examples(config: SftConfig, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Sequence[Any]]) -> FinetuningExamples:
    """Tokenise rows and split them into training and held-out examples.

    Duplicates, and rows without a trained token, are left out.

    Raises:
        CommandError: No row is left to train on.
    """
    fraction, keys, examples = config.data.validation.held_out.fraction, set[bytes](), FinetuningExamples(num_sources=len(sources))
    examples.counts.update(dict.fromkeys(("conversations", "train", "held_out", "duplicates", "dropped", "truncated", "trained_tokens"), 0))
    for number, rows in enumerate(sources):
        for row in rows:
            examples.counts["conversations"] += 1
            key = conversations.hash_row(row)
            if key in keys:
                examples.counts["duplicates"] += 1
                continue
            keys.add(key)
            # A preference by its prompt, so that no pair of a held-out prompt is trained on
            side_key = conversations.hash_row(row.prompt) if isinstance(row, PreferencePair) else key
            held_out = is_below_fraction(side_key, fraction)
            example = _tokenize_pair(config, tokenizer, row) if isinstance(row, PreferencePair) else _tokenize(config, tokenizer, row)
            examples.counts["truncated"] += isinstance(example, TokenizedExample) and example.truncated and example.num_trained_tokens > 0
            if example is None or (isinstance(example, TokenizedExample) and not example.num_trained_tokens):
                examples.counts["dropped"] += 1
            elif held_out:
                examples.held_out.append(example)
            else:
                examples.train.append(TrainingRow(example, number, _count_bytes(row)))
                examples.counts["trained_tokens"] += count_trained_tokens(example)
    examples.counts["train"], examples.counts["held_out"] = len(examples.train), len(examples.held_out)
    if not examples.train:
        kind = "preference fits" if config.method == "dpo" else "conversation has a trained token left"
        raise CommandError(f"no {kind} within data.max_length = {config.data.max_length}: raise it, or check the chat template")
    return examples


def _tokenize(config: SftConfig, tokenizer: PreTrainedTokenizerBase, messages: Messages) -> TokenizedExample:
    return tokenize_conversation(tokenizer, messages, config.data.max_length, config.training.assistant_only_loss)


def _tokenize_pair(config: SftConfig, tokenizer: PreTrainedTokenizerBase, pair: PreferencePair) -> PreferenceExample | None:
    """Tokenise a preference; None where a side is longer than max_length.

    A truncated answer could not be compared.
    """
    chosen, rejected = (
        list(render_conversation(tokenizer, [*pair.prompt, *side], False)["input_ids"]) for side in (pair.chosen, pair.rejected)
    )
    if max(len(chosen), len(rejected)) > config.data.max_length:
        return None
    prompt = render_prompt(tokenizer, pair.prompt)
    if chosen[: len(prompt)] != prompt or rejected[: len(prompt)] != prompt:
        first_words = " ".join(pair.prompt[-1]["content"].split())[:60]
        raise CommandError(
            f"the chat template renders the prompt '{first_words}' differently by itself and before its answer: method: dpo cannot use it"
        )
    end = tokenizer.eos_token_id  # what follows the end of turn is not part of the answer
    answers = [ids[len(prompt) :] for ids in (chosen, rejected)]
    answers = [ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids for ids in answers]
    return PreferenceExample(prompt, *answers)


def to_messages(row: Messages | PreferencePair) -> Messages:
    """Convert a row to a conversation.

    A preference becomes its prompt and chosen answer.
    """
    return row if isinstance(row, list) else [*row.prompt, *row.chosen]


def _count_bytes(row: Messages | PreferencePair) -> int:
    messages = row if isinstance(row, list) else [*row.prompt, *row.chosen, *row.rejected]
    return sum(len(message["content"].encode()) for message in messages)


def count_trained_tokens(example: TokenizedExample | PreferenceExample) -> int:
    """Count the tokens in the loss."""
    return example.num_trained_tokens if isinstance(example, TokenizedExample) else len(example.chosen_ids) + len(example.rejected_ids)


def shuffle_rows(num_rows: int, count: int, seed: int, stream: int = 0) -> Iterable[int]:
    """Yield row numbers in random order, each epoch shuffled anew.

    The order is the same for every number of processes.

    Args:
        num_rows: The rows of an epoch.
        count: How many numbers to yield.
        seed: What the order is drawn from.
        stream: A number from 1 for one of several independent orders; 0 for a single one.
    """
    yielded, epoch = 0, 0
    while yielded < count:
        shuffled = np.random.Generator(np.random.PCG64([seed, epoch, *([stream] if stream else [])])).permutation(num_rows)
        yield from shuffled[: count - yielded].tolist()
        yielded, epoch = yielded + num_rows, epoch + 1


def mix_rows(rows: Sequence[TrainingRow], weights: Sequence[float | None], count: int, seed: int) -> list[int]:
    """Mix the rows of all sources.

    With weights, the next row is always of the source that is furthest behind its share of bytes; a source that runs out
    starts again, shuffled anew, as in pretraining. Without weights every row comes once an epoch.

    Args:
        rows: The rows to train on.
        weights: The weight of each source.
        count: How many rows to return.
        seed: What the order is drawn from.

    Returns:
        The numbers of the rows in order, [count].
    """
    if all(weight is None for weight in weights):
        return list(shuffle_rows(len(rows), count, seed))
    rows_of_source = [[n for n, row in enumerate(rows) if row.source_index == source] for source in range(len(weights))]
    streams = {s: iter(shuffle_rows(len(numbers), count, seed, s + 1)) for s, numbers in enumerate(rows_of_source) if numbers}
    shares = [weight or 1.0 for weight in weights]
    bytes_read, order = dict.fromkeys(streams, 0.0), []
    for _ in range(count):
        source = find_furthest_behind(streams, bytes_read, shares)
        order.append(rows_of_source[source][next(streams[source])])
        bytes_read[source] += rows[order[-1]].num_bytes
    return order


@dataclass(frozen=True)
class FinetuningPlan:
    """The sequences of a run, as row numbers, and its steps."""

    sequences: list[list[int]]
    steps: int

    @property
    def rows(self) -> list[int]:
        return [row for sequence in self.sequences for row in sequence]


def plan_sequences(config: SftConfig, rows: Sequence[TrainingRow]) -> FinetuningPlan:
    """Plan the sequences of all steps of a run, in order."""
    training, seed = config.training, config.seed
    weights = [source.weight for source in config.data.datasets]
    batch = training.global_batch_size
    if training.max_steps is None:
        assert training.num_train_epochs is not None
        order = mix_rows(rows, weights, math.ceil(len(rows) * training.num_train_epochs), seed)
        sequences = pack_rows(rows, order, config.data.max_length) if config.data.packing else [[row] for row in order]
        steps = math.ceil(len(sequences) / batch)
        if missing := steps * batch - len(sequences):  # so that the last step is full
            more = mix_rows(rows, weights, len(order) + missing, seed)[len(order) :]
            sequences += [[row] for row in more]
        return FinetuningPlan(sequences, steps)
    num_sequences = training.max_steps * batch
    if not config.data.packing:
        return FinetuningPlan([[row] for row in mix_rows(rows, weights, num_sequences, seed)], training.max_steps)
    count, sequences = num_sequences, []
    while len(sequences) < num_sequences:
        count *= 2
        sequences = pack_rows(rows, mix_rows(rows, weights, count, seed), config.data.max_length)
    return FinetuningPlan(sequences[:num_sequences], training.max_steps)


WINDOW_ROWS = 1_000  # rows that are packed together; few, so that the order stays mixed


def pack_rows(rows: Sequence[TrainingRow], order: Sequence[int], max_length: int) -> list[list[int]]:
    """Pack rows by best-fit decreasing, a window at a time, without truncation.

    Args:
        rows: The rows to train on.
        order: The numbers of the rows in order.
        max_length: The most tokens of a sequence.

    Returns:
        The numbers of the rows of each sequence.
    """
    sequences: list[list[int]] = []
    stream = iter(order)
    while window := list(islice(stream, WINDOW_ROWS)):
        lengths = np.array([len(rows[row].example.input_ids) for row in window], np.int64)
        bins = pack_best_fit(lengths, max_length)
        packed: list[list[int]] = [[] for _ in range(int(bins.max()) + 1)]
        for place in np.argsort(-lengths, kind="stable").tolist():
            packed[bins[place]].append(window[place])
        first_places = {row: place for place, row in reversed(list(enumerate(window)))}
        sequences += sorted(packed, key=lambda sequence: min(first_places[row] for row in sequence))  # not longest first
    return sequences


def join_examples(examples: Sequence[TokenizedExample]) -> dict[str, list[int]]:
    """Join examples to one sequence: input_ids, labels and position_ids, [tokens] each.

    position_ids restart at each example, and its first token takes no part in the loss.
    """
    labels = [label if position else IGNORE_INDEX for example in examples for position, label in enumerate(example.labels)]
    positions = [position for example in examples for position in range(len(example.input_ids))]
    return {"input_ids": [token for example in examples for token in example.input_ids], "labels": labels, "position_ids": positions}
