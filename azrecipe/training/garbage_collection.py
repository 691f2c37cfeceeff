"""Run Python's garbage collection between training steps, not within them.

A collection stops a process for as long as it takes. Where processes collect at different moments, all wait for each of them.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

STEPS_BETWEEN = 50  # collections of young objects


class GarbageCollection(TrainerCallback):  # type: ignore[misc]
    """Collects at the same steps in all processes, within a `with` block.

    What exists after the first step is skipped by later collections: model, optimizer and libraries.
    """

    def __init__(self) -> None:
        self.was_enabled = gc.isenabled()
        self.has_started = False

    def __enter__(self) -> GarbageCollection:
        return self

    def __exit__(self, *_: object) -> None:
        if self.has_started:
            gc.unfreeze()
        if self.was_enabled:
            gc.enable()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if not self.has_started:
            self.has_started = True
            gc.collect()
            gc.freeze()
            gc.disable()
        elif state.global_step % STEPS_BETWEEN == 0 or control.should_save or control.should_evaluate:
            gc.collect(1)
