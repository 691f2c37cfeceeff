"""The backend: what it says of itself, and launchers that describe what they did not start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from azrecipe.distributed.backend import Backend, ParallelDims, backend_from_env, count_nodes
from azrecipe.errors import CommandError
from tests.conftest import write

WORKER = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
ZERO = {**WORKER, "ACCELERATE_USE_DEEPSPEED": "true"}
FSDP = {**WORKER, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("backend", "shards", "readers", "sharded"),
    [
        (Backend("single", 1, 0), 1, 1, False),
        (Backend("ddp", 4, 1, replicate_size=4), 1, 4, False),
        (Backend("fsdp2", 4, 0), 4, 4, True),
        (Backend("hsdp", 8, 0, replicate_size=2), 4, 8, True),
        (Backend("fsdp2", 8, 0, context_parallel_size=2), 8, 4, True),
        (Backend("zero2", 4, 0), 1, 4, True),
        (Backend("zero3", 4, 0), 4, 4, True),
    ],
)
def test_a_backend_says_how_weights_and_sequences_are_spread(backend: Backend, shards: int, readers: int, sharded: bool) -> None:
    assert (backend.num_shards, backend.data_parallel_size, backend.sharded) == (shards, readers, sharded)
    assert backend.main is (backend.rank == 0)
    assert backend.uses_deepspeed is backend.strategy.startswith("zero") and backend.uses_fsdp is (backend.strategy in ("fsdp2", "hsdp"))


def test_processes_without_a_strategy_are_ddp() -> None:
    assert backend_from_env({}) == Backend("single", 1, 0, 1)
    assert backend_from_env(WORKER) == Backend("ddp", 4, 3, 4)
    assert backend_from_env({**WORKER, "WORLD_SIZE": "1", "RANK": "0"}) == Backend("single", 1, 0, 1)


def test_deepspeeds_stage_comes_from_its_file_or_the_variable(tmp_path: Path) -> None:
    assert backend_from_env(ZERO).strategy == "zero2"
    assert backend_from_env({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}).strategy == "zero3"
    file = write(tmp_path / "ds.json", json.dumps({"zero_optimization": {"stage": 1}}))
    assert (
        backend_from_env({**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file), "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}).strategy
        == "zero1"
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, "several processes were asked for and one was started"),
        ({"RANK": "0"}, "RANK is set and LOCAL_RANK is not"),
        ({**WORKER, "ACCELERATE_MIXED_PRECISION": "fp16"}, "the launcher sets mixed_precision: fp16"),
        ({**WORKER, "ACCELERATE_USE_MEGATRON_LM": "1"}, "Megatron-LM is not a backend"),
        ({**FSDP, "FSDP_VERSION": "1"}, "only FSDP 2 is supported"),
        ({**FSDP, "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, "HYBRID_SHARD belongs to FSDP 1"),
        ({**FSDP, "ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}, "tensor and sequence parallelism"),
    ],
)
def test_a_launcher_that_asks_for_what_cannot_be_is_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(CommandError, match=message):
        backend_from_env(environment)


@pytest.mark.parametrize(
    ("dims", "world_size", "problem"),
    [
        (ParallelDims(), 1, ""),
        (ParallelDims(2, 4), 8, ""),
        (ParallelDims(2, -1), 8, ""),
        (ParallelDims(1, -1, 2), 6, ""),
        (ParallelDims(0, 4), 4, "a size below 1"),
        (ParallelDims(2, -2), 4, "a size below 1"),
        (ParallelDims(2, 2, 2), 8, "which is not verified"),
        (ParallelDims(2, -1), 7, "replicates over 2 groups of processes, and 7 do not divide by that"),
        (ParallelDims(1, -1, 2), 7, "splits each sequence over 2 processes, and 7 do not divide by that"),
        (ParallelDims(2, 8), 8, "replicates over 2 and shards over 8 processes, and 8 are started"),
    ],
)
def test_sizes_have_to_multiply_to_the_processes(dims: ParallelDims, world_size: int, problem: str) -> None:
    message = dims.find_problem(world_size)
    assert problem in message and bool(problem) is bool(message)


def test_machines_are_counted_by_the_processes_on_each() -> None:
    assert count_nodes({}) == 1
    assert count_nodes({"WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8"}) == 2
    assert count_nodes({"WORLD_SIZE": "2"}) == 1
