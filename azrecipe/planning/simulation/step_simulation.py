"""Running a training step on tensors that have shapes and no values.

The model class, its adapter, frozen parameters, FSDP 2, autocast, clipping and the optimizer are the real ones. Their tensors need no
memory and no GPU, for any number of processes. `kernel_stubs` replaces what cannot run so.
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

from azrecipe.planning.simulation import bitsandbytes_stubs, gradient_accumulation, kernel_stubs
from azrecipe.planning.simulation.memory_tracker import MemoryTracker
from azrecipe.planning.simulation.meta_model import build_meta_model
from azrecipe.planning.simulation.recorded_step import RecordedStep, StepPosition, compute_step_cost
from azrecipe.planning.simulation.step_cost import HeadShape, ParameterCounts, StepCost
from azrecipe.planning.simulation.step_spec import BatchShape, StepSpec
from azrecipe.recipe.extras import BITSANDBYTES_OPTIMIZERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

UNMASKED_ATTENTION = "azrecipe_unmasked"
SIMULATED_LAYERS = 4  # decoder layers: the first, the last, and two between them that show what one more layer adds
# A prime that divides no size of a model: a size that it divides is a multiple of the batch. Fake tensors need no memory
SIMULATED_BATCH = 1_000_003


def import_libraries(with_adapters: bool) -> None:
    """Import what a step needs.

    PEFT takes a second, and only adapters need it.
    """
    for name in ("accelerate.utils.fsdp_utils", "transformers.models.llama.modeling_llama", "torch.distributed.fsdp"):
        importlib.import_module(name)
    if with_adapters:
        importlib.import_module("peft")


def measure_step(spec: StepSpec, length: int) -> StepCost:
    """Measure a step's cost at any batch by simulating it.

    The step runs at a batch that divides no other size. Where all decoder layers are alike, it runs with four.
    Raises CommandError for patterns that match no parameter and for a configuration that cannot be built.
    """
    with _silence_libraries():
        model = build_meta_model(spec)
    layers = find_decoder_layers(model)
    num_layers = SIMULATED_LAYERS if len(layers) > SIMULATED_LAYERS and _are_alike(layers, spec) else len(layers)
    trainable_bytes = _count_bytes(model, trainable_only=True)
    recorded = simulate_step(spec, BatchShape(SIMULATED_BATCH, length), num_layers, trainable_bytes)
    return compute_step_cost(recorded, len(layers), _count_parameters(model), spec.shards)


def _count_parameters(model: Any) -> ParameterCounts:
    parameters = list(model.parameters())
    numbers = {id(p): p.numel() for p in parameters} | {
        id(m.weight): m.in_features * m.out_features for m in model.modules() if isinstance(m, nn.Linear)
    }  # a quantized matrix has fewer elements than numbers
    tables = {id(p): p.numel() for module in (model.get_input_embeddings(), model.get_output_embeddings()) for p in module.parameters()}
    return ParameterCounts(
        total=sum(numbers.values()),
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        embeddings=sum(tables.values()),
        bytes=_count_bytes(model),
        trainable_bytes=_count_bytes(model, trainable_only=True),
    )


def _count_bytes(module: nn.Module, trainable_only: bool = False) -> int:
    """Count the bytes of a module's parameters on this process."""
    return sum(_count_local_bytes(p) for p in module.parameters() if p.requires_grad or not trainable_only)


def _are_alike(layers: nn.ModuleList, spec: StepSpec) -> bool:
    """Return whether layers have the same parameters, training, attention and checkpointing."""
    layer_types = spec.config.get("layer_types") or []
    signatures = {tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()) for layer in layers}
    return len(signatures) == 1 and len(set(layer_types)) < 2 and spec.every_n_layers == 1


def simulate_step(spec: StepSpec, shape: BatchShape, num_layers: int, trainable_bytes: int) -> RecordedStep:
    """Simulate one step with some of the decoder layers.

    Args:
        spec: The step.
        shape: Its batch.
        num_layers: Decoder layers that are run.
        trainable_bytes: Bytes that train in the whole model.
    """
    with _open_mesh(spec.shards) as mesh:
        return _record_step(spec, shape, num_layers=num_layers, trainable_bytes=trainable_bytes, mesh=mesh)


