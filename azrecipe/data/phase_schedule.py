"""Lay training phases over the data; lengths of any unit become steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from azrecipe.data.mixture import Mix, Mixture, TextCounts
from azrecipe.data.packing import ConcatLayout, Layout, PackedText, Packing
from azrecipe.errors import CommandError
from azrecipe.recipe.types import Phase
from azrecipe.utils.bootstrap import FloatArray


@dataclass(frozen=True)
class Position:
    """How far a run has read its data.

    Attributes:
        token: The tokens that were read.
        fingerprint: The name of the sequences, as `fingerprint` of the layout gives it.
        sequence: The next sequence; None for the strategy wrapped.
        mixes: The weights of the sources, from the beginning of the order on. Empty: they are not known.
    """

    token: int
    fingerprint: str
    sequence: int | None = None
    mixes: Sequence[Mix] = ()

    @property
    def start(self) -> int:
        """The `start` of a layout that continues here."""
        return self.token if self.sequence is None else self.sequence


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its steps and its first sequence."""

    phase: Phase
    steps: int
    first_sequence: int

    @property
    def name(self) -> str:
        return self.phase.name


class OutOfText(CommandError):
    """A phase needs more text than there is.

    `phase_index` is the index of the phase.
    """

    def __init__(self, phase_index: int, message: str) -> None:
        super().__init__(message)
        self.phase_index = phase_index


@dataclass(frozen=True)
class PhaseSchedule:
    """All phases of a run over one layout of the data."""

    layout: Layout
    packing: Packing
    global_batch_size: int
    phases: list[PlannedPhase]

    @property
    def mix(self) -> Mixture:
        return self.layout.mix

    @property
    def max_length(self) -> int:
        return self.packing.max_length

    @property
    def num_sequences(self) -> int:
        """Sequences that all phases read together."""
        return self.phases[-1].first_sequence + self.phases[-1].steps * self.global_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, padding included (`PackedText.count_tokens` leaves it out)."""
        return self.global_batch_size * self.max_length

    def build_dataset(self, phase: int) -> PackedText:
        """Build the dataset of a phase, its sequences in order."""
        planned = self.phases[phase]
        return PackedText(self.layout, self.packing, planned.first_sequence, planned.steps * self.global_batch_size)

    def measure_fill(self, phase: int) -> float:
        """Measure the share of a phase's tokens that are not padding."""
        data = self.build_dataset(phase)
        return data.count_tokens(len(data)) / (len(data) * self.max_length)

    @property
    def end(self) -> Position:
        """Where the data continue after the last phase."""
        read = self.num_tokens
        if isinstance(self.layout, ConcatLayout):
            return Position(self.layout.start + read, self.layout.fingerprint, None, tuple(self.mix.mixes))
        return Position(read, self.layout.fingerprint, self.layout.start + self.num_sequences, tuple(self.mix.mixes))

    @property
    def num_tokens(self) -> int:
        """Tokens that all phases read together, padding not counted."""
        return self.layout.count_text(self.num_sequences).tokens

    @property
    def num_bytes(self) -> int:
        """Bytes of text that all phases read together."""
        return self.layout.count_text(self.num_sequences).bytes

    @cached_property
    def source_epochs(self) -> list[float]:
        """How many times each source is read until the end.

        This counts from the beginning of the order.
        """
        return self.mix.count_epochs(self.mix.build_order(), *self.layout.find_started_documents(self.num_sequences))

    @property
    def changes_mix(self) -> bool:
        """Whether a phase has a mix of its own."""
        return any(planned.phase.data is not None for planned in self.phases)

    @cached_property
    def shares(self) -> list[float]:
        """The share of each source, by its weight.

        Where a phase has a mix of its own, it is that of the documents that the phases begin.
        """
        if not self.changes_mix:
            return self.mix.shares
        read = self._bytes_by_phase.sum(axis=0)
        return [float(share) for share in read / max(read.sum(), 1)]

    @cached_property
    def phase_shares(self) -> dict[str, list[float]]:
        """The share of each source in the documents that each phase begins.

        It is by bytes, and empty where no phase has a mix of its own.
        """
        if not self.changes_mix:
            return {}
        return {
            phase.name: [float(share) for share in read / max(read.sum(), 1)]
            for phase, read in zip(self.phases, self._bytes_by_phase, strict=True)
        }

    @cached_property
    def _bytes_by_phase(self) -> FloatArray:
        """The bytes of the documents that each phase begins, [phases, sources]."""
        ends = [phase.first_sequence for phase in self.phases] + [self.num_sequences]
        sizes, order = np.array([store.num_bytes for store in self.mix.stores]), self.mix.build_order()
        read = [np.array(self.mix.count_epochs(order, *self.layout.find_started_documents(end))) * sizes for end in ends]
        return np.diff(np.array(read), axis=0)


