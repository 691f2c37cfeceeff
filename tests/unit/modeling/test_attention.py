"""Packed documents without a mask are what they are with one: loss and gradients, in each precision; and what cannot run is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from azrecipe import errors
from azrecipe.data.packing import DocumentDelimiters, Packing, build_collator, compute_document_borders
from azrecipe.distributed.attention_choice import AttentionDevice, AttentionUse, check_attention, find_config_obstacles
from azrecipe.errors import CommandError
from azrecipe.modeling import attention, chunked_loss, compilation
from azrecipe.planning.simulation import memory_tracker
from azrecipe.recipe.attention_kinds import VARLEN
from tests.small import called

SHAPE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
ROWS = [[5, 9, 2], [16], [1, 1, 14]]  # documents in each row, by their lengths


def build(name: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    attention.register_varlen()
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, attn_implementation=name))
    model.config.use_cache = False
    return model.train()


def batch() -> dict[str, torch.Tensor]:
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in ROWS])
    ids = torch.randint(97, positions.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, -100), "position_ids": positions}


def step(model: Any, inputs: dict[str, Any], autocast: bool = False) -> tuple[float, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**inputs, num_items_in_batch=torch.tensor(40)).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize(("autocast", "loss_within", "gradients_within"), [(False, 1e-6, 1e-6), (True, 2e-3, 2e-2)])
def test_varlen_is_attention_with_the_mask(autocast: bool, loss_within: float, gradients_within: float) -> None:
    masked, masked_gradients = step(build("sdpa"), batch(), autocast)
    inputs = batch()
    loss, gradients = step(build(VARLEN), {**inputs, **compute_document_borders(inputs["position_ids"])}, autocast)
    assert loss == pytest.approx(masked, abs=loss_within)
    assert (gradients - masked_gradients).norm() / masked_gradients.norm() < gradients_within


def test_varlen_sees_each_document_alone() -> None:
    model, inputs = build(VARLEN).eval(), batch()
    with torch.no_grad():
        before = model(**inputs, **compute_document_borders(inputs["position_ids"])).logits
        inputs["input_ids"][0, :5] = (inputs["input_ids"][0, :5] + 1) % 97  # another first document
        after = model(**inputs, **compute_document_borders(inputs["position_ids"])).logits
    assert not torch.equal(before[0, :5], after[0, :5])
    assert torch.equal(before[0, 5:], after[0, 5:])


def test_unpacked_rows_need_no_borders() -> None:
    ids, positions = batch()["input_ids"], torch.arange(16).expand(3, -1)
    with torch.no_grad():
        logits = [build(name).eval()(input_ids=ids, position_ids=positions).logits for name in ("sdpa", VARLEN)]
    assert torch.allclose(*logits, atol=1e-6)


def test_a_cached_row_goes_on_as_the_whole_row() -> None:
    model, ids = build(VARLEN).eval(), batch()["input_ids"][:1]
    with torch.no_grad():
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :10], use_cache=True)
        rest = model(input_ids=ids[:, 10:], past_key_values=first.past_key_values, use_cache=True).logits
    assert torch.allclose(whole[:, 10:], rest, atol=1e-5)


def test_a_row_begins_a_document_whatever_its_positions_say() -> None:
    """The second row starts within a document, as a sequence that was cut does elsewhere."""
    borders = compute_document_borders(torch.tensor([[0, 1, 0, 1], [3, 4, 5, 0]]))
    assert borders["cu_seq_lens_q"].tolist() == [0, 2, 4, 7, 8]
    assert borders["cu_seq_lens_q"].dtype == torch.int32
    assert borders["max_length_q"] == 4


def test_the_collator_says_where_documents_begin() -> None:
    how = Packing("wrapped", 16, DocumentDelimiters(1, 2))
    rows = [{key: value[row] for key, value in batch().items()} for row in range(3)]
    assert build_collator(how, VARLEN)(rows)["cu_seq_lens_q"].tolist() == [0, 5, 14, 16, 32, 33, 34, 48]
    assert "cu_seq_lens_q" not in build_collator(how, "sdpa")(rows)


def test_compiled_blocks_are_the_blocks() -> None:
    inputs = batch() | compute_document_borders(batch()["position_ids"])
    loss, gradients = step(build(VARLEN), inputs)
    model = build(VARLEN)
    assert compilation.compile_blocks(model, backend="aot_eager") == 2
    its, its_gradients = step(model, inputs)
    assert its == pytest.approx(loss, abs=1e-6)
    assert (its_gradients - gradients).norm() / gradients.norm() < 1e-6
    assert list(model.state_dict()) == list(build(VARLEN).state_dict())


@pytest.mark.parametrize("groups", [8, 2, 1])
def test_attention_s_flops_are_torch_s(groups: int) -> None:
    query, key = (3, 8, 16, 4), (3, groups, 16, 4)
    assert memory_tracker._flash(query, key, key) == sdpa_flop_count(query, (3, 8, 16, 4), (3, 8, 16, 4))
    assert memory_tracker._flash_backward(query, query, key, key) == sdpa_backward_flop_count(query, query, (3, 8, 16, 4), (3, 8, 16, 4))


def test_a_torch_without_the_chunked_loss_starts_and_refuses_it(tmp_path: Path) -> None:
    """As torch 2.9 to 2.12 are: the names are taken out of this one, in a process of its own."""
    script = """
