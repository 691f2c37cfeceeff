"""Losses of tokens are those of the whole logits, which are never in memory; and memory that is out names the batch that helps."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_outputs_to_fp32
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from azrecipe.errors import CannotRun
from azrecipe.evaluation import token_losses
from azrecipe.evaluation.bits_per_byte import TextScorer
from azrecipe.evaluation.token_losses import compute_token_losses, explain_evaluation_memory
from azrecipe.modeling import chunked_loss
from azrecipe.modeling.loading import load_model
from azrecipe.tokenization.encoding import IGNORE_INDEX
from azrecipe.tokenization.tokenizer import load_tokenizer
from tests.conftest import ROOT
from tests.small import called

VOCABULARY = 997
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8,
}  # fmt: skip


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that any operator returns."""

    elements = 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def build(model_type: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE)).eval()


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (8, 40), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = IGNORE_INDEX
    labels[2, 10:] = IGNORE_INDEX
    labels[5] = IGNORE_INDEX
    return ids, labels


def expected(model: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return F.cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORE_INDEX).double()


def with_adapter(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False)).eval()


def as_accelerate_wraps_it(model: Any) -> Any:
    model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))
    return model


def with_chunked_loss(model: Any) -> Any:
    chunked_loss.enable_chunked_loss(model)
    return model


@pytest.mark.parametrize("wrap", [lambda model: model, with_adapter, as_accelerate_wraps_it, with_chunked_loss], ids=["plain", "adapter", "mixed", "chunked"])  # fmt: skip
def test_losses_are_those_of_whole_logits_which_are_never_there(wrap: Any) -> None:
    model = wrap(build("llama"))
    ids, labels = batch()
    head = token_losses._unwrap_model(model).get_output_embeddings()
    before = dict(vars(head))
    with torch.no_grad():
        whole = expected(model, ids, labels)
        with LargestTensor() as largest:
            losses = compute_token_losses(model, ids, labels)
    assert losses.dtype == torch.float64
    assert torch.allclose(losses, whole, rtol=1e-5, atol=1e-6)
    assert bool((losses[labels[:, 1:] == IGNORE_INDEX] == 0).all())
    assert largest.elements < ids.numel() * VOCABULARY  # at most 512 rows of logits, of 320 here that are scored
    assert largest.elements <= max((labels[:, 1:] != IGNORE_INDEX).sum() * VOCABULARY, VOCABULARY * 32)
    assert vars(head).keys() == before.keys()
    assert model(input_ids=ids).logits.shape == (8, 40, VOCABULARY)


def test_many_rows_are_scored_some_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_losses, "ROWS_PER_CHUNK", 16)
    model, (ids, labels) = build("llama"), batch()
    with torch.no_grad():
        with LargestTensor() as largest:
            losses = compute_token_losses(model, ids, labels)
        assert torch.allclose(losses, expected(model, ids, labels), rtol=1e-5, atol=1e-6)
    assert largest.elements <= VOCABULARY * 32  # the embeddings; whole logits have ten times as many


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere"])
def test_a_model_that_changes_its_logits_is_scored_by_them(model_type: str) -> None:
    model, (ids, labels) = build(model_type), batch()
    with torch.no_grad():
        for _ in range(2):
            assert torch.allclose(compute_token_losses(model, ids, labels), expected(model, ids, labels), rtol=1e-5, atol=1e-6)
    assert set(model.state_dict()) == set(build(model_type).state_dict())


def test_text_is_tokenised_once(llama: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    scorer = TextScorer(tokenizer, ["Bir varmış, bir yoxmuş.", "The river."], 64, 2)
    first = scorer.score(model)
    tokenizer.__call__ = tokenizer._tokenizer = None  # whatever would tokenise again fails
    assert scorer.score(model).nats == first.nats


def test_memory_that_is_out_while_measuring_names_the_batch_that_helps() -> None:
    with pytest.raises(CannotRun) as error, explain_evaluation_memory("training.per_device_eval_batch_size", 8):
        torch.empty(1 << 60)
    assert "out of memory while measuring on held-out text" in str(error.value)
    assert "--set training.per_device_eval_batch_size=4" in str(error.value)
    with pytest.raises(ValueError, match="another"), explain_evaluation_memory("per_device_eval_batch_size", 1):
        raise ValueError("another error")


def test_a_model_that_two_processes_share_is_scored_a_part_at_a_time() -> None:
    """Under FSDP 2 the head computes 512 rows of logits at most, and the losses are one process'."""
    worker = Path(__file__).with_name("sharded_worker.py")
    done = called([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(worker)], ROOT)
    assert done.code == 0, done.err
    for answers in json.loads(done.out.splitlines()[-1]):  # torch 2.9's gloo prints lines before it
        for answer in answers:
            assert answer["apart"] < 1e-5
            assert (answer["rows"], answer["whole"]) == ([512, 385], False)
