"""Sequences: what stands in them, that no document sees another in any attention, and that the counts of tokens are those of text."""

from __future__ import annotations

import gzip
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import AttentionInterface, AttentionMaskInterface, Trainer, TrainingArguments
from transformers.masking_utils import flash_attention_mask

from azrecipe.data import best_fit_packing
from azrecipe.data.best_fit_packing import BestFitLayout, pack_best_fit
from azrecipe.data.mixture import Mixture
from azrecipe.data.packing import Collator, DocumentDelimiters, PackedText, Packing, build_collator, build_layout
from azrecipe.data.phase_schedule import OutOfText, PhaseSchedule, plan_phases
from azrecipe.data.token_store import TokenStore
from azrecipe.evaluation.bits_per_byte import score_texts
from azrecipe.modeling.attention import attend_varlen
from azrecipe.modeling.loading import load_model
from azrecipe.recipe.types import Phase
from azrecipe.tokenization.bpe_training import train_llama3
from azrecipe.tokenization.encoding import IGNORE_INDEX, encode_texts
from azrecipe.tokenization.tokenizer import load_tokenizer
from tests.conftest import ROOT, TALES
from tests.unit.data.test_mixture import stored

PAD = 3
lengths = st.lists(st.integers(1, 40), min_size=1, max_size=40)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tensors this small are soonest computed by one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def how(strategy: str, max_length: int) -> Packing:
    return Packing(strategy, max_length, DocumentDelimiters(bos=1, eos=2), PAD)


def text(mix: Mixture, strategy: str, max_length: int, count: int, start: int = 0) -> PackedText:
    return PackedText(build_layout(mix, how(strategy, max_length), start), how(strategy, max_length), 0, count)


def planned(mix: Mixture, strategy: str, *phases: Phase, start: int = 0) -> PhaseSchedule:
    """Phases in steps of 4 sequences of 16 tokens."""
    return plan_phases(build_layout(mix, how(strategy, 16), start), how(strategy, 16), phases, 4)


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 30), max_size=80))
def test_best_fit_overfills_nothing_and_opens_a_bin_only_where_none_has_room(sizes: list[int]) -> None:
    bins = pack_best_fit(np.asarray(sizes, np.int64), 30)
    used = np.bincount(bins, sizes)
    assert used.max(initial=0) <= 30
    assert (used > 0).all()
    room: list[int] = []  # the definition, the slow way
    for nth in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        fitting_bins = [(free, at) for at, free in enumerate(room) if free >= sizes[nth]]
        assert bins[nth] == (min(fitting_bins)[1] if fitting_bins else len(room))
        if not fitting_bins:
            room.append(30)
        room[bins[nth]] -= sizes[nth]


@settings(max_examples=25, deadline=None)
@given(a=lengths, b=lengths, seed=st.integers(0, 3), strategy=st.sampled_from(["bfd", "unpacked"]))
def test_every_token_is_read_once_and_no_document_is_cut_that_fits(a: list[int], b: list[int], seed: int, strategy: str) -> None:
    mix = Mixture([stored(a, 100), stored(b, 10_000)], [2, 1], seed, 2, [2.0, 1.0])
    sequences = build_layout(mix, how(strategy, 16))
    packed = text(mix, strategy, 16, sequences.count_available(10**6))
    read: dict[tuple[int, int], list[tuple[int, int]]] = {}
    stream: list[int] = []
    for i in range(len(packed)):
        here = packed[i]
        at = 0
        for source, document, first, tokens in packed.list_documents(i):
            whole = [1, *mix.stores[source].read_document(document), 2]
            assert here["input_ids"][at : at + tokens].tolist() == whole[first : first + tokens]
            assert here["position_ids"][at : at + tokens].tolist() == list(range(tokens))
            assert here["labels"][at : at + tokens].tolist() == [IGNORE_INDEX, *whole[first + 1 : first + tokens]]
            assert tokens == min(16, len(whole) - first)  # only what is longer than a sequence is cut, at full length
            read.setdefault((source, document), []).append((first, tokens))
            stream += whole[first : first + tokens]
            at += tokens
        assert here["input_ids"][at:].tolist() == [PAD] * (len(here["input_ids"]) - at)
        assert (here["labels"][at:] == IGNORE_INDEX).all()
        assert here["position_ids"][at:].tolist() == list(range(len(here["input_ids"]) - at))
        assert len(here["input_ids"]) == (16 if strategy == "bfd" else at)
    order = mix.build_order()
    assert len(stream) == order.tokens == packed.count_tokens(len(packed))
    assert order.bytes == packed.count_bytes(len(packed))
    for (source, document), parts in read.items():
        times = 2 if source == 0 else 1
        assert set(Counter(parts).values()) == {times}
        assert sum(tokens for _, tokens in parts) == times * (len(mix.stores[source].read_document(document)) + 2)
    assert mix.count_epochs(order, *sequences.find_started_documents(len(packed))) == [2.0, 1.0]


