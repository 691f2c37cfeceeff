"""A change of vocabulary: what is kept, what is composed, and that the model stays one piece."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from azrecipe.errors import CannotRun
from azrecipe.modeling.loading import build_model, save_model
from azrecipe.modeling.sparse_combinations import SparseCombinations
from azrecipe.modeling.vocabulary_swap import EmbeddingInit, check_swap, find_shared_tokens, pad_vocabulary, swap_vocabulary
from azrecipe.modeling.word_vectors import ComposedEmbeddings
from azrecipe.tokenization.bpe_training import train_like, train_llama3
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


def built(tokenizer: Any, precision: str = "float32", **config: Any) -> Any:
    return build_model({**CONFIG, **config}, tokenizer, precision, "sdpa", seed=1)


def sides(model: Any) -> dict[str, torch.Tensor]:
    return {"in": model.get_input_embeddings().weight, "out": model.get_output_embeddings().weight}


def copied(model: Any) -> dict[str, torch.Tensor]:
    return {side: matrix.detach().clone() for side, matrix in sides(model).items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", ["subtoken_mean", "mean", "random"])
def test_shared_tokens_keep_their_rows_and_new_ones_start_as_asked(old: Any, new: Any, tied: bool, method: str) -> None:
    model = built(old, tie_word_embeddings=tied)
    before = copied(model)
    swap = swap_vocabulary(model, old, new, EmbeddingInit(method, 5))
    after = sides(model)
    assert (after["in"] is after["out"]) is tied
    assert (swap.old_size, swap.new_size, swap.copied + swap.composed, swap.fallback, swap.padding) == (300, 340, 340, 0, 0)
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


@pytest.mark.parametrize("precision", ["float32", "bf16_pure"])
@pytest.mark.parametrize("tied", [True, False])
def test_tokens_with_a_sum_start_as_it_and_the_others_as_their_pieces(old: Any, new: Any, tied: bool, precision: str) -> None:
    known, fresh = find_shared_tokens(old, new), [i for t, i in sorted(new.get_vocab().items()) if t not in old.get_vocab()]
    a, b, c = sorted(known.values())[20:23]
    sums = SparseCombinations(torch.tensor([0, 2, 3]), torch.tensor([a, b, c]), torch.tensor([0.75, 0.25, 0.5]))
    model = built(old, precision, tie_word_embeddings=tied)
    before = copied(model)
    swap = swap_vocabulary(model, old, new, EmbeddingInit("focus", 5, ComposedEmbeddings(np.array(fresh[:2]), sums)))
    assert (swap.composed, swap.fallback, swap.copied) == (2, len(fresh) - 2, len(known))
    for side, after in sides(model).items():
        assert after.dtype == before[side].dtype
        rows, atol = before[side].float(), 1e-7 if precision == "float32" else 2e-4
        mean = rows.mean(0)
        assert torch.allclose(after[fresh[0]].float(), 0.75 * rows[a] + 0.25 * rows[b], atol=atol)
        assert torch.allclose(after[fresh[1]].float(), mean + 0.5 * (rows[c] - mean), atol=atol)  # half way, not half as long
        pieces = [piece.id for piece in old.backend_tokenizer.model.tokenize(new.convert_ids_to_tokens(fresh[2]))]
        assert torch.allclose(after[fresh[2]].float(), rows[pieces].mean(0), atol=atol)
        for i, was in known.items():
            assert torch.equal(after[i], before[side][was])


def test_a_heads_bias_goes_with_its_token(old: Any, new: Any) -> None:
    model = build_model({"model_type": "phi", **{k: v for k, v in CONFIG.items() if k != "model_type"}}, old, "float32", "sdpa", seed=1)
    with torch.no_grad():
        model.lm_head.bias.copy_(torch.arange(300.0))
    swap_vocabulary(model, old, new, EmbeddingInit("subtoken_mean", 1))
    assert model.lm_head.bias.shape == (340,)
    for i, was in find_shared_tokens(old, new).items():
        assert model.lm_head.bias[i] == was


def test_special_tokens_and_the_saved_model_follow_the_new_tokenizer(old: Any, new: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = built(old, tie_word_embeddings=True)
    swap_vocabulary(model, old, new, EmbeddingInit("subtoken_mean", 1))
    save_model(model, new, tmp_path / "m")
    loaded, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "m"), AutoTokenizer.from_pretrained(tmp_path / "m")
    assert loaded.config.vocab_size == len(tokenizer) == 340
    for config in (loaded.config, loaded.generation_config):
        assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    ids = torch.tensor([[tokenizer.bos_token_id, 300, 339]])
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_new_special_token_starts_as_the_mean_and_an_added_word_as_its_pieces(old: Any) -> None:
    import copy

    new = copy.deepcopy(old)
    new.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    new.add_tokens([" river öğ"])
    model = built(old)
    before = copied(model)["in"]
    swap = swap_vocabulary(model, old, new, EmbeddingInit("subtoken_mean", 1))
    assert (swap.copied, swap.composed) == (300, 2)
    after = sides(model)["in"]
    pieces = old(" river öğ", add_special_tokens=False)["input_ids"]
    assert torch.allclose(after[new.convert_tokens_to_ids("<|tool|>")], before.mean(0), atol=1e-7)
    assert torch.allclose(after[new.convert_tokens_to_ids(" river öğ")], before[pieces].mean(0), atol=1e-7)


def test_a_token_that_is_half_a_character_is_composed_of_bytes_too(old: Any) -> None:
    new = train_like(old, ["əƏ əİ şə öğ " * 50], 300)
    halves = [t for t in new.get_vocab() if t not in old.get_vocab() and "\ufffd" in new.convert_tokens_to_string([t])]
    model = built(old)
    before = copied(model)["in"]
    swap_vocabulary(model, old, new, EmbeddingInit("subtoken_mean", 1))
    assert halves
    for token in halves:
        pieces = [piece.id for piece in old.backend_tokenizer.model.tokenize(token)]
        assert torch.allclose(sides(model)["in"][new.get_vocab()[token]], before[pieces].mean(0), atol=1e-7)


@pytest.mark.parametrize("precision", ["float32", "bf16_pure"])
@pytest.mark.parametrize("config", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, {"model_type": "phi"}])
def test_padding_adds_rows_at_the_mean_and_changes_no_other(old: Any, config: dict[str, Any], precision: str) -> None:
    model = built(old, precision, **config)
    ids = torch.tensor([[0, 50, 60, 299]])
    before, logits = copied(model), model(ids).logits
    assert pad_vocabulary(model, 300, 64) == 20
    assert model.config.vocab_size == 320
    for side, after in sides(model).items():
        assert after.shape[0] == 320
        assert torch.equal(after[:300], before[side])
        assert torch.allclose(after[300:].float(), before[side].float().mean(0).expand(20, -1), atol=1e-4)
    padded = model(ids).logits
    assert torch.allclose(padded[..., :300], logits, atol=1e-6 if precision == "float32" else 1e-2)
    assert (padded[..., 300:].amax(-1) < logits.amax(-1)).all()
    assert pad_vocabulary(model, 300, 64) == 20  # nothing left to do
    assert pad_vocabulary(model, 300, 1) == 20  # and nothing taken away


def sentencepiece_like(kind: str, texts: list[str]) -> Any:
    """A small tokenizer as SentencePiece's are: "▁" for a space, byte fallback."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(vocab_size=340, special_tokens=specials, unk_token="<unk>", show_progress=False)
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=specials, show_progress=False)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.train_from_iterator(texts, trainer=trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_methods_that_cut_no_token_take_any_tokenizer(kind: str) -> None:
    old, new = sentencepiece_like(kind, ENGLISH), sentencepiece_like(kind, AZERBAIJANI)
    model = built(old)
    before = copied(model)["in"]
    swap = swap_vocabulary(model, old, new, EmbeddingInit("mean", 1))
    shared = old.get_vocab().keys() & new.get_vocab().keys()
    assert {"<s>", "<0xC9>"} <= shared < new.get_vocab().keys()
    assert swap.copied == len(shared)
    for token, i in new.get_vocab().items():
        wanted = before[old.get_vocab()[token]] if token in shared else before.mean(0)
        assert torch.allclose(sides(model)["in"][i], wanted, atol=1e-7)
    assert model.config.bos_token_id == new.bos_token_id


def test_between_kinds_of_tokenizer_only_ascii_spells_the_same_thing(old: Any) -> None:
    new = sentencepiece_like("bpe", [*AZERBAIJANI, "Äpfel É ä ö " * 40])
    both = old.get_vocab().keys() & new.get_vocab().keys()
    assert {"Ä", "a"} <= both  # "Ä" is the byte C4 in one and a letter in the other
    shared = {new.convert_ids_to_tokens(i) for i in find_shared_tokens(old, new)}
    assert shared == {token for token in both if token.isascii()}


@pytest.mark.parametrize("method", ["subtoken_mean", "focus", "omp"])
def test_a_method_that_cuts_tokens_is_refused_another_kind_with_those_that_work(old: Any, method: str) -> None:
    new = sentencepiece_like("bpe", AZERBAIJANI)
    for pair, name in (((old, new), "the new"), ((new, old), "the model's")):
        with pytest.raises(CannotRun, match=f"{name} tokenizer is not a byte-level BPE.*{method} .*still work: mean, random"):
            check_swap(*pair, method)
    check_swap(old, new, "random")
