"""Bits per byte against its definition, computed the slow way."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from azrecipe.parts.metrics import bits, windows
from azrecipe.parts.model import load_model
from azrecipe.parts.packing import Borders, PackedText, Span, collate
from azrecipe.parts.tokens import encode
from azrecipe.parts.vocabulary import load_tokenizer, measure
from tests.conftest import TALES
from tests.unit.test_mixing import Mix, stored


@given(ids=st.lists(st.integers(10, 99), max_size=200), max_length=st.integers(2, 40))
def test_every_token_is_scored_once_with_half_a_window_before_it(ids: list[int], max_length: int) -> None:
    cut = list(windows(ids, 1, max_length))
    assert [token for window in cut for token in window.ids[window.context :]] == ids
    assert all(len(window.ids) <= max_length for window in cut)
    assert all(window.context >= max_length // 2 for window in cut[1:])


def test_bpb_is_the_sum_of_log_probabilities_over_bytes(llama: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    texts = [TALES[0], TALES[1], "Ə"]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *encode(tokenizer, [text])[0]]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits(model, tokenizer, texts, max_length=128, batch_size=2).per_byte == pytest.approx(expected, rel=1e-5)


def test_bpb_does_not_depend_on_the_batch(llama: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    texts = [tale * 5 for tale in TALES]
    one, many = (bits(model, tokenizer, texts, 32, batch_size=size) for size in (1, 7))
    assert one.nats == pytest.approx(many.nats, rel=1e-6)
    assert one.tokens == many.tokens == sum(len(ids) for ids in encode(tokenizer, texts))


def test_windows_change_nothing_for_documents_that_fit(llama: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    short = [text[:40] for text in TALES]
    assert bits(model, tokenizer, short, 64, 4).per_byte == pytest.approx(bits(model, tokenizer, short, 256, 4).per_byte, rel=1e-6)


def test_special_tokens_written_in_a_text_are_text(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    ids = encode(tokenizer, ["<|eot_id|>"])[0]
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in ids
    assert tokenizer.decode(ids) == "<|eot_id|>"


def test_fertility_counts_tokens_a_word(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    found = measure(tokenizer, ["bir iki üç", "dörd"])
    tokens = len(tokenizer("bir iki üç", add_special_tokens=False)["input_ids"]) + len(
        tokenizer("dörd", add_special_tokens=False)["input_ids"]
    )
    assert (found.tokens, found.words, found.bytes) == (tokens, 4, len("bir iki üçdörd".encode()))
    assert found.fertility == tokens / 4


@pytest.mark.parametrize("training", [True, False])
def test_a_packed_document_has_the_logits_that_it_has_alone(llama: Path, training: bool) -> None:
    model = load_model(str(llama), "float32").train(training)
    model.config.use_cache = False
    mix = Mix([stored([7, 9, 12, 5], 10)], [1], seed=3, extra=2)
    batch = collate([PackedText(mix, mix.order(tokens=60), Borders(0, 1), Span(0, 1, 30))[0]])
    starts = [*torch.nonzero(batch["position_ids"][0] == 0).flatten().tolist(), 30]
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        for begin, end in itertools.pairwise(starts):
            alone = model(input_ids=batch["input_ids"][:, begin:end]).logits[0]
            assert torch.allclose(packed[begin:end], alone, atol=1e-5)
