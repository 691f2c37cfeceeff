"""What tuning trains on: the rows of all sources as tokens, split, in the order in which they come, packed where asked."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from azrecipe.data import conversations
from azrecipe.data.conversations import Pair
from azrecipe.data.readers import Located
from azrecipe.errors import CommandError, Problem, RecipeError
from azrecipe.recipe.types import Sft
from azrecipe.tokenization.chat_templates import Example, Messages, render, tokenize
from azrecipe.tokenization.encoding import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PairExample:
    """A preference as tokens: TRL's prompt_ids, chosen_ids and rejected_ids."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    def side(self, chosen: bool) -> Example:
        """Prompt and one answer, the loss on the answer."""
        answer = self.chosen_ids if chosen else self.rejected_ids
        return Example(self.prompt_ids + answer, [IGNORED] * len(self.prompt_ids) + answer)

    def __len__(self) -> int:
        return 2 * len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)


@dataclass(frozen=True)
class Row:
    """An example to train on, the number of its source, and its bytes of text."""

    example: Any
    source: int
    size: int


@dataclass
class Examples:
    """The rows of both sides, and what was counted on the way."""

    train: list[Row] = field(default_factory=list)
    held_out: list[Any] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    sources: int = 0

    def read(self, chosen: Plan) -> list[dict[str, float]]:
        """What a run reads of each source: rows, bytes of text, and times through it."""
        there, rows, sizes = Counter(row.source for row in self.train), Counter[int](), Counter[int]()
        for number in chosen.rows:
            rows[self.train[number].source] += 1
            sizes[self.train[number].source] += self.train[number].size
        return [{"rows": rows[n], "bytes": sizes[n], "epochs": round(rows[n] / max(there[n], 1), 3)} for n in range(self.sources)]


def read(config: Sft, sources: Sequence[Located]) -> list[list[Any]]:
    """The conversations of each source, or its preferences. Raises RecipeError for all sources' wrong rows at once."""
    found: list[list[Any]] = []
    problems: list[Problem] = []
    for source in sources:
        try:
            found.append(list(conversations.read_pairs(source) if config.method == "dpo" else conversations.read(source)))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(problems)
    return found


def examples(config: Sft, tokenizer: PreTrainedTokenizerBase, sources: Sequence[Sequence[Any]]) -> Examples:
    """Rows to tokens: none twice, a share held out, none without a trained token. Raises CommandError where none is left to train on."""
    fraction, seen, made = config.data.validation.held_out.fraction, set[bytes](), Examples(sources=len(sources))
    made.counts.update(dict.fromkeys(("conversations", "train", "held_out", "duplicates", "dropped", "truncated", "trained_tokens"), 0))
    for number, rows in enumerate(sources):
        for row in rows:
            made.counts["conversations"] += 1
            key = conversations.key(row)
            if key in seen:
                made.counts["duplicates"] += 1
                continue
            seen.add(key)
            # a preference by its prompt: the other pairs of that prompt would give it away
            held = conversations.is_held_out(conversations.key(row.prompt) if isinstance(row, Pair) else key, fraction)
            example = _pair(config, tokenizer, row) if isinstance(row, Pair) else _conversation(config, tokenizer, row)
            made.counts["truncated"] += isinstance(example, Example) and example.cut and example.trained > 0
            if example is None or (isinstance(example, Example) and not example.trained):
                made.counts["dropped"] += 1
            elif held:
                made.held_out.append(example)
            else:
                made.train.append(Row(example, number, _size(row)))
                made.counts["trained_tokens"] += trained_tokens(example)
    made.counts["train"], made.counts["held_out"] = len(made.train), len(made.held_out)
    if not made.train:
        kind = "preference fits" if config.method == "dpo" else "conversation has a trained token left"
        raise CommandError(f"no {kind} within data.max_length = {config.data.max_length}: raise it, or check the chat template")
    return made


def _conversation(config: Sft, tokenizer: PreTrainedTokenizerBase, messages: Messages) -> Example:
    return tokenize(tokenizer, messages, config.data.max_length, config.training.assistant_only_loss)


