"""The disk cache of simulated step costs.

A cached step is answered without torch.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from azrecipe.errors import CommandError
from azrecipe.planning.simulation.step_cost import StepCost, parse_step_cost
from azrecipe.planning.simulation.step_spec import StepSpec
from azrecipe.utils.atomic_files import read_json, write_json
from azrecipe.utils.parent_watch import end_with_parent
from azrecipe.utils.paths import get_user_cache
from azrecipe.utils.process_pool import count_cores

GROUPED_PRODUCTS = "Expected inputs of BF16 type"  # of torch.nn.functional.grouped_mm on fake tensors
SIMULATED_SHARDS = 8  # every sharded model is simulated with as many processes: bytes at rest are proportional


def get_cache_folder() -> Path:
    """Return $XDG_CACHE_HOME/azrecipe/plan, by default ~/.cache/azrecipe/plan."""
    return get_user_cache() / "plan"


class CostCache:
    """Costs of steps, or their errors, in memory and on disk."""

    def __init__(self) -> None:
        self._results: dict[str, StepCost | CommandError] = {}

    def load_or_simulate(self, steps: Sequence[tuple[StepSpec, int]]) -> list[StepCost]:
        """Return the cost of each step (spec, tokens in a sequence).

        Costs that are not cached are simulated, in parallel. Raises CommandError for a model that cannot be built, or for patterns that
        match none of its parameters; the costs of the other steps are cached then.
        """
        return [self._get(key) for key in self._fill(steps)]

    def load_or_simulate_possible(self, steps: Sequence[tuple[StepSpec, int]]) -> list[StepCost | None]:
        """Return the cost of each step; None where it cannot be simulated."""
        results = [self._results[key] for key in self._fill(steps)]
        return [result if isinstance(result, StepCost) else None for result in results]

    def _fill(self, steps: Sequence[tuple[StepSpec, int]]) -> list[str]:
        """Load or simulate what is missing; return the key of each step."""
        specs = [spec.to_simulated(SIMULATED_SHARDS) for spec, _ in steps]
        keys = [spec.get_cache_key(length) for spec, (_, length) in zip(specs, steps, strict=True)]
        self._results |= {key: cost for key in keys if key not in self._results and (cost := _read(key)) is not None}
        missing = {key: (spec, length) for key, spec, (_, length) in zip(keys, specs, steps, strict=True) if key not in self._results}
        if missing:
            self._results |= zip(missing, _simulate_in_new_process(list(missing.values())), strict=True)
            self._write(missing)
        return keys

    def _write(self, keys: Iterable[str]) -> None:
        with contextlib.suppress(OSError):  # where nothing can be written, the next plan takes longer
            get_cache_folder().mkdir(parents=True, exist_ok=True)
            for key in keys:
                if isinstance(cost := self._results[key], StepCost):
                    write_json(get_cache_folder() / f"{key}.json", cost.to_dict())

    def _get(self, key: str) -> StepCost:
        result = self._results[key]
        if isinstance(result, CommandError):
            raise result
        return result


def load_or_simulate_costs(steps: Sequence[tuple[StepSpec, int]]) -> list[StepCost]:
    """Return the cost of each step; see CostCache.load_or_simulate."""
    return CostCache().load_or_simulate(steps)


def load_costs(steps: Sequence[tuple[StepSpec, int]]) -> list[StepCost] | None:
    """Load costs from disk; None where one is missing."""
    costs = [_read(spec.to_simulated(SIMULATED_SHARDS).get_cache_key(length)) for spec, length in steps]
    return None if any(cost is None for cost in costs) else [cost for cost in costs if cost is not None]


def _read(key: str) -> StepCost | None:
    try:
        data = read_json(get_cache_folder() / f"{key}.json")
        return parse_step_cost(data) if data else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _simulate_in_new_process(steps: list[tuple[StepSpec, int]]) -> list[StepCost | CommandError]:
    """Simulate steps in a new process, which alone loads torch."""
    with ProcessPoolExecutor(1, get_context("fork"), end_with_parent, (os.getpid(),)) as pool:
        return pool.submit(_simulate_in_parallel, steps).result()


def _simulate_in_parallel(steps: list[tuple[StepSpec, int]]) -> list[StepCost | CommandError]:
    gc.disable()  # imports make no garbage
    _import_libraries(any(spec.lora is not None for spec, _ in steps))
    gc.freeze()  # collections skip what the processes share, so that its memory stays shared
    gc.enable()
    workers = min(count_cores(), len(steps))
    if workers == 1:
        return [_simulate(spec, length) for spec, length in steps]
    with ProcessPoolExecutor(workers, get_context("fork"), end_with_parent, (os.getpid(),)) as pool:
        return list(pool.map(_simulate, [spec for spec, _ in steps], [length for _, length in steps]))


def _import_libraries(with_adapters: bool) -> None:
    """Import what every process needs, once, before the fork."""
    import torch

    from azrecipe.planning.simulation import step_simulation

    logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)  # it prints tracebacks of errors that are told in words
    torch.set_num_threads(1)  # shapes need no more, and threads do not survive a fork
    step_simulation.import_libraries(with_adapters)


def _simulate(spec: StepSpec, length: int) -> StepCost | CommandError:
    """Simulate a step; return the error where it cannot be simulated."""
    from azrecipe.planning.simulation import step_simulation

    try:
        return step_simulation.measure_step(spec, length)
    except CommandError as error:
        return error
    except Exception as error:  # a model's code may raise anything
        reason = str(error).strip().partition("\n")[0]
        kind = spec.config.get("model_type")
        if GROUPED_PRODUCTS in reason:
            return CommandError(
                f"a {kind} multiplies its experts' matrices in groups, which PyTorch can only plan in bfloat16: plan with precision: bf16_pure, "
                "or sharded (--accelerate-config fsdp on several cards)"
            )
        return CommandError(f"a training step of this {kind} could not be simulated ({type(error).__name__}: {reason})")
