"""Knows what has been worked out of training steps before, on disk: the same question is answered without torch."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from azrecipe.errors import CommandError
from azrecipe.planning.simulation.step_cost import Cost, from_plain
from azrecipe.planning.simulation.step_spec import Asked
from azrecipe.utils.atomic_files import read_json, write_json
from azrecipe.utils.process_pool import cores

SHARDS = 8  # that a split model is run with, whatever their number: what is at rest is in proportion


def folder() -> Path:
    """$XDG_CACHE_HOME/azrecipe/plan, by default ~/.cache/azrecipe/plan."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "azrecipe" / "plan"


class Estimates:
    """The costs of steps that were asked for, and why others have none, for as long as an answer is put together."""

    def __init__(self) -> None:
        self._found: dict[str, Cost | CommandError] = {}

    def costs(self, steps: Sequence[tuple[Asked, int]]) -> list[Cost]:
        """The cost of each step (what is asked, tokens in a sequence). What is not known is worked out, in processes beside each other.

        Raises CommandError for a model that cannot be built or patterns that match nothing in it; the others' costs are known then.
        """
        wanted = [asked.run_as(SHARDS) for asked, _ in steps]
        keys = [asked.key(length) for asked, (_, length) in zip(wanted, steps, strict=True)]
        self._found |= {key: cost for key in keys if key not in self._found and (cost := _known(key)) is not None}
        lacking = {key: (asked, length) for key, asked, (_, length) in zip(keys, wanted, steps, strict=True) if key not in self._found}
        if lacking:
            self._found |= zip(lacking, _measured(list(lacking.values())), strict=True)
            self._keep(lacking)
        return [self._cost(key) for key in keys]

    def _keep(self, keys: Iterable[str]) -> None:
        with contextlib.suppress(OSError):  # a home that cannot be written in costs time, nothing else
            folder().mkdir(parents=True, exist_ok=True)
            for key in keys:
                if isinstance(cost := self._found[key], Cost):
                    write_json(folder() / f"{key}.json", cost.plain())

    def _cost(self, key: str) -> Cost:
        found = self._found[key]
        if isinstance(found, CommandError):
            raise found
        return found


def costs(steps: Sequence[tuple[Asked, int]]) -> list[Cost]:
    """`Estimates.costs`, of what is asked for once."""
    return Estimates().costs(steps)


def known(steps: Sequence[tuple[Asked, int]]) -> list[Cost] | None:
    """The same from disk alone; None where a step is not known yet."""
    found = [_known(asked.run_as(SHARDS).key(length)) for asked, length in steps]
    return None if any(cost is None for cost in found) else [cost for cost in found if cost is not None]


def _known(key: str) -> Cost | None:
    try:
        data = read_json(folder() / f"{key}.json")
        return from_plain(data) if data else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measured(steps: list[tuple[Asked, int]]) -> list[Cost | CommandError]:
    """In a process of its own: torch is loaded there, and nobody waits until it is taken apart again."""
    with ProcessPoolExecutor(1, mp_context=get_context("fork")) as pool:
        return pool.submit(_all, steps).result()


def _all(steps: list[tuple[Asked, int]]) -> list[Cost | CommandError]:
    gc.disable()  # what is imported stays
    _ready(any(asked.lora is not None for asked, _ in steps))
    gc.freeze()  # the processes share what is there, and no collection goes through it
    gc.enable()
    workers = min(cores(), len(steps))
    if workers == 1:
        return [_measure(step) for step in steps]
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        return list(pool.map(_measure, steps))


def _ready(adapters: bool) -> None:
    """Import what every process needs, once, before they part."""
    import torch

    from azrecipe.planning.simulation import step_simulation

    torch.set_num_threads(1)  # shapes need no more, and threads do not survive a fork
    step_simulation.prepare(adapters)


def _measure(step: tuple[Asked, int]) -> Cost | CommandError:
    """The step's cost, or why it has none."""
    from azrecipe.planning.simulation import step_simulation

    try:
        return step_simulation.measure(*step)
    except CommandError as error:
        return error
    except Exception as error:  # what a model's own code raises is its own affair
        reason = str(error).strip().partition("\n")[0]
        kind = step[0].config.get("model_type")
        return CommandError(f"a training step of this {kind} could not be looked at ({type(error).__name__}: {reason})")