def test_sequences_are_found_by_their_number_in_any_process_and_do_not_depend_on_what_was_asked_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(best_fit_packing, "WINDOW_SEQUENCES", 4)
    monkeypatch.setattr(best_fit_packing, "MIN_CACHED_WINDOWS", 2)
    generator = np.random.default_rng(1)
    stores = [stored(generator.integers(1, 40, 60).tolist(), 100), stored(generator.integers(1, 9, 60).tolist(), 10_000)]

    def fresh(cache: Path | None) -> PackedText:
        mix = Mixture(stores, [2, 1], 5, 2)
        return PackedText(BestFitLayout(mix, 16, True, 0, cache), how("bfd", 16), 0, 300)

    forward = fresh(tmp_path)
    all_of_it = [forward[i] for i in range(300)]
    assert len(list(tmp_path.glob("sequences-*.json"))) == 1
    for other in (fresh(tmp_path), fresh(None)):
        assert all(equal(other[i], all_of_it[i]) for i in reversed(range(300)))
        assert [other.count_bytes(n) for n in (0, 7, 300)] == [forward.count_bytes(n) for n in (0, 7, 300)]
    moved = PackedText(BestFitLayout(Mixture(stores, [2, 1], 5, 2), 16, True, 120), how("bfd", 16), 0, 50)
    assert all(equal(moved[i], all_of_it[120 + i]) for i in range(50))
    loaded = DataLoader(fresh(None), batch_size=3, num_workers=2, collate_fn=Collator(PAD), multiprocessing_context="fork")
    plain = DataLoader(fresh(None), batch_size=3, collate_fn=Collator(PAD))
    assert all(equal(a, b) for a, b in zip(loaded, plain, strict=True))


def test_a_window_is_not_sorted_by_length_and_keeps_to_its_place_in_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(best_fit_packing, "WINDOW_SEQUENCES", 64)
    sizes = np.random.default_rng(2).integers(1, 60, 4000).tolist()
    mix = Mixture([stored(sizes, 100)], [1], 1, 2)
    sequences = BestFitLayout(mix, 64, True)
    longest = [max(piece.num_tokens for piece in sequences.find_spans(i)) for i in range(64)]
    assert abs(np.corrcoef(longest, np.arange(64))[0, 1]) < 0.4
    for window in range(5):
        here = np.asarray([piece.index for i in range(64 * window, 64 * window + 60) for piece in sequences.find_spans(i)])
        there = mix.build_order().find_document(0, 64 * 64 * window)
        assert abs(here - there).max() < 2.5 * 64 * 64 / np.mean(sizes)


@pytest.fixture(scope="module")
def azerbaijani() -> TokenStore:
    """Real documents, in the tokens of a tokenizer of their own."""
    file = ROOT.parent / "shared" / "data" / "az_docs.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no real text: {file} is not there")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    ids = encode_texts(train_llama3(texts[:300], 2000), texts)
    offsets = np.cumsum([0, *map(len, ids)])
    stream = np.concatenate([np.asarray(i, np.uint32) for i in ids])
    return TokenStore("az", stream, offsets, np.asarray([len(t.encode()) for t in texts]), 0)


