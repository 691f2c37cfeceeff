"""What the planner makes of few layers and of stand-ins: the same as with all layers, and as the libraries' own."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from azrecipe.modeling import chunked_loss
from azrecipe.planning.memory_budget import compute_memory_budget
from azrecipe.planning.simulation import gradient_accumulation, kernel_stubs, loss_tiles, step_simulation
from azrecipe.planning.simulation.memory_tracker import MemoryTracker
from azrecipe.planning.simulation.recorded_step import StepPosition
from azrecipe.planning.simulation.step_cost import CardPeaks, StepCost
from azrecipe.planning.simulation.step_spec import BatchShape, StepSpec
from azrecipe.recipe.types import Lora

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 1000, "tie_word_embeddings": True,
}  # fmt: skip
PLAIN = StepSpec(config=LLAMA, precision="bf16_pure", cuda=True)
LIGER = ("rms_norm", "swiglu")
LORA = Lora(8, 16, 0.0, "all-linear", use_rslora=False, use_dora=False, modules_to_save=[], train_new_tokens=False)
PEAKS = CardPeaks(1e15, 1e14, 1e12)


@pytest.fixture(autouse=True)
def _no_group() -> Iterator[None]:
    """No process group stays behind."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def whole(asked: StepSpec, length: int, monkeypatch: pytest.MonkeyPatch) -> StepCost:
    """With all layers run."""
    with monkeypatch.context() as patched:
        patched.setattr(step_simulation, "SIMULATED_LAYERS", 1000)
        return step_simulation.measure_step(asked, length)


