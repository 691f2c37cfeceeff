"""What the launcher asked for, whether this machine can honour it, and the proof that it did.

Accelerate and torchrun leave their wishes in environment variables. On a machine without an accelerator some of them
are dropped without a word (a sharded job then trains a full replica in each process), so they are read here first and
refused where they cannot be real.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from azrecipe.errors import CannotRun, CommandError, Problem, RecipeError, RunFailed
from azrecipe.parts import cpu, liger, storage

if TYPE_CHECKING:
    from transformers import Trainer

    from azrecipe.recipe.load import Recipe


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
    if storage.apart() and backend.zero and nodes(os.environ) > 1:
        raise CommandError(f"{storage.SWITCH}=local is not verified with DeepSpeed: use accelerate_configs/fsdp.yaml")
    if _flag(os.environ, "ACCELERATE_USE_PARALLELISM_CONFIG"):  # Accelerate does not know what a shard size of -1 stands for
        os.environ["PARALLELISM_CONFIG_DP_SHARD_SIZE"] = str(backend.world // (backend.replicate * backend.context))
    if not has_accelerator():
        cpu.bring_up(backend.kind, backend.sharded, backend.context > 1)
    elif backend.sharded and not torch.cuda.is_available():
        raise CannotRun(f"{backend.kind} needs GPUs of CUDA or ROCm, or a machine without any accelerator. What runs here: one process")
    return backend


def check_precision(precision: str, use_liger_kernel: bool) -> str:
    """Raise CannotRun, naming everything asked for that this machine lacks and what would run; returns a warning or ""."""
    import torch

    problems, instead = [], []
    slow = precision.startswith("bf16") and not has_accelerator()
    if use_liger_kernel and not (torch.cuda.is_available() and has_accelerator()):
        problems.append("use_liger_kernel: true needs a GPU (its kernels are Triton's)")
        instead.append("--set training.use_liger_kernel=false")
    if precision.startswith("bf16") and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(f"precision: {precision} needs a GPU with bfloat16 (Ampere or newer), and this is {torch.cuda.get_device_name()}")
        instead.append("--set training.precision=float32")
    if problems and slow:
        problems.append(f"precision: {precision} would run on this CPU, many times slower than float32")
        instead.append("--set training.precision=float32")
    if problems:
        raise CannotRun(
            "this machine cannot run the recipe as it stands:\n  "
            + "\n  ".join(problems)
            + f"\n  What would run here: the same command with {' '.join(instead)}; whether a model of this size is worth waiting for is another question"
        )
    return f"precision: {precision} on a CPU is many times slower than float32" if slow else ""


def check_compiler(torch_compile: bool) -> None:
    """Raise CannotRun where torch.compile has no compiler for what it writes: C++ for a CPU, C for Triton's launchers."""
    if not torch_compile:
        return
    variable, names = ("CC", ("cc", "gcc", "clang")) if has_accelerator() else ("CXX", ("clang++" if sys.platform == "darwin" else "g++",))
    if not any(shutil.which(name) for name in ([os.environ[variable]] if os.environ.get(variable) else names)):
        raise CannotRun(
            f"torch_compile: true needs a compiler, and there is no {' or '.join(names)} here: install one (Debian, Ubuntu: apt-get install g++), "
            f"name yours in {variable}, or --set training.torch_compile=false"
        )


def check_adapter(adapter: str) -> None:
    """Raise CannotRun where a base in 4 bits is asked for and bitsandbytes is not there."""
    if adapter == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        raise CannotRun("adapter: qlora needs bitsandbytes: pip install 'azrecipe[qlora]'")


def check_quantized(adapter: str, backend: Backend) -> None:
    """Raise CannotRun for a quantised base on a sharded backend."""
    if adapter == "qlora" and backend.sharded:
        raise CannotRun("adapter: qlora is not verified on a sharded backend: --accelerate-config ddp or one GPU, or adapter: lora")


