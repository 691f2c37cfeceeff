"""Versions and machine of a run, for environment.json."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import azrecipe
from azrecipe.distributed.backend import asked as launched
from azrecipe.distributed.backend import nodes
from azrecipe.utils.process_pool import cores

PACKAGES = ("torch", "transformers", "tokenizers", "accelerate", "trl", "peft", "datasets", "liger-kernel", "deepspeed")


def environment() -> dict[str, Any]:
    """Versions and machine, for environment.json."""
    versions = {}
    for package in PACKAGES:
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
        "cpus": cores(),
        "torch_threads": torch.get_num_threads(),
        "gpus": [gpu.name for gpu in gpus],
        "gpu_memory_bytes": [gpu.total_memory for gpu in gpus],
        "world_size": backend.world,
        "nodes": nodes(os.environ),
        "backend": {"kind": backend.kind, "replicate": backend.replicate, "context": backend.context},
        "versions": versions,
    }


def _commit() -> str | None:
    """The commit of azrecipe's own checkout; None for an installed wheel."""
    folder = Path(azrecipe.__file__).parent
    if not (folder.parent / ".git").exists():
        return None
    try:
        done = subprocess.run(["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
