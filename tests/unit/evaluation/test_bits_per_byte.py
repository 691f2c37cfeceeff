"""Bits per byte against its definition, computed the slow way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from azrecipe.evaluation.bits_per_byte import score_texts, split_windows
from azrecipe.modeling.loading import load_model
from azrecipe.tokenization.encoding import encode_texts
from azrecipe.tokenization.tokenizer import count_embedding_rows, load_tokenizer
from azrecipe.tokenization.tokenizer_metrics import count_tokens
from azrecipe.utils.process_pool import WorkerPool
from tests.conftest import TALES
from tests.unit.data.test_packing import one_thread  # noqa: F401


@given(ids=st.lists(st.integers(10, 99), max_size=200), max_length=st.integers(2, 40))
def test_every_token_is_scored_once_with_half_a_window_before_it(ids: list[int], max_length: int) -> None:
    cut = list(split_windows(ids, 1, max_length))
    assert [token for window in cut for token in window.ids[window.num_context :]] == ids
    assert all(len(window.ids) <= max_length for window in cut)
    assert all(window.num_context >= max_length // 2 for window in cut[1:])


def test_bpb_is_the_sum_of_log_probabilities_over_bytes(llama: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    texts = [TALES[0], TALES[1], "Ə"]
    nats = 0.0
    for text in texts:
        ids = torch.tensor([[tokenizer.bos_token_id, *encode_texts(tokenizer, [text])[0]]])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1].log_softmax(-1)
        nats -= float(logits.gather(1, ids[0, 1:, None]).sum())
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert score_texts(model, tokenizer, texts, max_length=128, batch_size=2).bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_bpb_does_not_depend_on_the_batch(llama: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    texts = [tale * 5 for tale in TALES]
    one, many = (score_texts(model, tokenizer, texts, 32, batch_size=size) for size in (1, 7))
    assert one.nats == pytest.approx(many.nats, rel=1e-6)
    assert one.num_tokens == many.num_tokens == sum(len(ids) for ids in encode_texts(tokenizer, texts))


def test_windows_change_nothing_for_documents_that_fit(llama: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    short = [text[:40] for text in TALES]
    assert score_texts(model, tokenizer, short, 64, 4).bits_per_byte == pytest.approx(
        score_texts(model, tokenizer, short, 256, 4).bits_per_byte, rel=1e-6
    )


def test_special_tokens_written_in_a_text_are_text(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    ids = encode_texts(tokenizer, ["<|eot_id|>"])[0]
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") not in ids
    assert tokenizer.decode(ids) == "<|eot_id|>"


def test_fertility_counts_tokens_a_word(llama: Path) -> None:
    tokenizer, texts = load_tokenizer(str(llama)), ["bir iki üç", "dörd"]
    with WorkerPool(1) as workers:
        counts = count_tokens(workers, tokenizer, {"a": texts})["a"]
    assert counts.tokens.tolist() == [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
    assert counts.words.tolist() == [3, 1]
    assert counts.bytes.tolist() == [len(text.encode()) for text in texts]


@pytest.fixture(scope="module")
def trained(llama: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The small model after a little training on the tales, so that what stands before a token says something of it."""
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    rows = torch.tensor([ids[:60] for ids in encode_texts(tokenizer, [tale * 4 for tale in TALES])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


def test_windowed_and_whole_evaluation_agree_on_short_documents_of_a_trained_model(
    trained: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = trained
    texts = [tale[:n] for tale in TALES for n in (20, 35, 60)]
    longest = 1 + max(map(len, encode_texts(tokenizer, texts)))
    whole = score_texts(model, tokenizer, texts, 256, 5)
    windowed = score_texts(model, tokenizer, texts, longest, 3)
    assert whole.bits_per_byte < 2.5  # untrained: over 3
    assert windowed.bits_per_byte == pytest.approx(whole.bits_per_byte, abs=1e-3)
    # the tokens and bytes of the text alone: no BOS, no EOS
    assert whole.num_tokens == sum(map(len, encode_texts(tokenizer, texts)))
    assert whole.num_bytes == sum(len(text.encode()) for text in texts)


def test_a_long_document_is_scored_in_windows_that_overlap_by_half(trained: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = trained
    text, length = "".join(TALES), 32
    ids = [tokenizer.bos_token_id, *encode_texts(tokenizer, [text])[0]]
    assert len(ids) > 3 * length
    nats, scored = 0.0, 1
    while scored < len(ids):  # the definition in docs/metrics.md, a window at a time
        end = min(length if scored == 1 else scored + length // 2, len(ids))
        window = ids[max(end - length, 0) : end]
        with torch.no_grad():
            log_p = model(torch.tensor([window]), use_cache=False).logits[0].log_softmax(-1)
        for at in range(len(window) - (end - scored), len(window)):
            nats -= float(log_p[at - 1, window[at]])
        scored = end
    found = score_texts(model, tokenizer, [text], length, 4)
    assert found.nats == pytest.approx(nats, rel=1e-5)
    assert found.num_tokens == len(ids) - 1
    blind = sum(score_texts(model, tokenizer, [tokenizer.decode(ids[at : at + 16])], length, 4).nats for at in range(1, len(ids), 16))
    assert found.nats < blind  # a window without half a window before it knows less


def test_each_document_has_its_own_nats(llama: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    texts = ["".join(TALES), TALES[1], "Ə", TALES[0] * 3]  # windows of the longer ones stand apart
    found = score_texts(model, tokenizer, texts, 32, 3)
    nats, tokens = found.document_nats, found.document_tokens
    alone = [score_texts(model, tokenizer, [text], 32, 1) for text in texts]
    assert nats.tolist() == pytest.approx([one.nats for one in alone], rel=1e-5)
    assert tokens.tolist() == [one.num_tokens for one in alone]
    assert float(nats.sum()) == pytest.approx(found.nats, rel=1e-12)


@pytest.mark.parametrize(("positions", "lengths"), [(40, {40}), (512, {64, 128, 192})])
def test_measured_batches_have_few_lengths_and_no_more_positions_than_the_model(llama: Path, positions: int, lengths: set[int]) -> None:
    """A GPT-2 has a table of positions, which padding must not go beyond; what is measured is what it is without padding."""
    tokenizer = load_tokenizer(str(llama))
    config = GPT2Config(
        vocab_size=count_embedding_rows(tokenizer), n_positions=positions, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    seen: set[int] = set()
    hook = model.register_forward_pre_hook(lambda _, __, inputs: seen.add(inputs["input_ids"].shape[1]), with_kwargs=True)
    texts = [TALES[0] * count for count in (1, 2, 3)]
    padded = score_texts(model, tokenizer, texts, 500, batch_size=1)
    hook.remove()
    assert seen <= lengths
    nats = 0.0
    for text in texts:
        for window in split_windows(encode_texts(tokenizer, [text])[0], tokenizer.bos_token_id, min(positions, 500)):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([window.ids])).logits[0].log_softmax(-1)
            nats -= float(sum(logits[at - 1, window.ids[at]] for at in range(window.num_context, len(window.ids))))
    assert padded.nats == pytest.approx(nats, rel=1e-5)
