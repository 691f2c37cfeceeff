"""Stage 1: the machine, its versions, and whether everything that the later stages need imports and compiles."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from results import Results

NAMES = ("torch", "triton", "transformers", "accelerate", "liger-kernel", "trl", "peft", "datasets", "numpy", "huggingface-hub", "pyarrow")


def run(results: Results, _recipe: Path, toy: bool) -> None:
    for name, function in (("machine", machine), ("imports", imports), ("ceilings", lambda: ceilings(toy)), ("liger", lambda: liger(toy))):
        results.measure("environment", name, function)


def machine() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {"platform": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}
    for name in NAMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    found["gcc"] = shutil.which("gcc")
    found["Python.h"] = Path(sysconfig.get_paths()["include"], "Python.h").exists()
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["memory"] = torch.cuda.get_device_properties(0).total_memory
        found["cudnn"] = torch.backends.cudnn.version()
        asked = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm,temperature.gpu", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
    return found


def imports() -> dict[str, Any]:
    """Seconds that each import takes, in this order; what a start of azrecipe pays."""
    found = {}
    for name in ("torch", "transformers", "accelerate", "azrecipe.training.pretraining", "azrecipe.stages.pretrain", "azrecipe.stages.sft"):
        begun = time.monotonic()
        __import__(name)
        found[name] = round(time.monotonic() - begun, 2)
    return found


def ceilings(toy: bool) -> dict[str, Any]:
    """What the card does at most: a bf16 product of 8,192 cubed, and a copy, counting bytes read and written."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    size = 512 if toy else 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    block = torch.randn(2**28, device="cuda")
    other = torch.empty_like(block)
    return {
        "tflops_bf16": round(2 * size**3 / timed(lambda: a @ b) / 1e12, 1),
        "copy_tb_per_second": round(2 * block.nbytes / timed(lambda: other.copy_(block)) / 1e12, 3),
    }


def timed(function: Any, times: int = 20) -> float:
    """Median seconds of a function on the GPU, after three calls that warm it up."""
    import torch

    for _ in range(3):
        function()
    marks = []
    for _ in range(times):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        function()
        end.record()
        marks.append((begin, end))
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in marks)[times // 2] / 1000


def liger(toy: bool) -> dict[str, Any]:
    """Whether Liger's kernels compile and agree with PyTorch: a loss and its gradients, relative differences."""
    import torch

    if not torch.cuda.is_available():
        return {"skipped": "no GPU"}
    import torch.nn.functional as F
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    torch.manual_seed(0)
    hidden, weight = torch.randn(1024, 2048, device="cuda"), torch.randn(100_000, 2048, device="cuda") * 0.02
    target = torch.randint(100_000, (1024,), device="cuda")
    exact = grads(lambda h, w: F.cross_entropy(h @ w.t(), target), hidden, weight)
    found = {}
    for name, more in {
        "bf16 sum": {},
        "float32 sum": {"accum_dtype": torch.float32},
        "float32 sum, chunks x8": {"accum_dtype": torch.float32, "chunk_mem_const": 8},
    }.items():
        half = grads(lambda h, w, more=more: liger_fused_linear_cross_entropy(h, w, target, **more), hidden.bfloat16(), weight.bfloat16())
        found[name] = [float(f"{((a.float() - b).norm() / b.norm()).item():.3e}") for a, b in zip(half, exact, strict=True)]
    return {"relative error of loss, hidden's and weight's gradient": found}


def grads(function: Any, hidden: Any, weight: Any) -> list[Any]:
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = function(h, w)
    loss = loss[0] if isinstance(loss, tuple) else getattr(loss, "loss", loss)
    loss.backward()
    return [loss.detach()[None], h.grad, w.grad]