@pytest.mark.parametrize(
    "asked",
    [
        PLAIN,
        replace(PLAIN, activation_checkpointing=True, kernels=LIGER, head="liger", optim="adamw_torch"),
        replace(PLAIN, precision="bf16_mixed", shards=8, strategy="fsdp2"),
        replace(PLAIN, shards=8, strategy="fsdp2", activation_checkpointing=True),
        replace(PLAIN, precision="bf16_mixed", activation_checkpointing=True, head="torch"),
    ],
    ids=["plain", "checkpointing and Liger", "FSDP mixed", "FSDP and checkpointing", "autocast and checkpointing"],
)
def test_four_layers_tell_what_six_take(asked: StepSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    few, all_ = step_simulation.measure_step(asked, 128), whole(asked, 128, monkeypatch)
    for batch in (1, 3, 8):
        for after_others in (False, True):
            memory = [sum(cost.get_peak_memory(batch, accumulates=after_others).values()) for cost in (few, all_)]
            assert memory[0] == pytest.approx(memory[1], rel=1.1e-3)
        assert few.count_flops(batch) == pytest.approx(all_.count_flops(batch), rel=1e-12)
        for is_compiled in (False, True):  # a card without arithmetic: what moves
            peaks = CardPeaks(1e30, 1e30, 1.0)
            moved = [sum(cost.compute_seconds(batch, peaks, is_compiled=is_compiled)) for cost in (few, all_)]
            assert moved[0] == pytest.approx(moved[1], rel=5e-3 if is_compiled else 1e-4)  # a cast of a weight is some layer's first


@pytest.mark.parametrize(
    ("asked", "sync"),
    [
        (replace(PLAIN, precision="bf16_mixed"), False),
        (replace(PLAIN, shards=2, strategy="fsdp2", activation_checkpointing=True), False),
        (replace(PLAIN, precision="bf16_mixed", shards=2, strategy="fsdp2"), False),
        (replace(PLAIN, precision="bf16_mixed", shards=2, strategy="fsdp2"), True),
        (replace(PLAIN, precision="bf16_mixed", shards=8, strategy="fsdp2", trainable=("embeddings",)), False),
    ],
    ids=["whole", "FSDP, one type", "FSDP, two types", "FSDP, summed each batch", "FSDP, little trains"],
)
def test_a_batch_tells_what_it_would_take_after_another_one(asked: StepSpec, sync: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = asked.with_config({**asked.config, "num_hidden_layers": 2})
    alone = step_simulation.measure_step(asked, 128)
    real = gradient_accumulation.track_gradients

    def after_another(model: Any, asked: StepSpec, tracker: MemoryTracker) -> Any:
        if asked.uses_fsdp:
            model.set_requires_gradient_sync(sync)
        with tracker.record():
            model(**step_simulation._build_inputs(asked, BatchShape(step_simulation.SIMULATED_BATCH, 128)))["loss"].backward()
        if asked.uses_fsdp:
            model.set_requires_gradient_sync(True)
        tracker.events.clear()
        return real(model, asked, tracker)

    monkeypatch.setattr(gradient_accumulation, "track_gradients", after_another)
    second = step_simulation.measure_step(asked, 128)
    for batch in (1, 3, 8):
        memory = alone.get_peak_memory(batch, accumulates=True, sync_each_batch=sync)
        assert sum(memory.values()) == pytest.approx(sum(second.get_peak_memory(batch).values()), rel=1e-4)
        if not asked.uses_fsdp or (asked.trainable == ("all",) and not sync):
            assert sum(memory.values()) > 1.02 * sum(alone.get_peak_memory(batch).values())
        computed = alone.compute_seconds(batch, PEAKS, accumulates=True, sync_each_batch=sync)
        seconds = [computed[0], second.compute_seconds(batch, PEAKS)[0]]
        assert seconds[0] == pytest.approx(seconds[1], rel=1e-3)


@pytest.mark.parametrize(
    "asked",
    [
        replace(PLAIN, trainable=("layers[2:]",)),
        replace(PLAIN, activation_checkpointing=True, every_n_layers=2),
        replace(PLAIN, config={**LLAMA, "model_type": "qwen3", "layer_types": ["full_attention"] * 3 + ["sliding_attention"] * 3}),
    ],
    ids=["some layers train", "every second layer checkpointed", "layers of two kinds"],
)
def test_a_model_whose_layers_differ_is_run_with_all_of_them(asked: StepSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[int] = []
    real = step_simulation.simulate_step

    def run(asked: StepSpec, shape: Any, few: int, trained: int) -> Any:
        ran.append(few)
        return real(asked, shape, few, trained)

    monkeypatch.setattr(step_simulation, "simulate_step", run)
    step_simulation.measure_step(asked, 16)
    assert ran == [6]


def test_memory_lies_between_none_and_all_layers_checkpointed() -> None:
    """What layers keep; the layer that is recomputed has it for a while in either."""
    checkpointed = replace(PLAIN, activation_checkpointing=True)
    costs = [step_simulation.measure_step(spec, 64) for spec in (PLAIN, replace(checkpointed, every_n_layers=2), checkpointed)]
    none, half, full = (cost.get_peak_memory(64)["activations"] for cost in costs)
    assert full < half < none
    assert half - full == pytest.approx((none - full) / 2, rel=0.02)  # three of six layers
    flops = [cost.count_flops(1) for cost in costs]
    assert flops[1] - flops[0] == pytest.approx((flops[2] - flops[0]) / 2, rel=0.01)


@pytest.mark.parametrize("shards", [2, 4, 32])
def test_eight_processes_tell_what_others_take(shards: int) -> None:
    """The optimizer's temporaries are as large as its part of the weights."""
    wide = {**LLAMA, "hidden_size": 256, "num_hidden_layers": 4, "vocab_size": 200}
    spec = replace(PLAIN, config=wide, precision="bf16_mixed", strategy="fsdp2", shards=8, optim="adamw_torch", cuda=True)
    eight, exact = step_simulation.measure_step(spec, 16), step_simulation.measure_step(replace(spec, shards=shards), 16)
    for batch in (1, 64):
        expected = exact.get_peak_memory(batch)
        assert sum(eight.get_peak_memory(batch, shards).values()) == pytest.approx(sum(expected.values()), rel=0.01)
    assert exact.get_peak_memory(1)["optimizer_temporary"] > 0.1 * sum(exact.get_peak_memory(1).values()) or shards > 2


@pytest.mark.parametrize(("strategy", "kinds"), [("zero1", {"optimizer"}), ("zero2", {"optimizer", "gradients"})])
def test_zero_splits_the_optimizer_s_temporaries_and_its_peak_is_looked_for_again(strategy: str, kinds: set[str]) -> None:
    """Where the optimizer's part is small, the peak is not in its step."""
    spec = replace(PLAIN, config={**LLAMA, "hidden_size": 256}, optim="adamw_torch", strategy=strategy)
    cost = step_simulation.measure_step(spec, 16)
    whole, split = (compute_memory_budget(cost, spec, 4, world_size).parts for world_size in (1, 64))
    assert whole["temporary"] >= whole["weights"]  # in the optimizer's step
    assert split["optimizer"] == pytest.approx(whole["optimizer"] / 64)
    assert split["temporary"] < whole["temporary"] / 2
    assert split["activations"] > whole["activations"]
    assert ("gradients" in kinds) is (split["gradients"] < whole["gradients"] / 2)


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_deepspeed_s_bucket_is_allocated_whole(strategy: str) -> None:
    spec = replace(PLAIN, strategy=strategy, shards=2 if strategy == "zero3" else 1)
    cost = step_simulation.measure_step(spec, 16)
    width = cost.parameters.trainable_bytes / cost.parameters.trainable
    assert compute_memory_budget(cost, spec, 4, 2).parts["communication"] >= 500_000_000 * width  # the model itself has some MB


@pytest.mark.parametrize(("adapter_dtype", "size"), [(None, 4), ("bfloat16", 2)])
def test_an_adapter_s_numbers_have_the_size_that_trl_gives_them(adapter_dtype: str | None, size: int) -> None:
    cost = step_simulation.measure_step(replace(PLAIN, lora=LORA, quantized=True, head="trl", adapter_dtype=adapter_dtype, cuda=False), 64)
    assert cost.parameters.trainable_bytes == size * cost.parameters.trainable
    assert cost.get_peak_memory(1)["optimizer"] == pytest.approx(2 * size * cost.parameters.trainable, rel=0.01)


@pytest.mark.parametrize(("precision", "weights_dtype", "is_float32"), [("bf16_pure", None, True), ("bf16_mixed", "bfloat16", False)])
def test_products_of_float32_take_the_time_that_they_take(precision: str, weights_dtype: str | None, is_float32: bool) -> None:
    """An adapter in float32 beside a base in bfloat16: its products are in float32, unless there is autocast."""
    cost = step_simulation.measure_step(replace(PLAIN, lora=LORA, head="trl", precision=precision, weights_dtype=weights_dtype), 64)
    fast, slow = (cost.compute_seconds(4, CardPeaks(1e12, peak, 1e30)).batch for peak in (1e12, 1e11))
    assert (slow > 1.5 * fast) is is_float32
    assert (slow == fast) is not is_float32


def test_a_compiled_layer_moves_what_its_kernels_read_and_write() -> None:
    """silu(gate) * up and its gradients: two kernels; by themselves, operators read and write each value between them."""
    gate, up = (torch.zeros(8, 64, requires_grad=True) for _ in range(2))
    matrix, gradient = torch.zeros(64, 64), torch.zeros(8, 64)
    tracker = MemoryTracker()
    tracker.num_blocks = 1
    tracker.label("weights", (gate, up, matrix, gradient))
    with tracker.record():
        tracker.position = StepPosition("forward")
        product = (torch.nn.functional.silu(gate) * up) @ matrix
        tracker.position = StepPosition("backward")
        product.backward(gradient)
        tracker.label("gradients", (gate.grad, up.grad))
    one, weights = 8 * 64 * 4, 64 * 64 * 4
    forward, backward = 3 * one, 5 * one  # gate and up are read, their product is written; gate, up and its gradient, and two gradients
    products = 2 * (2 * one + weights)
    moved, fused = (sum(sum(getattr(event.work, name)) for event in tracker.events) for name in ("moved", "fused"))
    assert fused == products + forward + backward
    assert moved == products + 5 * one + (3 + 3 + 3) * one


def test_compiling_spares_traffic_in_the_layers_alone() -> None:
    cost = step_simulation.measure_step(PLAIN, 64)
    eager, compiled = (cost.compute_seconds(8, CardPeaks(1e30, 1e30, 1.0), is_compiled=is_compiled) for is_compiled in (False, True))
    assert 0.2 * eager.batch < compiled.batch < 0.8 * eager.batch
    assert eager.optimizer == compiled.optimizer


@pytest.mark.parametrize(("model_type", "kernel"), [("llama", "swiglu"), ("gemma", "geglu")])
def test_a_gated_layer_is_fused_by_the_kernel_of_its_activation_alone(model_type: str, kernel: str) -> None:
    """Liger's SwiGLU keeps two tensors of a layer's inner width, and the layer itself more."""
    spec = PLAIN.with_config({**LLAMA, "model_type": model_type, "head_dim": 16})
    kept = {}
    for name in ("none", "swiglu", "geglu"):
        kept[name] = step_simulation.measure_step(replace(spec, kernels=(name,)), 64).get_peak_memory(8)["activations"]
    other = {"swiglu": "geglu", "geglu": "swiglu"}[kernel]
    assert kept[other] == kept["none"]
    assert kept[kernel] < 0.95 * kept["none"]


@pytest.mark.parametrize("length", [64, 256])
def test_attention_is_counted_as_its_kernel_computes_it(length: int) -> None:
    """A causal kernel skips the later keys; a mask that separates documents skips nothing."""
    causal, masked = (step_simulation.measure_step(replace(PLAIN, masked=masked), length) for masked in (False, True))
    per_pair = 14 * 6 * 64  # layers, width
    assert (masked.count_flops(3) - causal.count_flops(3)) / 3 == per_pair * (length * length - length * (length + 1) / 2)
    matrices = causal.parameters.total - 13 * 64  # norms multiply no matrix; the head, which is tied, does
    assert causal.count_flops(3) / 3 == 6 * matrices * length + per_pair * length * (length + 1) / 2


SIZES = [(tokens, vocabulary, width) for tokens in (7, 4096, 20_480) for vocabulary, width in ((1000, 64), (128_256, 2048), (500, 768))]


@pytest.mark.skipif(not chunked_loss.is_available(), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), SIZES)
def test_tiles_have_the_rows_that_pytorch_chooses(tokens: int, vocabulary: int, width: int) -> None:
    options = torch.nn.LinearCrossEntropyOptions()
    for kind, dtype, device in (("torch", torch.float32, "cpu"), ("accurate", torch.bfloat16, "cpu")):
        chosen = options._adjust(tokens, width, vocabulary, dtype, torch.device(device))
        assert loss_tiles.count_tile_rows(kind, tokens, vocabulary, width) == chosen.batch_chunk_size
    from torch.nn.modules.linear_cross_entropy_options import _AUTO_DEFAULTS

    assert tuple(_AUTO_DEFAULTS["cuda", torch.bfloat16]) == ("compact", "aspect_ratio:2")  # float32's, which is looked at above


def constants(module: str) -> dict[str, Any]:
    """The plain constants of an installed module, which is not imported."""
    import importlib.util

    spec = importlib.util.find_spec(module.partition(".")[0])
    assert spec is not None and spec.origin is not None
    file = Path(spec.origin).parent.joinpath(*module.split(".")[1:]).with_suffix(".py")
    return {
        node.targets[0].id: node.value.value
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and isinstance(node.value, ast.Constant)
    }


def test_tiles_have_the_rows_and_columns_that_trl_chooses() -> None:
    assert constants("trl.kernels.chunked_logprob")["TOKEN_CHUNK_SIZE"] == loss_tiles.TRL_ROWS
    assert constants("trl.trainer.utils")["_CHUNKED_LOGPROB_CHUNK_SIZE"] == loss_tiles.TRL_COLUMNS


@pytest.mark.skipif(not chunked_loss.is_available(), reason="this torch has no linear_cross_entropy")
@pytest.mark.parametrize(("tokens", "vocabulary", "width"), SIZES)
def test_tiles_have_the_rows_that_liger_chooses(tokens: int, vocabulary: int, width: int) -> None:
    triton = pytest.importorskip("triton")
    pytest.importorskip("liger_kernel")
    from liger_kernel.ops import fused_linear_cross_entropy as liger

    source = inspect.getsource(liger.fused_linear_cross_entropy_forward)
    lines = [line.partition("#")[0].strip() for line in source.splitlines()]
    names = {"triton": triton, "BT": tokens, "V": vocabulary, "H": width, "chunk_mem_const": liger._CHUNK_MEM_CONST}
    for line in [line for line in lines if line.startswith(("inc_factor =", "chunk_size ="))]:
        exec(line, {}, names)  # Liger's own lines
    assert loss_tiles.count_tile_rows("liger", tokens, vocabulary, width) == names["chunk_size"]


def kept(function: Any, *given: torch.Tensor) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Shapes of what a stand-in keeps for its backward pass."""
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        function.apply(*given)
    return [(tuple(tensor.shape), tensor.dtype) for tensor in saved]


def saves(module: str, function: str) -> set[str]:
    """Names of what one of Liger's autograd functions hands to save_for_backward."""
    pytest.importorskip("liger_kernel")
    import importlib

    tree = ast.parse(inspect.getsource(getattr(importlib.import_module(f"liger_kernel.ops.{module}"), function)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "save_for_backward"]
    return {argument.id for call in calls for argument in call.args if isinstance(argument, ast.Name)}


def test_stand_ins_keep_what_ligers_kernels_keep() -> None:
    x, weight = torch.zeros(2, 5, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    row, floats = (2, 5), torch.float32
    assert kept(kernel_stubs._RMSNorm, x, weight) == [((*row, 8), floats), ((8,), floats), (row, floats)]
    assert {"X", "W", "RSTD"} <= saves("rms_norm", "LigerRMSNormFunction")
    assert kept(kernel_stubs._GatedProduct, x, x) == [((*row, 8), floats)] * 2
    assert saves("swiglu", "LigerSiLUMulFunction") == {"a", "b", "a_local", "b_local"}  # the last two beside a DTensor
    assert saves("geglu", "LigerGELUMulFunction") == {"a", "b"}
    assert kept(kernel_stubs._LayerNorm, x, weight) == [((*row, 8), floats), ((8,), floats), ((2, *row), floats)]
    assert {"X", "W", "Mean", "RSTD"} <= saves("layer_norm", "LigerLayerNormFunction")


@pytest.mark.parametrize(("kind", "tokens"), [("liger", 300), ("torch", 300), ("trl", 9000)])
def test_a_loss_by_tiles_does_the_whole_of_its_products(kind: str, tokens: int) -> None:
    """Logits and both gradients; logits twice where the backward pass makes them again."""
    x = torch.zeros(tokens, 16, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(40_000 if kind == "trl" else 900, 16, dtype=torch.bfloat16, requires_grad=True)
    function = {"liger": kernel_stubs._Liger, "torch": kernel_stubs._Torch, "trl": kernel_stubs._TRL}[kind]
    tracker = MemoryTracker()
    with step_simulation.FakeTensorMode(allow_non_fake_inputs=True), tracker.record():
        function.apply(x, weight, kernel_stubs.LossHead(kind, tracker, cuda=True)).sum().backward()
    one = 2 * tokens * 16 * weight.shape[0]
    assert sum(sum(event.work.flops) for event in tracker.events) == pytest.approx(one * (3 if kind == "liger" else 4))


@pytest.mark.parametrize(
    ("optim", "moments", "each"), [("adamw_8bit", 2, 1 + 4 / 256), ("lion_8bit", 1, 1 + 4 / 256), ("lion_32bit", 1, 4)]
)
def test_the_state_of_bitsandbytes_optimizers_is_counted(optim: str, moments: int, each: float) -> None:
    """Embeddings are not in 8 bits, nor are norms."""
    cost = step_simulation.measure_step(replace(PLAIN, config={**LLAMA, "num_key_value_heads": 4}, optim=optim, cuda=False), 16)
    exact = cost.parameters.embeddings + 13 * 64
    expected = moments * (4 * exact + each * (cost.parameters.total - exact))
    assert cost.get_peak_memory(1)["optimizer"] == pytest.approx(expected, rel=1e-6)


def test_a_base_in_four_bits_is_held_so_and_nothing_of_it_is_kept_unpacked() -> None:
    whole = replace(PLAIN, lora=LORA, head="trl", config={**LLAMA, "vocab_size": 200}, cuda=False)
    plain, packed = (step_simulation.measure_step(replace(whole, quantized=quantized), 64) for quantized in (False, True))
    assert packed.parameters.total == plain.parameters.total
    linear = plain.parameters.total - plain.parameters.trainable - plain.parameters.embeddings - 13 * 64
    saved = plain.get_peak_memory(4)["weights"] - packed.get_peak_memory(4)["weights"]
    assert saved == pytest.approx(linear * (2 - 0.5 - (0.127 / 8)), rel=0.01)
    assert packed.get_peak_memory(4)["activations"] == pytest.approx(plain.get_peak_memory(4)["activations"], rel=0.02)
    assert packed.count_flops(4) == plain.count_flops(4)


def test_tensors_that_only_show_a_sharded_results_shape_are_not_counted() -> None:
    from torch.distributed.tensor import Shard, distribute_tensor

    with step_simulation._open_mesh(8) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        part = distribute_tensor(torch.empty(8 * 1024, dtype=torch.float32), mesh, [Shard(0)])
        tracker = MemoryTracker()
        with tracker.record():
            hidden = part.asinh()  # no other test's operator: the first use infers the shape of the result
        assert max(sum(event.base) for event in tracker.events) == 1024 * 4, "this process' part of the result"
        assert hidden.shape == (8 * 1024,)