@pytest.mark.parametrize("max_length", [512, 2048])
def test_real_text_fills_the_sequences(azerbaijani: TokenStore, max_length: int) -> None:
    mix = Mixture([azerbaijani], [1], 1, 2)
    sequences = BestFitLayout(mix, max_length, True)
    sequences.count_available(3 * mix.epoch_tokens // max_length)
    assert len(sequences.window_counts) >= 4
    for (_, before, tokens_before, _), (_, count, tokens, _) in itertools.pairwise(sequences.window_counts):
        assert (tokens - tokens_before) / ((count - before) * max_length) >= 0.995


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("strategy", ["wrapped", "bfd", "unpacked"])
def test_a_document_has_the_logits_that_it_has_alone(llama: Path, strategy: str, attention: str) -> None:
    model = load_model(str(llama), "float32", attention)
    model.config.use_cache = False
    mix = Mixture([stored([7, 9, 12, 5, 3, 14, 41], 10)], [1], seed=3, specials_per_document=2)
    packed = text(mix, strategy, 30, 3)
    for training in (True, False):
        model.train(training)
        batch = Collator(PAD)([packed[i] for i in range(3)])
        with torch.no_grad():
            rows = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
        for i in range(3):
            at = 0
            for _, _, _, tokens in packed.list_documents(i):
                with torch.no_grad():
                    alone = model(input_ids=packed[i]["input_ids"][None, at : at + tokens]).logits[0]
                assert torch.allclose(rows[i][at : at + tokens], alone, atol=1e-5, rtol=0)
                at += tokens


def test_the_two_settings_that_let_documents_see_each_other_do_so_and_are_never_used(llama: Path, tmp_path: Path) -> None:
    model, tokenizer = load_model(str(llama), "float32"), load_tokenizer(str(llama))
    packed = text(Mixture([stored([7, 9, 12, 5, 3, 14], 10)], [1], seed=3, specials_per_document=2), "bfd", 30, 8)
    batch = Collator(PAD)([packed[0]])
    inside = {key: batch[key] for key in ("input_ids", "position_ids")}
    with torch.no_grad():
        apart = model.eval()(**inside, use_cache=False).logits
        cached = model(**inside).logits
        masked = model(**inside, use_cache=False, attention_mask=torch.ones_like(batch["input_ids"])).logits
    assert (cached - apart).abs().max() > 1e-3  # if these two fail, transformers has closed the leak
    assert (masked - apart).abs().max() > 1e-3

    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda _, args, given: calls.append(given), with_kwargs=True)
    arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True)
    Trainer(model, arguments, train_dataset=packed, data_collator=Collator(PAD)).train()
    assert not model.config.use_cache
    score_texts(model, tokenizer, [TALES[0]], 64, 2)
    assert len(calls) == 2
    assert all(given.get("attention_mask") is None and not given.get("use_cache") for given in calls)
    assert "position_ids" in calls[0]


@pytest.mark.parametrize("strategy", ["wrapped", "bfd", "unpacked"])
def test_flash_attention_is_given_the_borders_of_the_documents(llama: Path, tmp_path: Path, strategy: str) -> None:
    """Each layer's attention gets them from the host, so that none waits for the GPU; the kernel itself needs a GPU."""
    calls: list[dict[str, Any]] = []

    def record(*args: Any, **more: Any) -> Any:
        calls.append(more | {"mask": args[4]})
        return attend_varlen(*args, **more)

    AttentionInterface.register("recording", record)
    AttentionMaskInterface.register("recording", flash_attention_mask)  # what transformers takes for flash attention
    packed = text(Mixture([stored([7, 9, 12, 5, 3, 14, 41, 1], 10)], [1], seed=3, specials_per_document=2), strategy, 30, 4)
    collate = build_collator(how(strategy, 30), "flash_attention_2")
    arguments = TrainingArguments(str(tmp_path), max_steps=1, per_device_train_batch_size=4, report_to="none", use_cpu=True, train_sampling_strategy="sequential")  # fmt: skip
    losses = {}
    for attention, collator in (("recording", collate), ("sdpa", Collator(PAD))):
        model = load_model(str(llama), "float32", attention)
        trainer = Trainer(model, arguments, train_dataset=packed, data_collator=collator)
        trainer.train()
        losses[attention] = trainer.state.log_history[-1]["train_loss"]
    length = max(len(packed[i]["input_ids"]) for i in range(4))
    wanted = {4 * length}
    for i in range(4):
        begin = i * length
        for _, _, _, tokens in packed.list_documents(i):
            wanted.add(begin)
            begin += tokens
        wanted |= {begin} if strategy == "bfd" else set()  # what is padded there is a document by itself
    assert len(calls) == model.config.num_hidden_layers
    for call in calls:
        assert call["mask"] is None
        assert call["cu_seq_lens_q"] is call["cu_seq_lens_k"]
        assert call["cu_seq_lens_q"].tolist() == sorted(wanted)
        assert call["cu_seq_lens_q"].dtype == torch.int32
        assert type(call["max_length_q"]) is type(call["max_length_k"]) is int
        assert call["max_length_q"] == call["max_length_k"] == length
    assert losses["recording"] == pytest.approx(losses["sdpa"], abs=1e-6)


