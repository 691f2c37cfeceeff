"""Set up Accelerate's processes on a machine without an accelerator.

Accelerate drops FSDP and DeepSpeed there silently, and every process trains a replica. The patches below prevent that.
"""

from __future__ import annotations

import os
from typing import Any

from azrecipe.errors import CannotRun
from azrecipe.utils.process_pool import count_cores


def find_problem(kind: str) -> str:
    """Return why this CPU cannot run a sharded strategy, or ""."""
    import torch
    import torch.distributed as dist

    if torch.accelerator.is_available():
        return (
            f"{kind} on the CPU of a machine with an accelerator would not be what it says: "
            "unset ACCELERATE_USE_CPU, or hide the GPUs (CUDA_VISIBLE_DEVICES=)"
        )
    if not (dist.is_available() and dist.is_gloo_available()):
        return f"{kind} on a CPU needs a PyTorch with gloo. What runs here: one process"
    return ""


def set_up_cpu(kind: str, sharded: bool, context: bool) -> None:
    """Prepare this process for a strategy on the CPU.

    Call it before transformers is imported. It changes environment variables. `context` says that sequences are split over
    processes. Raises CannotRun where this machine cannot shard a model.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # Accelerate imports an installed DeepSpeed, which looks for an accelerator otherwise
    if not sharded:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # Accelerate then uses gloo
    else:
        reason = find_problem(kind)
        if reason:
            raise CannotRun(reason)
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it Accelerate uses neither FSDP nor DeepSpeed
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # PartialState.set_device does not change it
        _patch_accelerate_gloo()
        if kind.startswith("zero"):
            _patch_deepspeed_compilation()
        if context:
            _patch_ring_attention()
    set_num_threads()


def _patch_accelerate_gloo() -> None:
    """Make PartialState start gloo and count as distributed.

    AcceleratorState then chooses FSDP or DeepSpeed. Accelerate chooses the type by the hardware, and without an accelerator
    the type is NO (accelerate 1.15.0, state.py, PartialState._prepare_backend: no branch for LOCAL_RANK without one).
    `backend="gloo"` alone connects the processes and leaves the type at NO, with which AcceleratorState drops FSDP.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def prepare(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> tuple[str, Any]:
        if cpu or sagemaker_dp:
            raise CannotRun("use_cpu: true (in trainer_arguments) would drop FSDP and DeepSpeed: leave it out")
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare


def _patch_deepspeed_compilation() -> None:
    """Prevent DeepSpeed from compiling its shared-memory collectives.

    The compilation takes minutes at the first start, and only inference uses the result. deepspeed 0.19.8, comm/torch.py,
    build_shm_op reads the table of compatible operators; there is no setting.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _patch_ring_attention() -> None:
    """Add the CPU's attention operators to PyTorch's context parallelism.

    Its table of operators names those of CUDA only (torch 2.13.0, distributed/tensor/experimental/_context_parallel/
    _attention.py, custom_ops). PyTorch's ring attention works with any of them.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental._context_parallel import _attention

    ring: Any = _attention

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def attend(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[DTensor, ...]:
        arguments = dict(zip((argument.name for argument in operator._schema.arguments), args, strict=False)) | kwargs
        mesh, placements = arguments["query"].device_mesh, arguments["query"].placements
        if arguments.pop("attn_mask", None) is not None:
            raise CannotRun("attention over sequences that are split over processes takes no mask")
        local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in arguments.items()}
        group, sequence_dim = mesh.get_group(), 2  # of [batch, heads, tokens, head_dim]
        if operator is forward:
            outputs = ring._templated_ring_attention(group, sequence_dim, operator, **{"is_causal": False, **local})
        else:
            outputs = ring._templated_ring_attention_backward(group, sequence_dim, operator, grad_out_name="grad_out", **local)
        return tuple(DTensor.from_local(output, mesh, placements, run_check=False) for output in outputs)

    ring.custom_ops |= {forward: attend, backward: attend}


def set_num_threads() -> None:
    """Use this process' share of the machine's cores.

    accelerate launch sets OMP_NUM_THREADS=1, which leaves the other cores idle.
    """
    import torch

    torch.set_num_threads(max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