def check_trackers(report_to: list[str]) -> None:
    """Raise CannotRun for trackers whose package is missing."""
    missing = [name for name in report_to if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(
            f"report_to: {', '.join(missing)} is not installed: pip install {' '.join(missing)}, or --set training.report_to=[]"
        )


def check_context(context: int, recipe: Recipe) -> None:
    """Raise RecipeError for what cannot be trained with sequences split over processes. PyTorch's ring attention knows causal masks only."""
    if context == 1:
        return
    if recipe.stage != "pretrain":
        raise recipe.problem("sequences split over processes (cp_size) are for pretraining: use accelerate_configs/fsdp.yaml", "stage")
    config, problems = recipe.config, []
    if config.data.packing:
        message = "the accelerate config splits sequences over processes, which drops masks: packed documents would see each other. packing: false"
        problems.append(Problem(recipe.place("data", "packing"), message))
    if config.model.attn_implementation != "sdpa":
        problems.append(
            Problem(
                recipe.place("model", "attn_implementation"),
                "the accelerate config splits sequences over processes, which is for sdpa only",
            )
        )
    if config.training.torch_compile:
        problems.append(
            Problem(recipe.place("training", "torch_compile"), "not verified with sequences split over processes: torch_compile: false")
        )
    if config.training.precision == "float32" and has_accelerator():
        message = "sequences split over processes are for bfloat16 on GPUs, as PyTorch's ring attention is: bf16_mixed or bf16_pure"
        problems.append(Problem(recipe.place("training", "precision"), message))
    if problems:
        raise RecipeError(problems)


def check_devices(backend: Backend) -> None:
    """Raise CannotRun for one process among several GPUs: transformers would spread it over them by nn.DataParallel."""
    import torch

    if backend.kind == "single" and has_accelerator() and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        raise CannotRun(
            f"{count} GPUs are visible and one process was started: say --num-processes {count}, or set CUDA_VISIBLE_DEVICES=0 to use one"
        )


def share(path: Path, text: str) -> None:
    """Check that every process of a run sees the main one's file, as shared storage must. Raises CannotRun; a collective."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return
    said = [text]
    dist.broadcast_object_list(said, src=0)
    seen = path.exists() and said[0] in path.read_text(encoding="utf-8")
    if not seen:
        raise CannotRun(
            f"process {dist.get_rank()} does not see {path}: give a --runs-dir on storage that all machines share.\n"
            f"  Where each has its own, uploaded in the background to one place that is copied to all before a restart: {storage.SWITCH}=local"
        )


def verify(backend: Backend, trainer: Trainer) -> str:
    """Prove that the live objects are what was asked for; returns a line that says so. Raises RunFailed."""
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    problems = []
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != backend.world or trainer.accelerator.num_processes != backend.world:
        problems.append(f"{world} processes are connected, {backend.world} were asked for")
    model: Any = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)  # below torch.compile's wrapping
    if backend.kind == "ddp" and not isinstance(model, DistributedDataParallel):
        problems.append(f"the model is a {type(model).__name__}, not DistributedDataParallel")
    if backend.fsdp:
        parameters = list(model.parameters())
        split = getattr(trainer.accelerator.parallelism_config, "cp_size", 1)
        if split != backend.context:
            problems.append(f"sequences are split over {split} processes, not {backend.context}")
        if not all(isinstance(p, DTensor) for p in parameters):
            problems.append("its parameters are not sharded")
        else:
            shape = tuple(parameters[0].device_mesh.shape)
            wanted = (backend.replicate, backend.world // backend.replicate) if backend.kind == "hsdp" else (backend.world,)
            if shape != wanted:
                problems.append(f"the device mesh is {shape}, not {wanted}")
    if backend.zero:
        stage = getattr(model, "zero_optimization_stage", lambda: None)()
        if stage != int(backend.kind[4:]):
            problems.append(f"DeepSpeed runs ZeRO stage {stage}, not {backend.kind[4:]}")
    if trainer.args.n_gpu > 1:
        problems.append(f"one process would spread over {trainer.args.n_gpu} GPUs by nn.DataParallel")
    kernels = liger.patched(model) if trainer.args.use_liger_kernel else []
    if trainer.args.use_liger_kernel and (lacking := liger.missing(model, trainer.args.liger_kernel_config)):
        problems.append(f"Liger's {', '.join(lacking)} was asked for and runs nowhere in the model")
    if problems:
        raise RunFailed(f"{backend.kind} was asked for and is not what runs: {'; '.join(problems)}")
    context = f", each sequence over {backend.context}" if backend.context > 1 else ""
    return f"{backend.kind}, {backend.world} process{'es' if backend.world > 1 else ''}{context}, device {trainer.args.device}" + (
        f", Liger: {', '.join(kernels)}" if kernels else ""
    )