def plan_phases(
    layout: Layout, packing: Packing, phases: Sequence[Phase], global_batch_size: int, weights: Sequence[Sequence[float]] | None = None
) -> PhaseSchedule:
    """Lay phases over the data one after the other.

    Args:
        layout: The sequences of the data.
        packing: How documents became these sequences.
        phases: The phases of the recipe.
        global_batch_size: The sequences of a step.
        weights: The weights of the sources in each phase; None: those of the layout's mixture.

    Raises:
        OutOfText: A phase needs more text than there is.
    """
    first, planned = 0, []
    for index, phase in enumerate(phases):
        if weights is not None and not layout.mix.has_shares(weights[index]):
            layout.change_weights(first, weights[index])
        steps = _count_steps(layout, phase, index, first=first, batch=global_batch_size)
        if weights is not None and index + 1 < len(phases) and not layout.mix.has_shares(weights[index + 1]):
            steps = _fill_last_step(layout, phase, steps, first=first, batch=global_batch_size)
        planned.append(PlannedPhase(phase, steps, first))
        first += steps * global_batch_size
    return PhaseSchedule(layout, packing, global_batch_size, planned)


def _fill_last_step(layout: Layout, phase: Phase, steps: int, *, first: int, batch: int) -> int:
    """Count a phase's steps again before a change of the mix.

    The last window of best-fit packing is packed anew there, and its first sequences may hold a little less.
    """
    tokens, size = _get_length(layout, phase)
    while layout.count_available(first + (steps + 1) * batch) == first + (steps + 1) * batch:
        text = layout.count_text_before_change(first, steps * batch)
        if text.tokens >= tokens and text.bytes >= size:
            break
        steps += 1
    return steps


def _get_length(layout: Layout, phase: Phase) -> TextCounts:
    """Get the tokens and bytes that a phase asks for, or 0."""
    size = phase.max_bytes or 0
    if phase.num_train_epochs is not None:
        size = math.ceil(phase.num_train_epochs * layout.mix.epoch_bytes)
    return TextCounts(phase.max_tokens or 0, size)


def _count_steps(layout: Layout, phase: Phase, index: int, *, first: int, batch: int) -> int:
    """Count the steps of a phase.

    The phase begins at sequence `first`, and has `batch` sequences a step.
    """
    tokens, size = _get_length(layout, phase)
    steps = phase.max_steps or max(1, -(-layout.count_sequences(first, tokens, size) // batch))
    available = layout.count_available(first + steps * batch) - first
    if available >= steps * batch:
        return steps
    # The text ends. A length in tokens, bytes or epochs may end with it; only a last step that is not full is dropped
    full_steps, begin, end = available // batch, layout.count_text(first), layout.count_text(first + available)
    tokens_left, bytes_left = end.tokens - begin.tokens, end.bytes - begin.bytes
    steps_missing = max((tokens - tokens_left) / max(tokens_left, 1), (size - bytes_left) / max(bytes_left, 1)) * available / batch
    if phase.max_steps is not None or not full_steps or steps_missing >= 1:
        length = f"{phase.max_steps:,} steps" if phase.max_steps else f"{tokens:,} tokens" if tokens else f"{size:,} bytes of text"
        raise OutOfText(
            index,
            f"phase {phase.name} needs {length}, but {bytes_left:,} bytes ({tokens_left:,} tokens, {full_steps:,} steps) are left: "
            "no source starts again (stopping_strategy: all_exhausted_without_replacement). Shorten it, add text or raise max_epochs",
        )
    return full_steps
