"""Simulate steps in a process without GPUs, beside a run that has some.

That process does not join the run's launch.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from azrecipe.planning.simulation import cost_cache
from azrecipe.planning.simulation.step_cost import StepCost, parse_step_cost
from azrecipe.planning.simulation.step_spec import StepSpec
from azrecipe.recipe.types import Lora
from azrecipe.utils import environment_variables
from azrecipe.utils.console import print_line
from azrecipe.utils.parent_watch import ParentProbe, ParentWatch
from azrecipe.utils.python_command import build_python_command, build_python_environment

# Variables that a launcher sets: a process that has them would start a process group
LAUNCH_VARIABLE_PREFIXES = (
    *("RANK", "WORLD_SIZE", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_"),
    *("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_"),
)

Steps = Sequence[tuple[StepSpec, int]]


class EstimateUnavailable(Exception):
    """Why there is no estimate."""


def simulate_in_subprocess(steps: Steps) -> list[StepCost]:
    """Load or simulate costs, in a process without GPUs.

    That process does not join the launch. Raises EstimateUnavailable where it fails or takes too long.
    """
    timeout = float(environment_variables.ESTIMATE_SECONDS.read())  # it takes a few
    if (cached := cost_cache.load_costs(steps)) is not None:
        return cached
    inherited = {name: value for name, value in build_python_environment().items() if not name.startswith(LAUNCH_VARIABLE_PREFIXES)}
    without_gpu = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        build_python_command("azrecipe.planning.simulation_process"),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=inherited | without_gpu, start_new_session=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(json.dumps([[asdict(step), length] for step, length in steps]), timeout=timeout)
    except subprocess.TimeoutExpired:
        raise EstimateUnavailable(f"it took more than {timeout:g} s ({environment_variables.ESTIMATE_SECONDS} allows more)") from None
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.communicate()
    if process.returncode:
        raise EstimateUnavailable((err.strip().splitlines() or [f"the simulation's process ended with {process.returncode}"])[-1])
    return [parse_step_cost(cost) for cost in json.loads(out.splitlines()[-1])]


def _parse_step(data: dict[str, Any]) -> StepSpec:
    lora = Lora(**data["lora"]) if data["lora"] else None
    return StepSpec(**{**data, "lora": lora, "trainable": tuple(data["trainable"]), "kernels": tuple(data["kernels"])})


class BackgroundSimulation:
    """A thread that simulates steps in a process of its own.

    It does not keep this process from ending; the other process ends with it.
    """

    def __init__(self, steps: Steps) -> None:
        self.costs: list[StepCost] = []
        self.error: Exception | None = None
        self.thread = threading.Thread(target=self._simulate, args=(steps,), name="simulation", daemon=True)
        self.thread.start()

    def _simulate(self, steps: Steps) -> None:
        try:
            self.costs = simulate_in_subprocess(steps)
        except Exception as error:
            self.error = error

    def wait(self) -> list[StepCost]:
        """Wait for the costs of the steps; raises what the simulation raised."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.costs


def _main() -> None:
    """Simulate the steps that `simulate_in_subprocess` writes to stdin."""
    ParentWatch(ParentProbe(), lambda: os.killpg(0, signal.SIGKILL))  # this process' group: with the processes that it started
    steps = [(_parse_step(step), length) for step, length in json.load(sys.stdin)]
    print_line(json.dumps([cost.to_dict() for cost in cost_cache.load_or_simulate_costs(steps)]))


if __name__ == "__main__":
    _main()
