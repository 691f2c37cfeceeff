"""Where each phase begins and ends in the data: lengths in steps, tokens, bytes or epochs, all turned into steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from azrecipe.data.mixture import Mix
from azrecipe.data.packing import Layout, PackedText, Packing, Wrapped
from azrecipe.errors import CommandError
from azrecipe.recipe.types import Phase


@dataclass(frozen=True)
class Position:
    """How far a run has read: tokens before it, the name of the sequences that this counts in, and, unless wrapped, the next one."""

    token: int
    fingerprint: str
    sequence: int | None = None

    @property
    def start(self) -> int:
        """Where a `layout` goes on."""
        return self.token if self.sequence is None else self.sequence


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its length in steps and the sequence at which it starts, counted from the run's first."""

    phase: Phase
    steps: int
    first: int

    @property
    def name(self) -> str:
        return self.phase.name


class TextEnds(CommandError):
    """A phase asks for more text than there is. `nth` says which one."""

    def __init__(self, nth: int, message: str) -> None:
        super().__init__(message)
        self.nth = nth


@dataclass(frozen=True)
class Schedule:
    """All phases of a run over one layout of the data."""

    layout: Layout
    how: Packing
    global_batch_size: int
    phases: list[PlannedPhase]

    @property
    def mix(self) -> Mix:
        return self.layout.mix

    @property
    def max_length(self) -> int:
        return self.how.max_length

    @property
    def sequences(self) -> int:
        """Sequences that all phases read together."""
        return self.phases[-1].first + self.phases[-1].steps * self.global_batch_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step where no padding is; else there are fewer (`PackedText.tokens_until`)."""
        return self.global_batch_size * self.max_length

    def dataset(self, nth: int) -> PackedText:
        """The sequences of one phase, in order."""
        planned = self.phases[nth]
        return PackedText(self.layout, self.how, planned.first, planned.steps * self.global_batch_size)

    def fill(self, nth: int) -> float:
        """The share of a phase's places that hold tokens of text and not padding."""
        data = self.dataset(nth)
        return data.tokens_until(len(data)) / (len(data) * self.max_length)

    @property
    def end(self) -> Position:
        """Where the data go on after the last phase."""
        read = self.layout.amount(self.sequences)[0]
        if isinstance(self.layout, Wrapped):
            return Position(self.layout.start + read, self.layout.fingerprint)
        return Position(read, self.layout.fingerprint, self.layout.start + self.sequences)

    @property
    def tokens(self) -> int:
        """Tokens that all phases read together, padding not counted."""
        return self.layout.amount(self.sequences)[0]

    @property
    def bytes(self) -> int:
        """Bytes of text that all phases read together."""
        return self.layout.amount(self.sequences)[1]

    @cached_property
    def epochs(self) -> list[float]:
        """How many times each source is gone through, from the first document of the order to the end of this run."""
        return self.mix.epochs(self.mix.order(), *self.layout.begun(self.sequences))


def plan(layout: Layout, how: Packing, phases: Sequence[Phase], global_batch_size: int) -> Schedule:
    """Lay phases over the data one after the other. Raises TextEnds where one asks for more than there is."""
    first, planned = 0, []
    for nth, phase in enumerate(phases):
        steps = _steps(layout, nth, phase, (first, global_batch_size))
        planned.append(PlannedPhase(phase, steps, first))
        first += steps * global_batch_size
    return Schedule(layout, how, global_batch_size, planned)


def _steps(layout: Layout, nth: int, phase: Phase, at: tuple[int, int]) -> int:
    """A phase's steps. `at`: its first sequence, and those of a step."""
    first, batch = at
    tokens, size = phase.max_tokens or 0, phase.max_bytes or 0
    if phase.num_train_epochs is not None:
        size = math.ceil(phase.num_train_epochs * layout.mix.epoch_bytes)
    steps = phase.max_steps or max(1, -(-layout.reach(first, tokens, size) // batch))
    there = layout.available(first + steps * batch) - first
    if there >= steps * batch:
        return steps
    # The text ends. A length in tokens, bytes or epochs may end with it, up to the step that it does not fill
    whole, read, end = there // batch, layout.amount(first), layout.amount(first + there)
    tokens_left, bytes_left = end[0] - read[0], end[1] - read[1]
    steps_missing = max((tokens - tokens_left) / max(tokens_left, 1), (size - bytes_left) / max(bytes_left, 1)) * there / batch
    if phase.max_steps is not None or not whole or steps_missing >= 1:
        asked = f"{phase.max_steps:,} steps" if phase.max_steps else f"{tokens:,} tokens" if tokens else f"{size:,} bytes of text"
        raise TextEnds(
            nth,
            f"phase {phase.name} asks for {asked}, and {bytes_left:,} bytes ({tokens_left:,} tokens, {whole:,} steps) are left: "
            "no source is begun again (stopping_strategy: all_exhausted_without_replacement). Shorten it, add text or raise max_epochs",
        )
    return whole