import torch
for home, name in ((torch.nn, "LinearCrossEntropyOptions"), (torch.nn.functional, "linear_cross_entropy")):
    if hasattr(home, name):
        delattr(home, name)
from transformers import LlamaConfig, LlamaForCausalLM
from azrecipe.distributed.attention_choice import AttentionUse, check_attention, find_config_obstacles
from azrecipe.errors import CommandError
from azrecipe.modeling import chunked_loss
from azrecipe.stages import pretrain
with torch.device("meta"):
    model = LlamaForCausalLM(LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9))
try:
    chunked_loss.check_chunked_loss(model)
except CommandError as error:
    print(error)
"""
    done = called([sys.executable, "-c", script], tmp_path)
    assert done.code == 0, done.err
    assert "does not have it: use torch 2.13 or newer, or fused_linear_cross_entropy: liger" in done.out


def test_a_model_without_named_blocks_is_not_compiled() -> None:
    model = build("sdpa")
    model._no_split_modules = None
    with pytest.raises(CommandError, match="names no blocks to compile"):
        compilation.compile_blocks(model)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the reason would be another one")
def test_on_a_cpu_varlen_is_allowed_for_tests() -> None:
    check_attention(VARLEN, AttentionUse("pretrain", "float32"), AttentionDevice())
    assert chunked_loss.is_available() == hasattr(torch.nn.functional, "linear_cross_entropy")


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "Triton Error [CUDA]: out of memory",
        "NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'",
    ],
)
def test_memory_that_is_out_is_told_as_that(text: str) -> None:
    known = errors.explain_error(RuntimeError(text))
    assert known is not None
    assert str(known).startswith("out of memory: ")
    assert "training.per_device_train_batch_size" in str(known)


def test_main_memory_is_no_matter_of_the_batch() -> None:
    known = errors.explain_error(MemoryError())
    assert known is not None and known.exit_code == 3
    assert str(known).startswith("out of memory: this machine has no main memory left")
    assert "batch" not in str(known) and "max_document_bytes" in str(known)


def meta(model_type: str, **fields: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {key: value for key, value in SHAPE.items() if key != "tie_word_embeddings"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **shape, **fields))


@pytest.mark.parametrize(
    ("model_type", "fields", "varlen", "others"),
    [
        ("llama", {}, "", {}),
        ("qwen3", {"head_dim": 16}, "", {}),
        ("mistral", {"sliding_window": 8}, "a sliding window", {}),
        ("gemma2", {"head_dim": 16}, "a sliding window and a soft cap", {"sdpa": "a soft cap"}),
        ("llama", {"attention_dropout": 0.1}, "dropout", {"flex_attention": "dropout", "flash_attention_3": "dropout"}),
        ("llama", {"head_dim": 12}, "its heads are 12 wide", {}),
        ("mamba", {}, "does not all go through", {}),
    ],
)
def test_a_model_itself_shows_what_its_attention_needs(
    model_type: str, fields: dict[str, Any], varlen: str, others: dict[str, str]
) -> None:
    model = meta(model_type, **fields)
    before = model.config._attn_implementation
    obstacles = attention.find_model_obstacles(model)
    assert (varlen in obstacles.get(VARLEN, "")) if varlen else VARLEN not in obstacles, obstacles
    for kind, words in others.items():
        assert words in obstacles[kind]
    assert model.config._attn_implementation == before
    if model_type == "llama":  # the plan, which has the configuration alone, says the same
        assert (VARLEN in find_config_obstacles(model.config.to_dict())) == bool(varlen)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it is compiled")
def test_flex_attention_keeps_documents_apart_as_the_mask_does() -> None:
    """Its forward pass alone: on a CPU PyTorch has no other, and compiling it would take a minute."""
    inputs = batch()
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        masked, flex = (build(name).eval()(**inputs).logits for name in ("sdpa", "flex_attention"))
    assert torch.allclose(masked, flex, atol=1e-6)