def _record_step(spec: StepSpec, shape: BatchShape, *, num_layers: int, trainable_bytes: int, mesh: Any) -> RecordedStep:
    config = {**spec.config, "num_hidden_layers": num_layers}
    if isinstance(config.get("layer_types"), list):
        config["layer_types"] = config["layer_types"][:num_layers]
    spec = spec.with_config(config)
    gc.collect()  # else an earlier step's cycles could be freed inside this one
    tracker = MemoryTracker(512 if spec.cuda else 1, SIMULATED_BATCH if shape.batch == SIMULATED_BATCH else 0)
    tracker.logit_sizes, tracker.num_blocks = (int(config["vocab_size"]),), num_layers
    with _silence_libraries():
        model = build_meta_model(spec)
    trainable_ratio = trainable_bytes / max(_count_bytes(model, trainable_only=True), 1)
    with FakeTensorMode(allow_non_fake_inputs=True), _silence_libraries():
        _make_fake(model)
        base = model.get_base_model() if spec.lora is not None else model
        _replace_kernels(base, spec, tracker)
        if spec.activation_checkpointing:
            model.train()
            base.activation_checkpointing_enable(every_n_layers=spec.every_n_layers)
            if spec.lora is not None:
                model.enable_input_require_grads()
        if spec.uses_fsdp:
            _apply_fsdp(model, base, spec, mesh)
        _apply_autocast(model, spec)
        optimizer = _build_optimizer(model, spec)
        layer_bytes = _run_step(model, optimizer, spec, shape, tracker)
    vocab_size, width = base.get_output_embeddings().weight.shape
    return RecordedStep(
        batch=shape.batch,
        length=shape.length,
        layers=num_layers,
        events=tracker.events,
        layer_bytes=layer_bytes,
        trainable_ratio=trainable_ratio,
        grad_dtype_ratio=gradient_accumulation.get_grad_dtype_ratio(spec),
        head=HeadShape(_get_head_kind(spec), int(vocab_size), int(width)),
    )


def _get_head_kind(spec: StepSpec) -> str:
    return "accurate" if spec.head == "torch" and not spec.cuda and spec.precision != "float32" else spec.head


def _make_fake(model: nn.Module) -> None:
    """Replace parameters and buffers by fake tensors; shared ones stay shared."""
    fakes: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                    fakes[id(parameter)] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
                module._parameters[name] = fakes[id(parameter)]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fakes.setdefault(id(buffer), torch.empty(buffer.shape, dtype=buffer.dtype))


def _replace_kernels(model: PreTrainedModel, spec: StepSpec, tracker: MemoryTracker) -> None:
    """Replace fused kernels and unmasked attention for fake tensors."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend_without_mask(*arguments: Any, softcap: float | None = None, **options: Any) -> Any:
        """Gemma 2 caps its scores inside the kernel, which changes no shape."""
        return sdpa_attention_forward(*arguments, **options)

    if spec.attn_implementation != "eager" and not spec.masked:
        # transformers builds a mask wherever it cannot see values, but none for an attention that it has no mask function for
        AttentionInterface.register(UNMASKED_ATTENTION, attend_without_mask)
        model.set_attn_implementation(UNMASKED_ATTENTION)
    kernel_stubs.fuse_layers(model, spec.kernels)
    if spec.head != "logits":
        kernel_stubs.fuse_head(model, kernel_stubs.LossHead(_get_head_kind(spec), tracker, spec.cuda))


def _apply_fsdp(model: Any, base: Any, spec: StepSpec, mesh: Any) -> None:
    """Apply FSDP 2 as Accelerate does (accelerate 1.15, utils/fsdp_utils.py, fsdp2_prepare_model)."""
    from accelerate.utils.fsdp_utils import _find_final_norm
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if spec.precision == "bf16_mixed":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {"mesh": mesh, "mp_policy": policy}
    for layer in find_decoder_layers(base):
        fully_shard(layer, **options, reshard_after_forward=spec.reshard_after_forward)
    embeddings, head = base.get_input_embeddings(), base.get_output_embeddings()
    tied = embeddings.weight is head.weight
    if not tied:
        fully_shard(embeddings, **options, reshard_after_forward=spec.reshard_after_forward)
    tail = [module for module in (_find_final_norm(model), *([embeddings] if tied else []), head) if module is not None]
    fully_shard(tail, **options, reshard_after_forward=False)
    fully_shard(model, **options)


def find_decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return a model's decoder layers: its longest list of modules."""
    return max((module for module in model.modules() if isinstance(module, nn.ModuleList)), key=len)


def _apply_autocast(model: Any, spec: StepSpec) -> None:
    """Apply bf16_mixed as Accelerate does (accelerator.py, prepare_model).

    That is autocast, with outputs in float32. DeepSpeed's autocast is alike.
    """
    if spec.precision != "bf16_mixed":
        return
    from accelerate.utils import convert_outputs_to_fp32

    forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    model.forward = convert_outputs_to_fp32(forward)


