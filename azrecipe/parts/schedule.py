"""Where each phase begins and ends in the data: lengths in steps, tokens, bytes or epochs, all turned into steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from azrecipe.parts.mixing import Mix, Order
from azrecipe.parts.packing import Borders, PackedText, Span, bytes_at, token_at
from azrecipe.recipe.types import Phase


@dataclass(frozen=True)
class Position:
    """How far a run has read: the next token, and the name of the order of data that this counts in."""

    token: int
    fingerprint: str


@dataclass(frozen=True)
class PlannedPhase:
    """A phase with its length in steps and the token at which it starts."""

    phase: Phase
    steps: int
    start_token: int

    @property
    def name(self) -> str:
        return self.phase.name


@dataclass(frozen=True)
class Schedule:
    """All phases of a run over one order of data."""

    mix: Mix
    order: Order
    marks: Borders
    max_length: int
    global_batch_size: int
    phases: list[PlannedPhase]

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.max_length

    def dataset(self, nth: int) -> PackedText:
        """The sequences of one phase, in order."""
        planned = self.phases[nth]
        span = Span(planned.start_token, planned.steps * self.global_batch_size, self.max_length)
        return PackedText(self.mix, self.order, self.marks, span)

    @property
    def start(self) -> int:
        return self.phases[0].start_token

    @property
    def end(self) -> Position:
        """Where the data go on after the last phase."""
        last = self.phases[-1]
        return Position(last.start_token + last.steps * self.tokens_per_step, self.mix.fingerprint)

    @property
    def bytes(self) -> int:
        """Bytes of text that all phases read together."""
        return bytes_at(self.order, self.end.token) - bytes_at(self.order, self.start)

    @property
    def epochs(self) -> list[float]:
        """How many times each source is gone through, from the first document of the order to the end of this run."""
        return self.mix.epochs(self.order, self.end.token)


def plan(mix: Mix, marks: Borders, phases: Sequence[Phase], batch: tuple[int, int], start_token: int) -> Schedule:
    """Lay phases over the data from `start_token` on. `batch` is (global_batch_size, max_length)."""
    global_batch_size, max_length = batch
    step = global_batch_size * max_length
    token, planned = start_token, []
    for phase in phases:
        steps = _steps(mix, phase, token, step)
        planned.append(PlannedPhase(phase, steps, token))
        token += steps * step
    return Schedule(mix, mix.order(tokens=token), marks, max_length, global_batch_size, planned)


def _steps(mix: Mix, phase: Phase, token: int, step: int) -> int:
    if phase.max_steps is not None:
        return phase.max_steps
    if phase.max_tokens is not None:
        return math.ceil(phase.max_tokens / step)
    if phase.max_bytes is not None:
        size = phase.max_bytes
    else:
        assert phase.num_train_epochs is not None
        size = math.ceil(phase.num_train_epochs * mix.epoch_bytes)
    before = bytes_at(mix.order(tokens=token), token) if token else 0
    order = mix.order(size=before + size)
    return max(1, math.ceil((token_at(order, before + size) - token) / step))
