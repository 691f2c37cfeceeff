"""Prove that the live objects match the backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from azrecipe.distributed.backend import Backend
from azrecipe.errors import RunFailed
from azrecipe.modeling import liger_kernels

if TYPE_CHECKING:
    from transformers import Trainer


def verify_backend(backend: Backend, trainer: Trainer) -> str:
    """Check that the live objects match the backend.

    Args:
        backend: What the launcher set.
        trainer: The Trainer after it wrapped the model.

    Returns:
        A line that describes what runs.

    Raises:
        RunFailed: Something else runs.
    """
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    problems = []
    num_processes = dist.get_world_size() if dist.is_initialized() else 1
    if num_processes != backend.world_size or trainer.accelerator.num_processes != backend.world_size:
        problems.append(f"{num_processes} processes are connected, not {backend.world_size}")
    model: Any = trainer.model_wrapped
    if backend.strategy == "ddp" and not isinstance(model, DistributedDataParallel):
        problems.append(f"the model is a {type(model).__name__}, not DistributedDataParallel")
    if backend.uses_fsdp:
        parameters = list(model.parameters())
        context_size = getattr(trainer.accelerator.parallelism_config, "cp_size", 1)
        if context_size != backend.context_parallel_size:
            problems.append(f"sequences are split over {context_size} processes, not {backend.context_parallel_size}")
        if not all(isinstance(p, DTensor) for p in parameters):
            problems.append("its parameters are not sharded")
        else:
            shape = tuple(parameters[0].device_mesh.shape)
            mesh_shape = (
                (backend.replicate_size, backend.world_size // backend.replicate_size)
                if backend.strategy == "hsdp"
                else (backend.world_size,)
            )
            if shape != mesh_shape:
                problems.append(f"the device mesh is {shape}, not {mesh_shape}")
    if backend.uses_deepspeed:
        zero_stage = getattr(model, "zero_optimization_stage", lambda: None)()
        if zero_stage != int(backend.strategy[4:]):
            problems.append(f"DeepSpeed runs ZeRO stage {zero_stage}, not {backend.strategy[4:]}")
    if trainer.args.n_gpu > 1:
        problems.append(f"one process would spread over {trainer.args.n_gpu} GPUs by nn.DataParallel")
    kernels = liger_kernels.list_active_kernels(model) if trainer.args.use_liger_kernel else []
    if trainer.args.use_liger_kernel and (missing_kernels := liger_kernels.list_missing_kernels(model, trainer.args.liger_kernel_config)):
        problems.append(f"Liger's {', '.join(missing_kernels)} should run and runs nowhere in the model")
    if problems:
        raise RunFailed(f"{backend.strategy} should run and does not: {'; '.join(problems)}")
    context = f", each sequence over {backend.context_parallel_size}" if backend.context_parallel_size > 1 else ""
    return (
        f"{backend.strategy}, {backend.world_size} process{'es' if backend.world_size > 1 else ''}{context}, device {trainer.args.device}"
        + (f", Liger: {', '.join(kernels)}" if kernels else "")
    )
