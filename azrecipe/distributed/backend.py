"""How the processes of a run share the work, as the launcher asked for it.

Accelerate and torchrun leave their wishes in environment variables. On a machine without an accelerator some of them
are dropped without a word (a sharded job then trains a full replica in each process), so they are read here first and
refused where they cannot be real.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from azrecipe.distributed import cpu_backend, local_storage
from azrecipe.errors import CannotRun, CommandError

if TYPE_CHECKING:
    pass


@dataclass(frozen=True)
class Backend:
    """How the processes of a run share the work. kind: single, ddp, fsdp2, hsdp or zero1/2/3.

    `context` processes at a time read the same sequences, each a part of every one.
    """

    kind: str
    world: int
    rank: int
    replicate: int = 1
    context: int = 1

    @property
    def readers(self) -> int:
        """How many processes, or groups of `context` of them, read different sequences."""
        return self.world // self.context

    @property
    def main(self) -> bool:
        return self.rank == 0

    @property
    def sharded(self) -> bool:
        return self.kind not in ("single", "ddp")

    @property
    def shards(self) -> int:
        """Processes that the weights are split over; 1: each has all of them."""
        return 1 if self.kind in ("single", "ddp", "zero1", "zero2") else self.world // self.replicate

    @property
    def zero(self) -> bool:
        """Whether DeepSpeed runs it."""
        return self.kind.startswith("zero")

    @property
    def fsdp(self) -> bool:
        return self.kind in ("fsdp2", "hsdp")


def _flag(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "false").lower() in ("1", "true", "yes")


def asked(environment: Mapping[str, str]) -> Backend:
    """Read the launcher's wish from a worker's environment. Raises CommandError for what was not really started."""
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
    world, rank = int(environment.get("WORLD_SIZE", "1")), int(environment.get("RANK", "0"))
    if _flag(environment, "ACCELERATE_USE_MEGATRON_LM"):
        raise CommandError("Megatron-LM is not a backend of azrecipe: use ddp, fsdp, hsdp, zero2 or zero3")
    if _flag(environment, "ACCELERATE_USE_DEEPSPEED"):
        return Backend(f"zero{_zero_stage(environment)}", world, rank)
    if _flag(environment, "ACCELERATE_USE_FSDP"):
        return _fsdp(environment, world, rank)
    return Backend("ddp" if world > 1 else "single", world, rank, replicate=world)


def _fsdp(environment: Mapping[str, str], world: int, rank: int) -> Backend:
    if environment.get("FSDP_VERSION", "1") != "2":
        raise CommandError("only FSDP 2 is supported: say fsdp_version: 2 in the accelerate config")
    if not _flag(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        if "HYBRID" in environment.get("FSDP_SHARDING_STRATEGY", ""):
            raise CommandError("HYBRID_SHARD belongs to FSDP 1 and FSDP 2 ignores it: use accelerate_configs/hsdp.yaml")
        return Backend("fsdp2", world, rank)
    size = {key: int(environment.get(f"PARALLELISM_CONFIG_{key}_SIZE", "1")) for key in ("DP_REPLICATE", "DP_SHARD", "TP", "CP", "SP")}
    if size["TP"] * size["SP"] != 1:
        raise CommandError(
            "tensor and sequence parallelism are not supported; parallelism_config_cp_size is for sequences that outgrow a GPU"
        )
    mesh = Mesh(size["DP_REPLICATE"], size["DP_SHARD"], size["CP"])
    wrong = mesh.problem(world)
    if wrong:
        raise CommandError(wrong)
    return Backend("hsdp" if mesh.replicate > 1 else "fsdp2", world, rank, mesh.replicate, mesh.context)


@dataclass(frozen=True)
class Mesh:
    """The sizes in an accelerate config's parallelism_config. A shard of -1 is azrecipe's word for what is left over."""

    replicate: int = 1
    shard: int = 1
    context: int = 1

    def problem(self, world: int) -> str:
        """What is wrong with it where `world` processes are started, or ""."""
        if min(self.replicate, self.context) < 1 or (self.shard < 1 and self.shard != -1):
            return "the accelerate config has a size below 1 in its parallelism_config"
        groups = self.replicate * self.context
        if self.replicate > 1 and self.context > 1:
            return "the accelerate config splits sequences and replicates the model as well, which is not verified: dp_replicate_size 1"
        if self.shard == -1 and world % groups:
            what = f"splits each sequence over {self.context}" if self.context > 1 else f"replicates over {self.replicate} groups of"
            return f"the accelerate config {what} processes, and {world} do not divide by that"
        if self.shard != -1 and groups * self.shard != world:
            context = f", splits sequences over {self.context}" if self.context > 1 else ""
            return f"the accelerate config replicates over {self.replicate}{context} and shards over {self.shard} processes, and {world} are started"
        return ""


def _zero_stage(environment: Mapping[str, str]) -> int:
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path not in ("none", ""):
        return int(json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
    return int(environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2"))


def nodes(environment: Mapping[str, str]) -> int:
    """How many machines the launcher started processes on."""
    world = int(environment.get("WORLD_SIZE", "1"))
    return max(world // int(environment.get("LOCAL_WORLD_SIZE", world)), 1)


def has_accelerator() -> bool:
    """Whether torch sees a GPU or its like, and the user has not turned it off."""
    import torch

    return torch.accelerator.is_available() and not _flag(os.environ, "ACCELERATE_USE_CPU")


def set_up() -> Backend:
    """Read the launcher's wish and prepare this process for it. Call before transformers is imported.

    Raises CommandError or CannotRun.
    """
    import torch

    backend = asked(os.environ)
    if local_storage.apart() and backend.zero and nodes(os.environ) > 1:
        raise CommandError(f"{local_storage.SWITCH}=local is not verified with DeepSpeed: use accelerate_configs/fsdp.yaml")
    if _flag(os.environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):  # Accelerate does not know what a shard size of -1 stands for
        os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(backend.world // (backend.replicate * backend.context))
    if not has_accelerator():
        cpu_backend.bring_up(backend.kind, backend.sharded, backend.context > 1)
    elif backend.sharded and not torch.cuda.is_available():
        raise CannotRun(f"{backend.kind} needs GPUs of CUDA or ROCm, or a machine without any accelerator. What runs here: one process")
    return backend
