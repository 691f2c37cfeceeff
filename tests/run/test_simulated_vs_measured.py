"""The planner against reality: what it predicts of a step's memory and operations, and what a real step of the same recipe takes.

Configurations are drawn by a seed (AZRECIPE_SEED, else 7). Measured is the second or third step of the recipe's own trainer: bytes by the reports
of PyTorch's allocator, operations by PyTorch's counter. What no CPU can show: Liger's kernels, the GPU's allocator, NCCL's buffers.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.distributed.backend import Backend
from azrecipe.planning.model_config import ModelLookup, resolve_model_shape
from azrecipe.planning.simulation.step_simulation import measure_step
from azrecipe.planning.training_loops import plan_loops
from azrecipe.recipe.load import load_recipe
from tests.conftest import ROOT
from tests.run.simulated_vs_measured import LITTLE, Case, draw, fill
from tests.small import environment

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here: these runs are for the CPU"),
]

SEED = int(os.environ.get("AZRECIPE_SEED", "7"))


@dataclass(frozen=True)
class Compared:
    """A case's bytes and operations, predicted and measured. unseen: bytes that went without the profiler seeing it, and may not have been
    there when the peak was."""

    case: Case
    bytes: tuple[float, float]
    flops: tuple[float, float]
    unseen: float = 0.0

    @property
    def error(self) -> float:
        found, peak = self.bytes
        return found / min(max(found, peak - self.unseen), peak) - 1

    def __str__(self) -> str:
        drawn = " ".join(f"{key}={value}" for key, value in self.case.drawn.items())
        mib = " ".join(f"{value / 2**20:8.3f}" for value in self.bytes)
        return f"{self.case.name} {mib} MiB {self.error:+7.2%}  FLOPs {self.flops[0]:.0f} {self.flops[1]:.0f}  {drawn}"


def measured(folder: Path) -> dict[str, Any]:
    """Every case's real step; of two processes that which saw all that was let go of counts."""
    alone = [sys.executable, "-m", "tests.run.simulated_vs_measured", str(folder), str(SEED)]
    config = ROOT / "accelerate_configs" / "fsdp.yaml"
    launcher = [
        "-m",
        "azrecipe.pipeline.accelerate_launcher",
        "--config_file",
        str(config),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    for command in (alone, [sys.executable, *launcher, *alone[1:]]):
        done = subprocess.run(
            command, cwd=folder, env=environment(OMP_NUM_THREADS="1"), capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-6000:]
    single, first, second = (json.loads((folder / f"measured-{name}.json").read_text()) for name in ("single-0", "fsdp2-0", "fsdp2-1"))
    return single | {name: min(first[name], second[name], key=lambda found: abs(found["left"])) for name in first}


def predicted(case: Case, folder: Path, seen: dict[str, Any]) -> Compared:
    recipe = load_recipe(folder / f"{case.name}.yaml")
    backend = Backend(case.kind, 2 if case.kind == "fsdp2" else 1, 0)
    loop = plan_loops(recipe, resolve_model_shape(recipe, ModelLookup(folder / "runs", {})), backend, cuda=False)[0]
    batch, length = seen["shape"]
    assert batch == loop.batch
    assert length == loop.length or (recipe.stage == "sft" and length < loop.length)  # conversations end where they end
    cost = measure_step(loop.step, length)
    memory = sum(cost.get_peak_memory(batch, accumulates=loop.step.accumulates).values())
    return Compared(
        case,
        (memory, seen["peak"]),
        (cost.count_flops(batch) * loop.accumulation, seen["flops"]),
        seen["left"] if seen["left"] >= LITTLE else 0.0,
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> list[Compared]:
    folder = tmp_path_factory.mktemp("reality")
    before = Path.cwd()
    os.chdir(folder)
    try:
        fill(folder, draw(SEED))
        seen = measured(folder)
        gc.collect()
        gc.freeze()  # what is there now need not be looked through before each step
        found = [predicted(case, folder, seen[case.name]) for case in draw(SEED)]
    finally:
        gc.unfreeze()
        os.chdir(before)
    print(f"\nseed {SEED}: predicted, measured\n" + "\n".join(map(str, found)))
    return found


def test_the_predicted_peak_is_the_measured_one(compared: list[Compared]) -> None:
    assert len(compared) >= 24
    wrong = [str(each) for each in compared if abs(each.error) > 0.05]
    assert not wrong, f"seed {SEED}\n" + "\n".join(wrong)
    assert statistics.median(abs(each.error) for each in compared) < 0.01


def test_the_operations_counted_are_those_of_the_real_step(compared: list[Compared]) -> None:
    wrong = [str(each) for each in compared if round(each.flops[0]) != each.flops[1]]
    assert not wrong, f"seed {SEED}\n" + "\n".join(wrong)
