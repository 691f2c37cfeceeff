"""Knows how Accelerate's processes are brought up on a machine without an accelerator, so that what was asked for is what runs.

Left alone, Accelerate drops FSDP and DeepSpeed there without a word: every process trains its own replica.
"""

from __future__ import annotations

import os
from typing import Any

from azrecipe.errors import CannotRun
from azrecipe.utils.process_pool import cores


def problem(kind: str) -> str:
    """Why a sharded backend cannot be real on this machine's CPU, or ""."""
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


def bring_up(kind: str, sharded: bool, context: bool) -> None:
    """Prepare this process, before transformers is imported; `context`: for sequences split over processes.

    Raises CannotRun where sharding cannot be real.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"  # Accelerate imports DeepSpeed wherever it is installed, which else looks for one and warns
    if not sharded:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # Accelerate's own gloo path
    else:
        why = problem(kind)
        if why:
            raise CannotRun(why)
        os.environ.pop("ACCELERATE_USE_CPU", None)  # Accelerate takes it for "neither FSDP nor DeepSpeed"
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"  # which PartialState.set_device leaves alone
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"  # it leaves the other processes' weights unset until they are sharded
        _say_gloo()
        if kind.startswith("zero"):
            _build_nothing()
        if context:
            _split_attention()
    _use_the_cores()


def _say_gloo() -> None:
    """Make PartialState start gloo and call the processes distributed; AcceleratorState turns that into FSDP or DeepSpeed.

    Accelerate chooses by the hardware it finds, and without any says "not distributed" (accelerate 1.15.0, state.py,
    PartialState._prepare_backend: no branch for LOCAL_RANK without an accelerator). `backend="gloo"` alone connects the
    processes and leaves the type at NO, by which AcceleratorState then drops FSDP.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def prepare(self: Any, cpu: bool = False, sagemaker_dp: bool = False, backend: str | None = None) -> tuple[str, Any]:
        if cpu or sagemaker_dp:
            raise CannotRun("use_cpu: true (in trainer_arguments) would drop FSDP and DeepSpeed: leave it out")
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = prepare


def _build_nothing() -> None:
    """Keep DeepSpeed from compiling its shared-memory collectives, for minutes at the first start: inference alone uses them.

    deepspeed 0.19.8, comm/torch.py, build_shm_op: the table of compatible operators is what it asks, and no setting.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _split_attention() -> None:
    """Give PyTorch's context parallelism the CPU's attention operator, forward and backward.

    Its dispatcher asks a table that names CUDA's operators only (torch 2.13.0, distributed/tensor/experimental/_context_parallel/
    _attention.py, custom_ops); the ring that the sequence goes round is PyTorch's own and serves any of them.
    """
    import torch
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor.experimental._context_parallel import _attention

    ring: Any = _attention

    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

    def attend(operator: Any, arguments: tuple[Any, ...], more: dict[str, Any]) -> tuple[DTensor, ...]:
        given = dict(zip((argument.name for argument in operator._schema.arguments), arguments, strict=False)) | more
        mesh, placements = given["query"].device_mesh, given["query"].placements
        if given.pop("attn_mask", None) is not None:
            raise CannotRun("sequences that are split over processes are attended to without a mask only")
        local = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in given.items()}
        group, tokens = mesh.get_group(), 2  # the dimension of [batch, heads, tokens, width]
        if operator is forward:
            found = ring._templated_ring_attention(group, tokens, operator, **{"is_causal": False, **local})
        else:
            found = ring._templated_ring_attention_backward(group, tokens, operator, grad_out_name="grad_out", **local)
        return tuple(DTensor.from_local(each, mesh, placements, run_check=False) for each in found)

    ring.custom_ops |= {forward: attend, backward: attend}


def _use_the_cores() -> None:
    """A process' share of the cores: accelerate launch sets OMP_NUM_THREADS=1, which leaves the others of a laptop idle."""
    import torch

    torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
