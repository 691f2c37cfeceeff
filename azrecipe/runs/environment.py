"""Collect the package versions and the machine of a run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import azrecipe
from azrecipe.distributed.backend import backend_from_env as launched
from azrecipe.distributed.backend import count_nodes
from azrecipe.utils.process_pool import count_cores

RECORDED_PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "trl", "peft", "datasets", "liger-kernel", "deepspeed")


def collect_environment() -> dict[str, Any]:
    """Return package versions and machine for environment.json."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    backend = launched(os.environ)
    return {
        "azrecipe": azrecipe.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.machine(),
        "cpus": count_cores(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [gpu.name for gpu in gpus],
        "gpu_memory_bytes": [gpu.total_memory for gpu in gpus],
        "world_size": backend.world_size,
        "nodes": count_nodes(os.environ),
        "backend": {"kind": backend.strategy, "replicate": backend.replicate_size, "context": backend.context_parallel_size},
        "versions": versions,
    }


def _commit() -> str | None:
    """Return the commit of azrecipe's checkout; None for an installed wheel."""
    folder = Path(azrecipe.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        process = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return process.stdout.strip()
