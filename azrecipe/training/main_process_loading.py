"""Load a model in one process, where FSDP shards it when training begins.

The main process reads the weights. The others build the same model with memory that nothing writes, which takes no room, and receive
their shards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from azrecipe.distributed.backend import Backend
from azrecipe.errors import PEER_ENDED, AzrecipeError, RunFailed
from azrecipe.modeling.compilation import find_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel, Trainer

Value = TypeVar("Value")


class ModelStructure(NamedTuple):
    """A model without its weights, as the main process describes it."""

    config: Any
    attention: str
    parameters: dict[str, tuple[torch.Size, torch.dtype]]
    buffers: dict[str, torch.Tensor]


def has_main_process_loading(backend: Backend, model: PreTrainedModel | None = None) -> bool:
    """Tell whether the main process alone loads the weights.

    Accelerate does not send buffers that a checkpoint has, so a model with such buffers is loaded by every process.
    """
    if not (backend.uses_fsdp and backend.world_size > 1):
        return False
    return model is None or model.state_dict(keep_vars=True).keys() == dict(model.named_parameters(remove_duplicate=False)).keys()


def load_on_main(load: Callable[[], PreTrainedModel], backend: Backend) -> PreTrainedModel:
    """Load a model, under FSDP in one process. A collective.

    Raises:
        AzrecipeError: As `load` does, on every process.
    """
    if not has_main_process_loading(backend):
        return load()
    model = _run_on_main(load, backend.main)
    if not _share_from_main(backend.main and has_main_process_loading(backend, model)):
        return load() if model is None else model
    return _build_replica(model)


def change_on_main(change: Callable[[PreTrainedModel], Value], model: PreTrainedModel, backend: Backend) -> tuple[PreTrainedModel, Value]:
    """Change a model where its weights are. A collective.

    Returns:
        The model, and what `change` returns.

    Raises:
        AzrecipeError: As `change` does, on every process.
    """
    if not has_main_process_loading(backend, model):
        return model, change(model)
    outcome: Any = _share_from_main(_run_on_main(lambda: change(model), backend.main))
    return _build_replica(model if backend.main else None), outcome


def shard_copy(model: PreTrainedModel, backend: Backend) -> PreTrainedModel:
    """Build a sharded copy of a model, to measure it. A collective.

    A forward pass gathers the weights of one block at a time. The model itself stays in the main process' main memory.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = PartialState().device
    mesh = init_device_mesh(device.type, (backend.world_size,))
    structure = _share_from_main(_describe_model(model) if backend.main else None)
    assert structure is not None
    copy = _build_meta_model(structure).requires_grad_(False)
    for block in find_blocks(copy):
        fully_shard(block, mesh=mesh)
    fully_shard(copy, mesh=mesh)
    copy.to_empty(device=device)
    copy.tie_weights()
    _set_buffers(copy, structure.buffers, device)
    state = model.state_dict() if backend.main else {}
    set_model_state_dict(copy, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    return copy


def send_weights_when_sharded(trainer: Trainer, backend: Backend) -> None:
    """Let Accelerate send the main process' weights to the others' shards."""
    if has_main_process_loading(backend, trainer.model):
        trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = True


def _share_from_main(value: Value) -> Value:
    """Return the main process' value on every process. A collective."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _run_on_main(action: Callable[[], Value], main: bool) -> Value | None:
    """Run an action in the main process; None elsewhere.

    A failure is raised on every process, so that none waits for another.
    """
    value, failure = None, None
    try:
        value = action() if main else None
    except Exception as error:
        failure = error
    shared = failure if failure is None or isinstance(failure, AzrecipeError) else RunFailed(f"{PEER_ENDED}; its own message says why")
    shared = _share_from_main(shared)
    if failure is not None:
        raise failure
    if shared is not None:
        raise shared
    return value


def _describe_model(model: PreTrainedModel) -> ModelStructure:
    parameters = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
    buffers = {name: buffer.cpu() for name, buffer in model.named_buffers()}
    return ModelStructure(model.config, str(model.config._attn_implementation), parameters, buffers)


def _build_replica(model: PreTrainedModel | None) -> PreTrainedModel:
    """Return the main process' model there, and one without weights elsewhere. A collective."""
    structure = _share_from_main(None if model is None else _describe_model(model))
    if model is not None:
        return model
    assert structure is not None
    replica = _build_meta_model(structure).to_empty(device="cpu")
    replica.tie_weights()
    _set_buffers(replica, structure.buffers, torch.device("cpu"))
    return replica


def _build_meta_model(structure: ModelStructure) -> PreTrainedModel:
    """Build a model without weights.

    Raises RunFailed where its parameters are not those that the main process loaded.
    """
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            structure.config, attn_implementation=structure.attention, trust_remote_code=False
        )
    for name, parameter in model.named_parameters():
        if name in structure.parameters:
            parameter.data = parameter.data.to(structure.parameters[name][1])
    built = {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}
    if built != structure.parameters:
        names = sorted(name for name in {*built, *structure.parameters} if built.get(name) != structure.parameters.get(name))
        raise RunFailed(
            f"the model that its configuration describes has other parameters than the one that was loaded: {', '.join(names[:5])}"
        )
    return model


def _set_buffers(model: PreTrainedModel, buffers: dict[str, torch.Tensor], device: torch.device) -> None:
    for name, values in buffers.items():
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._buffers[key] = values.to(device)
