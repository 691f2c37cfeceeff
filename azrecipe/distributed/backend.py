"""Read and set up the launcher's parallelism strategy.

Accelerate and torchrun describe it in environment variables. On a machine without an accelerator Accelerate drops some of
them silently (a sharded job then trains a full replica in each process). So they are read here first, and refused where
they cannot work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from azrecipe.distributed import cpu_backend, local_storage
from azrecipe.errors import CannotRun, CommandError
from azrecipe.utils import environment_variables


@dataclass(frozen=True)
class Backend:
    """The parallelism strategy of a run, seen from one process."""

    strategy: str  # single, ddp, fsdp2, hsdp, zero1, zero2 or zero3
    world_size: int
    rank: int
    replicate_size: int = 1  # replicas of the model
    context_parallel_size: int = 1  # processes that each read a part of the same sequences

    @property
    def data_parallel_size(self) -> int:
        """The number of processes, or groups of them, that read different sequences."""
        return self.world_size // self.context_parallel_size

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.strategy not in ("single", "ddp")

    @property
    def num_shards(self) -> int:
        """The number of processes that the weights are split over.

        It is 1 where each process has all weights.
        """
        return 1 if self.strategy in ("single", "ddp", "zero1", "zero2") else self.world_size // self.replicate_size

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed trains the model."""
        return self.strategy.startswith("zero")

    @property
    def uses_fsdp(self) -> bool:
        return self.strategy in ("fsdp2", "hsdp")


def _is_set(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")


def backend_from_env(environment: Mapping[str, str]) -> Backend:
    """Read the launcher's strategy from a worker's environment.

    Raises CommandError where the launcher did not start what the environment describes, or azrecipe does not support it.
    """
    if "MASTER_ADDR" in environment and "RANK" not in environment:
        raise CommandError(
            "several processes were asked for and one was started: accelerate's --cpu (and --num_processes without a GPU) only reaches "
            "further processes through mpirun.\n"
            "  Use --config_file accelerate_configs/ddp.yaml, --multi_gpu (it works on CPU too), torchrun, or azrecipe run --num-processes N"
        )
    if "RANK" in environment and "LOCAL_RANK" not in environment:
        raise CommandError("RANK is set and LOCAL_RANK is not: start with accelerate launch, torchrun or azrecipe run")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", ""):
        raise CommandError(
            f"the launcher sets mixed_precision: {precision}, and the recipe's training.precision decides that: say mixed_precision: 'no'"
        )
    world_size, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
    if _is_set(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise CommandError("Megatron-LM is not a backend of azrecipe: use ddp, fsdp, hsdp, zero2 or zero3")
    if _is_set(environment, "ACCELERATE_USE_DEEPSPEED"):
        return Backend(f"zero{_read_zero_stage(environment)}", world_size, rank)
    if _is_set(environment, "ACCELERATE_USE_FSDP"):
        return _build_fsdp_backend(environment, world_size, rank)
    return Backend("ddp" if world_size > 1 else "single", world_size, rank, replicate_size=world_size)


def _build_fsdp_backend(environment: Mapping[str, str], world_size: int, rank: int) -> Backend:
    if environment.get("FSDP_VERSION", "1") != "2":
        raise CommandError("only FSDP 2 is supported: say fsdp_version: 2 in the accelerate config")
    if not _is_set(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if "HYBRID" in environment.get("FSDP_SHARDING_STRATEGY", ""):
            raise CommandError("HYBRID_SHARD belongs to FSDP 1 and FSDP 2 ignores it: use accelerate_configs/hsdp.yaml")
        return Backend("fsdp2", world_size, rank)
    sizes = {key: int(environment.get(f"PARALLELISM_CONFIG_{key}_SIZE", "1")) for key in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")}
    if sizes["TP"] * sizes["SP"] != 1:
        raise CommandError(
            "tensor and sequence parallelism are not supported; parallelism_config_cp_size is for sequences that outgrow a GPU"
        )
    dims = ParallelDims(sizes["DP_REPLICATE"], sizes["DP_SHARD"], sizes["CP"])
    problem = dims.find_problem(world_size)
    if problem:
        raise CommandError(problem)
    return Backend("hsdp" if dims.replicate_size > 1 else "fsdp2", world_size, rank, dims.replicate_size, dims.context_parallel_size)


@dataclass(frozen=True)
class ParallelDims:
    """The sizes in an accelerate config's parallelism_config."""

    replicate_size: int = 1
    shard_size: int = 1  # -1: as many as the other sizes leave
    context_parallel_size: int = 1

    def find_problem(self, world_size: int) -> str:
        """Return what is wrong with the sizes for `world_size` processes, or ""."""
        if min(self.replicate_size, self.context_parallel_size) < 1 or (self.shard_size < 1 and self.shard_size != -1):
            return "the accelerate config has a size below 1 in its parallelism_config"
        groups = self.replicate_size * self.context_parallel_size
        if self.replicate_size > 1 and self.context_parallel_size > 1:
            return "the accelerate config splits sequences and replicates the model as well, which is not verified: dp_replicate_size 1"
        if self.shard_size == -1 and world_size % groups:
            layout = (
                f"splits each sequence over {self.context_parallel_size}"
                if self.context_parallel_size > 1
                else f"replicates over {self.replicate_size} groups of"
            )
            return f"the accelerate config {layout} processes, and {world_size} do not divide by that"
        if self.shard_size != -1 and groups * self.shard_size != world_size:
            context = f", splits sequences over {self.context_parallel_size}" if self.context_parallel_size > 1 else ""
            return f"the accelerate config replicates over {self.replicate_size}{context} and shards over {self.shard_size} processes, and {world_size} are started"
        return ""


def _read_zero_stage(environment: Mapping[str, str]) -> int:
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path not in ("none", ""):
        return int(json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
    return int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def count_nodes(environment: Mapping[str, str]) -> int:
    """Return the number of machines that the launcher started processes on."""
    world_size = int(environment.get("WORLD_SIZE", "1"))
    return max(world_size // int(environment.get("LOCAL_WORLD_SIZE", world_size)), 1)


def has_accelerator() -> bool:
    """Whether torch sees an accelerator that the user has not disabled."""
    import torch

    return torch.accelerator.is_available() and not _is_set(os.environ, "ACCELERATE_USE_CPU")


def set_up_backend() -> Backend:
    """Prepare this process for the launcher's strategy.

    Call it before transformers is imported. It changes environment variables.

    Raises:
        CommandError: The strategy is not supported.
        CannotRun: This machine cannot run it.
    """
    import torch

    backend = backend_from_env(os.environ)
    if local_storage.storage_is_local() and backend.uses_deepspeed and count_nodes(os.environ) > 1:
        raise CommandError(f"{environment_variables.STORAGE}=local is not verified with DeepSpeed: use accelerate_configs/fsdp.yaml")
    if _is_set(os.environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):  # Accelerate does not accept a shard size of -1
        os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(backend.world_size // (backend.replicate_size * backend.context_parallel_size))
    if backend.uses_fsdp:  # "true" lets transformers leave weights unset; training/main_process_loading.py loads in one process instead
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if not has_accelerator():
        cpu_backend.set_up_cpu(backend.strategy, backend.sharded, backend.context_parallel_size > 1)
    elif backend.sharded and not torch.cuda.is_available():
        raise CannotRun(f"{backend.strategy} needs GPUs of CUDA or ROCm, or a machine without any accelerator. What runs here: one process")
    else:
        cpu_backend.set_num_threads()  # a new vocabulary, merging and random weights are computed on the host
    return backend
