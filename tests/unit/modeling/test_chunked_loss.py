"""PyTorch's chunked loss is the plain loss: value and gradients, alone and sharded, without the logits of a whole batch."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from azrecipe.errors import CommandError
from azrecipe.evaluation import bits_per_byte
from azrecipe.modeling import chunked_loss
from tests.conftest import ROOT, TALES
from tests.small import Project, called

pytestmark = pytest.mark.skipif(not chunked_loss.is_available(), reason="this torch has no linear_cross_entropy")

SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHARDED = """
import copy, json, torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from azrecipe.modeling import chunked_loss
from tests.unit.modeling.test_chunked_loss import batch, build, step
dist.init_process_group("gloo")
rank, found = dist.get_rank(), {}
plain = build("llama", tie_word_embeddings=True)
half = {name: value[rank::2] for name, value in batch().items()}
loss, grads = step(plain, batch())

def compare(kind, model):
    its, its_grads = step(model, half)
    its = its.detach()
    dist.all_reduce(its)
    whole = {n.removeprefix("module."): g.full_tensor() if isinstance(g, DTensor) else g for n, g in its_grads.items()}
    furthest = max(((whole[name] * 2 - grad).norm() / grad.norm()).item() for name, grad in grads.items())  # they average, we add
    found[kind] = [type(model).__name__, abs(its.item() - loss.item()) / loss.item(), furthest]

def chunked():
    model = build("llama", tie_word_embeddings=True)
    chunked_loss.enable_chunked_loss(model)
    return model

compare("ddp", DistributedDataParallel(chunked()))
model = chunked()
for layer in model.model.layers:
    fully_shard(layer)
fully_shard([model.model.norm, model.model.embed_tokens, model.lm_head], reshard_after_forward=False)  # as Accelerate groups them
fully_shard(model)
compare("fsdp", model)
if rank == 0:
    print(json.dumps(found))
dist.destroy_process_group()
"""


def build(kind: str, **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SMALL, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).train()


def batch() -> dict[str, torch.Tensor]:
    """Four sequences with very different numbers of labels, two documents in one of them."""
    ids = torch.randint(3, 64, (4, 16), generator=torch.Generator().manual_seed(1))
    labels, positions = ids.clone(), torch.arange(16).repeat(4, 1)
    labels[0, :13] = labels[2, 5] = labels[3, 8] = -100
    positions[3, 8:] = torch.arange(8)
    return {"input_ids": ids, "labels": labels, "position_ids": positions}


def step(model: Any, inputs: dict[str, torch.Tensor], count: int | None = 77) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of what trains."""
    model.zero_grad()
    extra = {} if count is None else {"num_items_in_batch": torch.tensor(count)}
    loss = model(**inputs, use_cache=False, **extra).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: Any, count: int | None = 77) -> None:
    loss, grads = step(model, batch(), count)
    chunked = copy.deepcopy(model)
    chunked_loss.enable_chunked_loss(chunked)
    its, its_grads = step(chunked, batch(), count)
    assert torch.allclose(its, loss, rtol=1e-6, atol=0)
    assert its_grads.keys() == grads.keys()
    for name, grad in grads.items():
        assert (its_grads[name] - grad).norm() <= 1e-6 * grad.norm(), name


@pytest.mark.parametrize(
    ("kind", "changes"),
    [("llama", {"tie_word_embeddings": True}), ("llama", {"tie_word_embeddings": False}), ("qwen3", {}), ("gemma3_text", {}), ("phi3", {})],
)
def test_loss_and_gradients_equal_the_plain_ones(kind: str, changes: dict[str, Any]) -> None:
    assert_equal(build(kind, **changes))


@pytest.mark.parametrize("trains", ["embed_tokens", "lm_head", "layers.1"])
def test_they_do_where_only_a_part_trains(trains: str) -> None:
    model = build("llama", tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trains in name)
    assert_equal(model, count=None)


def test_a_sum_in_bfloat16_is_not_rounded_as_it_grows() -> None:
    """A bfloat16 model, and bfloat16 arithmetic on float32 weights: the loss lies as near to float32's as the plain one does."""
    model = build("llama", tie_word_embeddings=True)
    exact, _ = step(model, batch())
    chunked_loss.enable_chunked_loss(model)
    with torch.autocast("cpu", torch.bfloat16):
        mixed, grads = step(model, batch())
    pure, _ = step(copy.deepcopy(model).to(torch.bfloat16), batch())
    assert mixed.dtype == pure.dtype == torch.float32
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    assert abs(mixed - exact) < 1e-3 * exact
    assert abs(pure - exact) < 1e-3 * exact


