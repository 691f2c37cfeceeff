"""Knows how to run the training step that a recipe asks for where tensors have shapes and no values.

The model class, its adapter, what is frozen, FSDP 2, autocast, clipping and the optimizer are the real ones; no memory is taken for
their tensors and no GPU is needed, for any number of processes. What cannot run so is stood in for (`kernel_stubs`).
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from azrecipe.modeling import lora as adapters
from azrecipe.modeling import parameter_groups
from azrecipe.modeling.dtypes import STORED
from azrecipe.planning.simulation import gradient_accumulation, kernel_stubs
from azrecipe.planning.simulation.memory_tracker import Tracker
from azrecipe.planning.simulation.step_cost import Cost, Parameters, Recorded, cost
from azrecipe.planning.simulation.step_spec import Asked, Shape
from azrecipe.recipe.extras import BITSANDBYTES

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNMASKED = "azrecipe_unmasked"
FEW = 4  # decoder layers: a first, a last, and two in between to see what one more adds
BATCH = (
    1_000_003  # a prime that no size of a model has in it: a size that it divides is a multiple of the batch; fake tensors cost no memory
)


def skeleton(asked: Asked) -> Any:
    """The model of a step on PyTorch's meta device: its adapter put on, what does not train frozen."""
    from transformers import AutoConfig, AutoModelForCausalLM

    given = dict(asked.config)
    config = AutoConfig.for_model(given.pop("model_type"), **given)
    attention = "eager" if asked.attn_implementation == "eager" else "sdpa"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=_stored(asked), attn_implementation=attention)
    model.config.use_cache = False
    if asked.lora is None:
        parameter_groups.freeze(model, list(asked.trainable), range(asked.new_rows))
        return model
    from peft import get_peft_model

    config = adapters.lora_config(asked.lora, model, range(asked.new_rows) if asked.lora.train_new_tokens else ())
    if asked.quantized:
        kernel_stubs.quantize(model)
    with torch.device("meta"):
        return get_peft_model(model, config)


def _stored(asked: Asked) -> torch.dtype:
    """What weights are in; beside those in 4 bits the others are in what is computed in (lora.Base.load_quantized)."""
    return torch.bfloat16 if asked.quantized and asked.precision != "float32" else STORED[asked.precision]


def prepare(adapters: bool) -> None:
    """Load what a step needs, ahead of the first; PEFT takes a second to load, and only `adapters` need it."""
    for name in ("accelerate.utils.fsdp_utils", "transformers.models.llama.modeling_llama", "torch.distributed.fsdp"):
        importlib.import_module(name)
    if adapters:
        importlib.import_module("peft")


def measure(asked: Asked, length: int) -> Cost:
    """What the step takes at any batch, by running it at one that can be told from every other size; where all layers are alike, with four.

    Raises CommandError for what the model has not (patterns that match nothing, a configuration that cannot be built).
    """
    with _quiet():
        model = skeleton(asked)
    layers = decoder_layers(model)
    few = FEW if len(layers) > FEW and _alike(layers, asked) else len(layers)
    trained = _bytes(model, trained=True)
    return cost(run(asked, Shape(BATCH, length), few, trained), len(layers), _parameters(model), asked.shards)


def _parameters(model: Any) -> Parameters:
    every = list(model.parameters())
    numbers = {id(p): p.numel() for p in every} | {
        id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear)
    }
    tables = {id(p): p.numel() for module in (model.get_input_embeddings(), model.get_output_embeddings()) for p in module.parameters()}
    return Parameters(
        sum(numbers.values()), sum(p.numel() for p in every if p.requires_grad), sum(tables.values()),
        _bytes(model), _bytes(model, trained=True),
    )  # fmt: skip


def _bytes(module: nn.Module, trained: bool = False) -> int:
    """Bytes of a module's parameters, of those that train where asked; of sharded ones this process' part."""
    return sum(_local(p) for p in module.parameters() if p.requires_grad or not trained)


def _alike(layers: nn.ModuleList, asked: Asked) -> bool:
    """Whether each layer has the same parameters, trains the same and sees the same."""
    kinds = asked.config.get("layer_types") or []
    seen = {tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()) for layer in layers}
    return len(seen) == 1 and len(set(kinds)) < 2


