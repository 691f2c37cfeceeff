"""The proof that the live objects are the backend that was asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from azrecipe.distributed.backend import Backend
from azrecipe.errors import RunFailed
from azrecipe.modeling import liger_kernels

if TYPE_CHECKING:
    from transformers import Trainer


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
    kernels = liger_kernels.patched(model) if trainer.args.use_liger_kernel else []
    if trainer.args.use_liger_kernel and (lacking := liger_kernels.missing(model, trainer.args.liger_kernel_config)):
        problems.append(f"Liger's {', '.join(lacking)} was asked for and runs nowhere in the model")
    if problems:
        raise RunFailed(f"{backend.kind} was asked for and is not what runs: {'; '.join(problems)}")
    context = f", each sequence over {backend.context}" if backend.context > 1 else ""
    return f"{backend.kind}, {backend.world} process{'es' if backend.world > 1 else ''}{context}, device {trainer.args.device}" + (
        f", Liger: {', '.join(kernels)}" if kernels else ""
    )