def test_without_labels_there_are_logits_and_a_saved_model_is_plain(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build("llama", tie_word_embeddings=True)
    ids = batch()["input_ids"]
    before = model(input_ids=ids).logits
    chunked_loss.enable_chunked_loss(model)
    chunked_loss.enable_chunked_loss(model)  # once is enough
    assert torch.equal(model(input_ids=ids).logits, before)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(input_ids=ids).logits, before)


def test_the_logits_of_a_batch_are_never_in_memory(tmp_path: Path) -> None:
    """By PyTorch's own count of what its allocator has given out."""
    inputs = {name: value.repeat(8, 1) for name, value in batch().items()}
    logits = inputs["input_ids"].numel() * 4_096 * 4

    def peak(model: Any) -> int:
        step(model, inputs)
        model.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            step(model, inputs)
        recorded.export_chrome_trace(str(tmp_path / "trace.json"))
        events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
        given_out = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
        return int(max(given_out) - given_out[0])

    model = build("llama", vocab_size=4_096)
    plain = peak(model)
    chunked_loss.enable_chunked_loss(model)
    assert plain > 2 * logits
    assert peak(model) < 0.5 * logits


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gemma2", "scales or caps its logits"),
        ("granite", "scales or caps its logits"),
        ("cohere", "scales or caps its logits"),
        ("mixtral", "has experts"),
    ],
)
def test_a_model_that_does_more_is_refused(kind: str, said: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL), attn_implementation="eager")
    with pytest.raises(CommandError, match=said):
        chunked_loss.check_chunked_loss(skeleton)


def test_an_ordinary_model_is_not_refused() -> None:
    with torch.device("meta"):
        skeleton = build("llama", tie_word_embeddings=True)
    chunked_loss.check_chunked_loss(skeleton)
    assert skeleton.loss_function.__name__ == "ForCausalLMLoss"
    assert skeleton.config._attn_implementation == "sdpa"


def test_under_ddp_and_fsdp_two_processes_give_the_plain_gradients() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = called([*command, sys.executable, "-W", "ignore", "-c", SHARDED], ROOT)
    assert done.code == 0, done.err
    found = json.loads(done.out.splitlines()[-1])
    assert [name for name, _, _ in found.values()] == ["DistributedDataParallel", "FSDPLlamaForCausalLM"]
    for kind, (_, loss, gradient) in found.items():
        assert loss < 1e-6, kind
        assert gradient < 2e-6, kind


def test_bits_per_byte_are_those_of_the_plain_head_and_need_no_logits(finished: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = finished.path("base") / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    texts = [TALES[0] * 12, TALES[1], TALES[2] * 3]  # the first is longer than a window
    plain = bits_per_byte.score_texts(model, tokenizer, texts, 32, 2)
    chunked_loss.enable_chunked_loss(model)
    seen = []
    model.get_output_embeddings().register_forward_hook(lambda _module, _given, out: seen.append(out.shape[-1]))
    chunked = bits_per_byte.score_texts(model, tokenizer, texts, 32, 2)
    assert seen and model.config.vocab_size not in seen
    assert (chunked.num_bytes, chunked.num_tokens) == (plain.num_bytes, plain.num_tokens)
    assert chunked.nats == pytest.approx(plain.nats, rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vocabulary_that_grows_keeps_the_chunked_loss(dtype: torch.dtype) -> None:
    model = build("llama", tie_word_embeddings=True).to(dtype).eval()
    chunked_loss.enable_chunked_loss(model)
    model.resize_token_embeddings(96)
    chunked_loss.enable_chunked_loss(model)
    inputs = batch()
    with torch.no_grad():
        total = model(**inputs, use_cache=False, num_items_in_batch=1).loss
        logits = model(input_ids=inputs["input_ids"], position_ids=inputs["position_ids"], use_cache=False).logits
        plain = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten(), reduction="sum")
    assert logits.shape[-1] == 96
    assert float(total) == pytest.approx(float(plain), rel=1e-6)
