"""A change of vocabulary: what is kept, what is composed, and that the model stays one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.errors import CannotRun
from azrecipe.parts.embeddings import swap_vocabulary
from azrecipe.parts.model import build_model, save_model
from azrecipe.parts.vocabulary import train_like, train_llama3
from tests.conftest import TALES

CONFIG = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
ENGLISH, AZERBAIJANI = [TALES[0] * 20, TALES[2] * 20], [TALES[1] * 20, TALES[3] * 20]


@pytest.fixture(scope="module")
def old() -> Any:
    return train_llama3(ENGLISH, 300)


@pytest.fixture(scope="module")
def new(old: Any) -> Any:
    return train_like(old, AZERBAIJANI, 340)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["subtoken_mean", "mean", "random"])
def test_shared_tokens_keep_their_rows_and_new_ones_start_as_asked(old: Any, new: Any, tied: bool, method: str) -> None:
    model = build_model({**CONFIG, "tie_word_embeddings": tied}, old, "float32", "sdpa", seed=1)
    before = {"in": model.get_input_embeddings().weight.detach().clone(), "out": model.get_output_embeddings().weight.detach().clone()}
    swap = swap_vocabulary(model, old, new, method, seed=5)
    after = {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}
    assert (after["in"] is after["out"]) is tied
    assert (swap.old_size, swap.new_size, swap.copied + swap.composed) == (300, 340, 340)
    shared = old.get_vocab().keys() & new.get_vocab().keys()
    assert len(shared) == swap.copied
    for side in ("in", "out"):
        for token, i in new.get_vocab().items():
            if token in shared:
                assert torch.equal(after[side][i], before[side][old.get_vocab()[token]])
            elif method == "subtoken_mean":
                pieces = [piece.id for piece in old.backend_tokenizer.model.tokenize(token)]
                assert len(pieces) > 1
                assert torch.allclose(after[side][i], before[side][pieces].mean(0), atol=1e-7)
            elif method == "mean":
                assert torch.allclose(after[side][i], before[side].mean(0), atol=1e-7)


def test_special_tokens_and_the_saved_model_follow_the_new_tokenizer(old: Any, new: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = build_model({**CONFIG, "tie_word_embeddings": True}, old, "float32", "sdpa", seed=1)
    swap_vocabulary(model, old, new, "subtoken_mean", seed=1)
    save_model(model, new, tmp_path / "m")
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    assert loaded.config.vocab_size == len(tokenizer) == 340
    for config in (loaded.config, loaded.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = torch.tensor([[tokenizer.bos_token_id, 300, 339]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_token_that_is_half_a_character_is_composed_of_bytes_too(old: Any) -> None:
    new = train_like(old, ["əƏ əİ şə öğ " * 50], 300)
    halves = [t for t in new.get_vocab() if t not in old.get_vocab() and "\ufffd" in new.convert_tokens_to_string([t])]
    model = build_model(CONFIG, old, "float32", "sdpa", seed=1)
    before = model.get_input_embeddings().weight.detach().clone()
    swap_vocabulary(model, old, new, "subtoken_mean", seed=1)
    assert halves
    for token in halves:
        pieces = [piece.id for piece in old.backend_tokenizer.model.tokenize(token)]
        assert torch.allclose(model.get_input_embeddings().weight[new.get_vocab()[token]], before[pieces].mean(0), atol=1e-7)


def test_a_tokenizer_of_another_kind_is_refused_in_words(old: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    model = build_model(CONFIG, old, "float32", "sdpa", seed=1)
    with pytest.raises(CannotRun, match="not a byte-level BPE"):
        swap_vocabulary(model, old, PreTrainedTokenizerFast(tokenizer_object=words), "mean", seed=1)