@pytest.mark.parametrize("strategy", ["wrapped", "bfd", "unpacked"])
def test_a_sequence_may_be_as_long_as_the_longest_context(strategy: str) -> None:
    length = 131_072
    mix = Mixture([stored([200_000, 90_000, 41_000, 60, 8], 10)], [1], seed=3, specials_per_document=2)
    packed = text(mix, strategy, length, 3)
    for i in range(3):
        sequence, tokens = packed[i], [piece[3] for piece in packed.list_documents(i)]
        positions = np.concatenate([np.arange(n) for n in [*tokens, len(sequence["input_ids"]) - sum(tokens)]])
        assert np.array_equal(sequence["position_ids"].numpy(), positions)
        assert positions.max() < length
        assert len(positions) == (length if strategy != "unpacked" else tokens[0])
    batch = Collator(PAD)([packed[i] for i in range(3)])
    assert int(batch["position_ids"].max()) < length


@pytest.mark.parametrize("strategy", ["wrapped", "bfd", "unpacked"])
@pytest.mark.parametrize("length", [{"max_steps": 7}, {"max_tokens": 700}, {"max_bytes": 1500}, {"num_train_epochs": 1.5}])
def test_a_phase_has_the_text_that_it_asks_for_and_the_next_goes_on_behind_it(strategy: str, length: dict[str, int]) -> None:
    sizes = np.random.default_rng(4).integers(1, 50, 40).tolist()
    mix = Mixture([stored(sizes, 100), stored([4] * 9, 10_000)], [2, 1], 1, 2)
    one, two = Phase("one", ["all"], 1e-3, **length), Phase("two", ["all"], 1e-3, max_steps=3)  # type: ignore[arg-type]
    both = planned(mix, strategy, one, two)
    steps, data = both.phases[0].steps, both.build_dataset(0)
    asked = {"max_tokens": (700, 0), "max_bytes": (0, 1500), "num_train_epochs": (0, 1.5 * mix.epoch_bytes)}.get(*length, (0, 0))
    if "max_steps" not in length:
        assert data.count_tokens(steps * 4) >= asked[0] and data.count_bytes(steps * 4) >= asked[1]
        assert data.count_tokens(steps * 4 - 4) < asked[0] or data.count_bytes(steps * 4 - 4) < asked[1]
    shown = sum(int((data[i]["input_ids"] != PAD).sum()) for i in range(len(data)))  # no document has the token PAD
    assert data.count_tokens(len(data)) == shown
    assert both.measure_fill(0) == shown / (len(data) * 16)
    assert both.num_tokens == data.count_tokens(len(data)) + both.build_dataset(1).count_tokens(12)
    alone = planned(mix, strategy, one)
    further = planned(Mixture(mix.stores, [2, 1], 1, 2), strategy, two, start=alone.end.start)
    assert all(equal(further.build_dataset(0)[i], both.build_dataset(1)[i]) for i in range(12))
    assert further.end.start == both.end.start
    assert further.end.fingerprint == both.end.fingerprint == both.layout.fingerprint
    assert further.source_epochs == both.source_epochs


def test_sequences_of_other_ways_to_pack_are_known_apart() -> None:
    def name(strategy: str, max_length: int) -> str:
        return build_layout(Mixture([stored([5, 6], 10)], [1], 1, 2), how(strategy, max_length)).fingerprint

    names = [name(s, n) for s, n in (("wrapped", 16), ("bfd", 16), ("unpacked", 16), ("bfd", 32))]
    assert len(set(names)) == 4
    assert name("wrapped", 32) == names[0]  # counts tokens: a run may go on with longer sequences


@pytest.mark.parametrize("strategy", ["bfd", "unpacked"])
def test_a_packed_phase_may_end_with_the_text_and_not_ask_for_more(strategy: str) -> None:
    def once() -> Mixture:
        return Mixture([stored([5] * 90, 100)], [1], 1, 2, [1.0])

    there = build_layout(once(), how(strategy, 16)).count_available(10**6)
    assert there == (45 if strategy == "bfd" else 90)
    whole = planned(once(), strategy, Phase("one", ["all"], 1e-3, num_train_epochs=1))
    assert whole.phases[0].steps == there // 4
    for length in ({"max_steps": 23}, {"max_tokens": 90 * 7 + 60}):
        with pytest.raises(OutOfText, match="are left"):
            planned(once(), strategy, Phase("one", ["all"], 1e-3, **length))  # type: ignore[arg-type]