def run(asked: Asked, shape: Shape, few: int, trained: int) -> Recorded:
    """One step with `few` decoder layers, recorded. `trained`: bytes that train in the whole model."""
    with _mesh(asked.shards) as mesh:
        return _recorded(asked, shape, (few, trained), mesh)


def _recorded(asked: Asked, shape: Shape, sizes: tuple[int, int], mesh: Any) -> Recorded:
    few, trained = sizes
    config = {**asked.config, "num_hidden_layers": few}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:few]
    asked = asked.with_config(config)
    gc.collect()  # an earlier step's cycles must not end inside this one
    tracker = Tracker(512 if asked.cuda else 1, BATCH if shape.batch == BATCH else 0)
    tracker.logits = (int(config["vocab_size"]),)
    with _quiet():
        model = skeleton(asked)
    grows = trained / max(_bytes(model, trained=True), 1)
    with FakeTensorMode(allow_non_fake_inputs=True), _quiet():
        _materialise(model)
        base = model.get_base_model() if asked.lora is not None else model
        _prepare(base, asked, tracker)
        if asked.activation_checkpointing:
            model.train()
            base.activation_checkpointing_enable()
            if asked.lora is not None:
                model.enable_input_require_grads()
        if asked.fsdp:
            _shard(model, base, asked, mesh)
        _autocast(model, asked)
        optimizer = _optimizer(model, asked)
        of_layer = _step(model, optimizer, (asked, shape), tracker)
    output = base.get_output_embeddings().weight
    wide = (_head(asked), int(output.shape[0]), int(output.shape[1]))
    return Recorded(shape.batch, shape.length, few, tracker.events, of_layer, grows, gradient_accumulation.added(asked), wide)


def _head(asked: Asked) -> str:
    return "accurate" if asked.head == "torch" and not asked.cuda and asked.precision != "float32" else asked.head


def _materialise(model: nn.Module) -> None:
    """Give every parameter and buffer a fake tensor on the CPU; a shared one stays shared."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    made[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = made.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


def _prepare(model: PreTrainedModel, asked: Asked, tracker: Tracker) -> None:
    """Attention without a mask where there is none, and stand-ins for fused kernels."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if asked.attn_implementation != "eager" and not asked.masked:
        # transformers makes a mask wherever it cannot look at values; it makes none for an attention that it knows no mask for
        AttentionInterface.register(UNMASKED, sdpa_attention_forward)
        model.set_attn_implementation(UNMASKED)
    kernel_stubs.fuse_layers(model, asked.kernels)
    if asked.head != "logits":
        kernel_stubs.fuse_head(model, kernel_stubs.Head(_head(asked), tracker, asked.cuda))


def _shard(model: Any, base: Any, asked: Asked, mesh: Any) -> None:
    """FSDP 2 as Accelerate puts it on (accelerate 1.15, utils/fsdp_utils.py, fsdp2_prepare_model)."""
    from accelerate.utils.fsdp_utils import _find_final_norm
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if asked.precision == "bf16_mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for layer in decoder_layers(base):
        fully_shard(layer, **options, reshard_after_forward=asked.reshard_after_forward)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = embeddings.weight is head.weight
    if not tied:
        fully_shard(embeddings, **options, reshard_after_forward=asked.reshard_after_forward)
    tail = [module for module in (_find_final_norm(model), *([embeddings] if tied else []), head) if module is not None]
    fully_shard(tail, **options, reshard_after_forward=False)
    fully_shard(model, **options)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The longest list of modules in a model."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def _autocast(model: Any, asked: Asked) -> None:
    """bf16_mixed as Accelerate does it (accelerator.py, prepare_model): autocast, and what comes out in float32; DeepSpeed's autocast alike."""
    if asked.precision != "bf16_mixed":
        return
    from accelerate.utils import convert_outputs_to_fp32

    forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.forward = convert_outputs_to_fp32(forward)