def _pair(config: Sft, tokenizer: PreTrainedTokenizerBase, pair: Pair) -> PairExample | None:
    """None for a pair of which one side is longer than max_length: an answer that is cut off cannot be compared."""
    chosen, rejected = (list(render(tokenizer, [*pair.prompt, *side], False)["input_ids"]) for side in (pair.chosen, pair.rejected))
    if max(len(chosen), len(rejected)) > config.data.max_length:
        return None
    prompt = list(tokenizer.apply_chat_template(pair.prompt, tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"])
    if chosen[: len(prompt)] != prompt or rejected[: len(prompt)] != prompt:
        begins = " ".join(pair.prompt[-1]["content"].split())[:60]
        raise CommandError(
            f"the chat template renders the prompt '{begins}' in another way by itself than before its answer: method: dpo cannot use it"
        )
    end = tokenizer.eos_token_id  # what stands behind the end of turn is no part of the answer
    answers = [ids[len(prompt) :] for ids in (chosen, rejected)]
    answers = [ids[: len(ids) - ids[::-1].index(end)] if end in ids else ids for ids in answers]
    return PairExample(prompt, *answers)


def messages_of(row: Messages | Pair) -> Messages:
    """A conversation: of a preference the one with the chosen answer."""
    return row if isinstance(row, list) else [*row.prompt, *row.chosen]


def _size(row: Messages | Pair) -> int:
    messages = row if isinstance(row, list) else [*row.prompt, *row.chosen, *row.rejected]
    return sum(len(message["content"].encode()) for message in messages)


def trained_tokens(example: Example | PairExample) -> int:
    """The tokens that a loss is taken on."""
    return example.trained if isinstance(example, Example) else len(example.chosen_ids) + len(example.rejected_ids)


def order(rows: int, needed: int, seed: int, nth: int = 0) -> Iterable[int]:
    """Which row comes when: pass after pass, each in an order of its own; the same for every number of processes."""
    made, number = 0, 0
    while made < needed:
        shuffled = np.random.Generator(np.random.PCG64([seed, number, *([nth] if nth else [])])).permutation(rows)
        yield from shuffled[: needed - made].tolist()
        made, number = made + rows, number + 1


def mixed(rows: Sequence[Row], weights: Sequence[float | None], needed: int, seed: int) -> list[int]:
    """The first `needed` rows to train on. Where sources have weights, always one of the source furthest behind its share of bytes.

    A source that runs out begins again, reshuffled, as in pretraining. Without weights every row comes once a pass.
    """
    if all(weight is None for weight in weights):
        return list(order(len(rows), needed, seed))
    own = [[n for n, row in enumerate(rows) if row.source == source] for source in range(len(weights))]
    streams = {s: iter(order(len(own[s]), needed, seed, s + 1)) for s in range(len(weights)) if own[s]}
    given, chosen = dict.fromkeys(streams, 0.0), []
    for _ in range(needed):
        source = min(given, key=lambda s: (given[s] / (weights[s] or 1.0), s))
        chosen.append(own[source][next(streams[source])])
        given[source] += rows[chosen[-1]].size
    return chosen


@dataclass(frozen=True)
class Plan:
    """What a run goes through: `sequences` of row numbers (one each, or several where they are packed), and steps."""

    sequences: list[list[int]]
    steps: int

    @property
    def rows(self) -> list[int]:
        return [row for sequence in self.sequences for row in sequence]


def plan(config: Sft, rows: Sequence[Row]) -> Plan:
    """The run's sequences in order, as many as its steps take."""
    training, seed = config.training, config.seed
    weights = [source.weight for source in config.data.datasets]
    batch = training.global_batch_size
    if training.max_steps is None:
        assert training.num_train_epochs is not None
        chosen = mixed(rows, weights, math.ceil(len(rows) * training.num_train_epochs), seed)
        sequences = packed(rows, chosen, config.data.max_length) if config.data.packing else [[row] for row in chosen]
        steps = math.ceil(len(sequences) / batch)
        if missing := steps * batch - len(sequences):  # a last step as full as the others
            more = mixed(rows, weights, len(chosen) + missing, seed)[len(chosen) :]
            sequences += [[row] for row in more]
        return Plan(sequences, steps)
    needed = training.max_steps * batch
    if not config.data.packing:
        return Plan([[row] for row in mixed(rows, weights, needed, seed)], training.max_steps)
    count, sequences = needed, []
    while len(sequences) < needed:
        count *= 2
        sequences = packed(rows, mixed(rows, weights, count, seed), config.data.max_length)
    return Plan(sequences[:needed], training.max_steps)


WINDOW = 1_000  # rows that are packed together, so that the order stays a mix


def packed(rows: Sequence[Row], chosen: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows put together into sequences of at most `max_length` tokens, none cut: best fit, decreasing, a WINDOW at a time."""
    found: list[list[int]] = []
    stream = iter(chosen)
    while window := list(islice(stream, WINDOW)):
        bins: list[list[int]] = []
        room: list[int] = []
        for row in sorted(window, key=lambda n: -len(rows[n].example.input_ids)):
            size = len(rows[row].example.input_ids)
            fitting = [n for n, free in enumerate(room) if free >= size]
            if fitting:
                best = min(fitting, key=room.__getitem__)
            else:
                best = len(bins)
                bins.append([])
                room.append(max_length)
            bins[best].append(row)
            room[best] -= size
        places = {row: n for n, row in reversed(list(enumerate(window)))}
        found += sorted(bins, key=lambda one: min(places[row] for row in one))  # not longest first
    return found


def joined(parts: Sequence[Example]) -> dict[str, list[int]]:
    """Examples as one sequence: position_ids restart at each, and no loss is taken on the first token of one."""
    labels = [label if nth else IGNORED for part in parts for nth, label in enumerate(part.labels)]
    positions = [nth for part in parts for nth in range(len(part.input_ids))]
    return {"input_ids": [token for part in parts for token in part.input_ids], "labels": labels, "position_ids": positions}
