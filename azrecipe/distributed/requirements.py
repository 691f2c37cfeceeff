"""Checks that this machine and backend can run a recipe."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from azrecipe.distributed.backend import Backend, has_accelerator
from azrecipe.distributed.batch_size import split_batch
from azrecipe.errors import CannotRun, Problem, RecipeError
from azrecipe.recipe.attention_kinds import AUTO
from azrecipe.recipe.extras import check_adapter
from azrecipe.recipe.optimizer_settings import list_optimizers
from azrecipe.recipe.types import Lora, PretrainConfig, SftConfig

if TYPE_CHECKING:
    from azrecipe.recipe.load import Recipe


def check_precision(precision: str, use_liger_kernel: bool) -> str:
    """Check that this machine has the kernels and the precision.

    Returns a warning, or "". Raises CannotRun with everything that is missing, and the options that would run.
    """
    import torch

    problems, alternatives = [], []
    slow = precision.startswith("bf16") and not has_accelerator()
    if use_liger_kernel and not (torch.cuda.is_available() and has_accelerator()):
        problems.append("use_liger_kernel: true needs a GPU (its kernels are Triton's)")
        alternatives.append("--set training.use_liger_kernel=false")
    elif use_liger_kernel and (problem := find_launcher_problem()):
        problems.append(f"use_liger_kernel: true needs {problem}")
        alternatives.append("--set training.use_liger_kernel=false")
    if precision.startswith("bf16") and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        problems.append(f"precision: {precision} needs a GPU with bfloat16 (Ampere or newer), and this is {torch.cuda.get_device_name()}")
        alternatives.append("--set training.precision=float32")
    if problems and slow:
        problems.append(f"precision: {precision} would run on this CPU, many times slower than float32")
        alternatives.append("--set training.precision=float32")
    if problems:
        raise CannotRun(
            "this machine cannot run the recipe as it stands:\n  "
            + "\n  ".join(problems)
            + f"\n  What would run here: the same command with {' '.join(alternatives)}; a large model may take very long"
        )
    return f"precision: {precision} on a CPU is many times slower than float32" if slow else ""


def find_launcher_problem(include: str | None = None) -> str:
    """Say what Triton lacks to build the launchers of its kernels, or "".

    It compiles them at the first use of a kernel (triton/runtime/build.py).

    Args:
        include: The folder of Python's headers; None for this Python's.
    """
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    if not any(shutil.which(name) for name in names):
        return f"a C compiler, and there is no {' or '.join(names)} here (Debian, Ubuntu: apt-get install gcc), or name yours in CC"
    folder = Path(include or sysconfig.get_paths()["include"])
    if not (folder / "Python.h").is_file():
        return f"Python's headers, and there is no {folder / 'Python.h'} (Debian, Ubuntu: apt-get install python3-dev)"
    return ""


def check_compiler(torch_compile: bool) -> None:
    """Raise CannotRun where torch.compile finds no compiler.

    It needs C++ for a CPU, and C for Triton's launchers.
    """
    if not torch_compile:
        return
    variable, names = ("CC", ("cc", "gcc", "clang")) if has_accelerator() else ("CXX", ("clang++" if sys.platform == "darwin" else "g++",))
    if not any(shutil.which(name) for name in ([os.environ[variable]] if os.environ.get(variable) else names)):
        raise CannotRun(
            f"torch_compile: true needs a compiler, and there is no {' or '.join(names)} here: install one (Debian, Ubuntu: apt-get install g++), "
            f"name yours in {variable}, or --set training.torch_compile=false"
        )


def check_quantized(adapter: str, backend: Backend) -> None:
    """Raise CannotRun for a quantised base model on a sharded backend."""
    if adapter == "qlora" and backend.sharded:
        raise CannotRun("adapter: qlora is not verified on a sharded backend: --accelerate-config ddp or one GPU, or adapter: lora")


def check_context_parallel(context: int, recipe: Recipe) -> None:
    """Raise RecipeError for keys that context parallelism does not support.

    PyTorch's ring attention has causal masks only.
    """
    if context == 1:
        return
    if recipe.stage != "pretrain":
        raise recipe.error("sequences split over processes (cp_size) are for pretraining: use accelerate_configs/fsdp.yaml", "stage")
    config, problems = recipe.config, []
    if config.data.packing:
        message = "the accelerate config splits sequences over processes, which drops masks: packed documents would see each other. packing: false"
        problems.append(Problem(recipe.locate("data", "packing"), message))
    if config.model.attn_implementation not in (AUTO, "sdpa"):
        problems.append(
            Problem(
                recipe.locate("model", "attn_implementation"),
                "the accelerate config splits sequences over processes, which is for sdpa only",
            )
        )
    if config.training.torch_compile:
        problems.append(
            Problem(recipe.locate("training", "torch_compile"), "not verified with sequences split over processes: torch_compile: false")
        )
    if config.training.precision == "float32" and has_accelerator():
        message = "sequences split over processes are for bfloat16 on GPUs, as PyTorch's ring attention is: bf16_mixed or bf16_pure"
        problems.append(Problem(recipe.locate("training", "precision"), message))
    if problems:
        raise RecipeError(problems)


def check_device_count(backend: Backend) -> None:
    """Raise CannotRun for one process that sees several GPUs.

    transformers would use all of them with nn.DataParallel.
    """
    import torch

    if backend.strategy == "single" and has_accelerator() and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        raise CannotRun(
            f"{count} GPUs are visible and one process was started: say --num-processes {count}, or set CUDA_VISIBLE_DEVICES=0 to use one"
        )


def check_adapter_backend(adapter: str, backend: Backend) -> None:
    """Raise CannotRun where a quantised base model cannot be trained."""
    check_adapter(adapter)
    check_quantized(adapter, backend)


def check_new_token_rows(backend: Backend, new_token_ids: Sequence[int], lora: Lora) -> None:
    """Raise CannotRun for new token rows on a sharded backend.

    PEFT cannot train single rows of a sharded embedding matrix.
    """
    if new_token_ids and lora.train_new_tokens and backend.sharded and "embed_tokens" not in lora.modules_to_save:
        raise CannotRun(
            f"{len(new_token_ids)} tokens of the chat template are new to the model, and PEFT cannot train rows of a matrix that is sharded: "
            "run without sharding (an adapter needs little memory), or --set lora.train_new_tokens=false"
        )


def check_fsdp_limits(config: PretrainConfig | SftConfig, fsdp: bool, data_parallel_size: int) -> None:
    """Raise CannotRun for settings that fail with FSDP 2.

    Both fail in the first step. transformers' Adafactor mixes whole and split tensors (5.23, optimization.py). TRL reads the
    head's weight without FSDP (1.16, add_fused_lm_head), which fails where an adapter's gradients accumulate under mixed
    precision.

    Args:
        config: The recipe.
        fsdp: Whether FSDP splits the model.
        data_parallel_size: Processes that read different sequences.
    """
    if not fsdp:
        return
    if "adafactor" in list_optimizers(config):
        raise CannotRun("optim: adafactor does not work on a model that FSDP splits: --set training.optim=adamw_torch_fused, or ddp")
    training = config.training
    if isinstance(config, SftConfig) and config.adapter != "none" and training.precision == "bf16_mixed":
        batch = split_batch(training.global_batch_size, training.per_device_train_batch_size, data_parallel_size)
        if batch.accumulation > 1:
            raise CannotRun(
                f"an adapter under precision: bf16_mixed cannot accumulate {batch.accumulation} batches where FSDP splits the model: as many processes "
                f"as make it one batch ({training.global_batch_size // training.per_device_train_batch_size}), ddp, or bf16_pure"
            )