def _optimizer(model: nn.Module, asked: Asked) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if asked.optim == "adafactor":
        from transformers.optimization import Adafactor

        adafactor: torch.optim.Optimizer = Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)
        return adafactor
    if asked.optim == "adamw_torch":  # on a GPU it works on all tensors at once, on a CPU on one after the other
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=asked.cuda, fused=False)
    if asked.optim in BITSANDBYTES:
        return kernel_stubs.Bitsandbytes(model, 1 if asked.optim.startswith("lion") else 2, 8 if asked.optim.endswith("8bit") else 32)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def _step(model: Any, optimizer: torch.optim.Optimizer, what: tuple[Asked, Shape], tracker: Tracker) -> dict[str, int]:
    """Run it; returns the bytes at rest that a decoder layer has, by kind."""
    asked, shape = what
    parameters = [p for p in model.parameters() if p.requires_grad]
    _make_state(optimizer, parameters, asked)
    state = [value for held in optimizer.state.values() for value in held.values() if isinstance(value, torch.Tensor)]
    inputs = _inputs(asked, shape)
    for kind, tensors in {
        "weights": model.parameters(), "buffers": [*model.buffers(), *inputs.values()], "optimizer": state,
    }.items():  # fmt: skip
        tracker.label(kind, tensors)
    del state
    copies = 2 if asked.reference else 1
    if asked.reference:
        tracker.base["weights"] += _bytes(model)
    layer = decoder_layers(model)[-1]
    states = [value for p in layer.parameters() for value in optimizer.state.get(p, {}).values() if isinstance(value, torch.Tensor)]
    of_layer = {"weights": copies * tracker.size(layer.parameters()), "optimizer": tracker.size(states)}

    gradients, handles = gradient_accumulation.follow(model, asked, tracker), _places(model, tracker)
    model.train()
    with tracker.watching():
        loss = model(**inputs)["loss"] if asked.head == "logits" else model(**inputs).loss
        gradients.forwarded()
        tracker.phase, tracker.place = "temporary", ("backward", len(decoder_layers(model)))
        loss.backward()
        del loss
        tracker.label("gradients", [parameter.grad for parameter in parameters])
        tracker.phase, tracker.place = "temporary", ("step", 0)
        _clip(parameters, asked)
        optimizer.step()
    gradients.end()
    for handle in handles:
        handle.remove()
    return of_layer


def _local(tensor: torch.Tensor) -> int:
    own = getattr(tensor, "_local_tensor", tensor)
    return own.numel() * own.element_size()


def _clip(parameters: list[nn.Parameter], asked: Asked) -> None:
    if asked.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(parameters, asked.max_grad_norm, foreach=asked.cuda or None)


def _make_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], asked: Asked) -> None:
    """A first step on gradients of zero, so that the optimizer has what it keeps and DTensor knows each operator's sharding."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    _clip(parameters, asked)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _inputs(asked: Asked, shape: Shape) -> dict[str, torch.Tensor]:
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": torch.zeros_like(ids), "position_ids": torch.zeros_like(ids)}
    if asked.head != "trl":
        inputs["num_items_in_batch"] = torch.zeros((), dtype=torch.long)
    return inputs


def _places(model: nn.Module, tracker: Tracker) -> list[Any]:
    """Tell the tracker in which decoder layer the step is; a layer's backward begins where the gradient of its output is known."""
    handles = []

    def entered(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if tracker.phase == "activations":
                tracker.place = ("forward", number)

        return hook

    def left(number: int, last: bool) -> Callable[..., None]:
        def begin(_gradient: torch.Tensor) -> None:
            tracker.place = ("backward", number)

        def hook(_module: Any, _given: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if tracker.phase != "activations":
                return
            if hidden.requires_grad:
                hidden.register_hook(begin)
            if last:
                tracker.place = ("head", 0)

        return hook

    layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        handles += [layer.register_forward_pre_hook(entered(number)), layer.register_forward_hook(left(number, number + 1 == len(layers)))]
    return handles


@contextlib.contextmanager
def _mesh(shards: int) -> Iterator[Any]:
    """A process group of any size that sends nothing (PyTorch's own, for tests), and a mesh over it; gone afterwards, as others ask whether there is one."""
    if shards == 1:
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards)
    try:
        yield init_device_mesh("cpu", (shards,))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries tell each other of their futures."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(before)