def _build_optimizer(model: nn.Module, spec: StepSpec) -> torch.optim.Optimizer:
    parameters = [p for p in model.parameters() if p.requires_grad]
    if spec.optim == "adafactor":
        from transformers.optimization import Adafactor

        adafactor: torch.optim.Optimizer = Adafactor(parameters, lr=1e-4, scale_parameter=False, relative_step=False)
        return adafactor
    if spec.optim == "adamw_torch":  # on a GPU it works on all tensors at once, on a CPU on one after the other
        return torch.optim.AdamW(parameters, lr=1e-4, foreach=spec.cuda, fused=False)
    if spec.optim in BITSANDBYTES_OPTIMIZERS:
        return bitsandbytes_stubs.BitsandbytesOptimizer(
            model, 1 if spec.optim.startswith("lion") else 2, 8 if spec.optim.endswith("8bit") else 32
        )
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def _run_step(model: Any, optimizer: torch.optim.Optimizer, spec: StepSpec, shape: BatchShape, tracker: MemoryTracker) -> dict[str, int]:
    """Run a step; return a decoder layer's bytes at rest."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    _create_optimizer_state(optimizer, parameters, spec)
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)]
    inputs = _build_inputs(spec, shape)
    for kind, tensors in {
        "weights": model.parameters(), "buffers": [*model.buffers(), *inputs.values()], "optimizer": state,
    }.items():  # fmt: skip
        tracker.label(kind, tensors)
    del state
    copies = 2 if spec.reference else 1
    if spec.reference:
        tracker.base["weights"] += _count_bytes(model)
    layer = find_decoder_layers(model)[-1]
    layer_state = [value for p in layer.parameters() for value in optimizer.state.get(p, {}).values() if isinstance(value, torch.Tensor)]
    layer_bytes = {"weights": copies * tracker.count_bytes(layer.parameters()), "optimizer": tracker.count_bytes(layer_state)}

    gradients, handles = gradient_accumulation.track_gradients(model, spec, tracker), _track_position(model, tracker)
    model.train()
    with tracker.record():
        loss = model(**inputs)["loss"] if spec.head == "logits" else model(**inputs).loss
        gradients.on_forward_end()
        tracker.phase, tracker.position = "temporary", StepPosition("backward", len(find_decoder_layers(model)))
        loss.backward()
        del loss
        tracker.label("gradients", [parameter.grad for parameter in parameters])
        tracker.phase, tracker.position = "optimizer_temporary", StepPosition("step")
        _clip_gradients(parameters, spec)
        optimizer.step()
    gradients.remove_hooks()
    for handle in handles:
        handle.remove()
    return layer_bytes


def _count_local_bytes(tensor: torch.Tensor) -> int:
    local = getattr(tensor, "_local_tensor", tensor)
    return local.numel() * local.element_size()


def _clip_gradients(parameters: list[nn.Parameter], spec: StepSpec) -> None:
    if spec.max_grad_norm:
        torch.nn.utils.clip_grad_norm_(parameters, spec.max_grad_norm, foreach=spec.cuda or None)


def _create_optimizer_state(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], spec: StepSpec) -> None:
    """Run a first step on zero gradients.

    Then the optimizer has its state, and DTensor has cached the sharding of each operator.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    _clip_gradients(parameters, spec)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _build_inputs(spec: StepSpec, shape: BatchShape) -> dict[str, torch.Tensor]:
    ids = torch.zeros(shape.batch, shape.length, dtype=torch.long)
    inputs = {"input_ids": ids, "labels": torch.zeros_like(ids), "position_ids": torch.zeros_like(ids)}
    if spec.head != "trl":
        inputs["num_items_in_batch"] = torch.zeros((), dtype=torch.long)
    return inputs


def _track_position(model: nn.Module, tracker: MemoryTracker) -> list[Any]:
    """Keep the tracker's position up to date with hooks.

    A layer's backward pass begins when the gradient of its output is there.
    """
    handles = []

    def on_enter(number: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if tracker.phase == "activations":
                tracker.position = StepPosition("forward", number)

        return hook

    def on_exit(number: int, last: bool) -> Callable[..., None]:
        def begin(_gradient: torch.Tensor) -> None:
            tracker.position = StepPosition("backward", number)

        def hook(_module: Any, _inputs: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if tracker.phase != "activations":
                return
            if hidden.requires_grad:
                hidden.register_hook(begin)
            if last:
                tracker.position = StepPosition("head")

        return hook

    layers = find_decoder_layers(model)
    for number, layer in enumerate(layers):
        handles += [
            layer.register_forward_pre_hook(on_enter(number)),
            layer.register_forward_hook(on_exit(number, number + 1 == len(layers))),
        ]
    return handles


@contextlib.contextmanager
def _open_mesh(shards: int) -> Iterator[Any]:
    """Open a mesh over PyTorch's fake process group, destroyed afterwards."""
    if shards == 1:
        yield None
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    kernel_stubs.register_collectives()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=shards)
    try:
        yield init_device_mesh("cpu", (shards,))
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _silence_libraries() -> Iterator[None]:
    """Silence the warnings of libraries."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.disable(previous)
