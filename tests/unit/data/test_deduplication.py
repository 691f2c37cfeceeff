"""Near duplicates, repetition, and cutting by parts, each against the plain definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from azrecipe.data.cleaning_report import CleaningReport
from azrecipe.data.deduplication import NO_DOCUMENT, choose_bands, compute_signatures, find_near_duplicates
from azrecipe.data.quality_filters import QualityFilter, find_repetitions
from azrecipe.recipe.types import Deduplication, Filters
from azrecipe.tokenization.bpe_training import train_llama3
from azrecipe.tokenization.fast_encoding import FastEncoder
from azrecipe.tokenization.tokenizer import load_tokenizer
from tests.conftest import TALES

ASKED = Deduplication("minhash", 0.8, 3, 128)


def text(seed: int, count: int = 300) -> list[str]:
    random = np.random.Generator(np.random.PCG64(seed))
    return [f"w{n}" for n in random.integers(0, 10**6, count)]


def changed(words: list[str], share: float) -> list[str]:
    """The words with every 1/share-th replaced: each breaks three 3-grams."""
    return [f"new{i}" if i % round(1 / share) == 0 else word for i, word in enumerate(words)] if share else words


def jaccard(a: list[str], b: list[str]) -> float:
    sets = [{tuple(words[i : i + 3]) for i in range(len(words) - 2)} for words in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_duplicates_are_those_at_the_threshold_and_held_out_ones_drop_but_stay() -> None:
    base = text(1)
    likes = {share: changed(base, share) for share in (0.0, 0.01, 0.02, 0.1, 0.5)}
    documents = [text(9), base, *likes.values(), text(2), text(9)]
    rows = compute_signatures([" ".join(words) for words in documents], ASKED)
    assert rows.shape == (9, 128)
    like, by_held = find_near_duplicates(rows, 1, 0.8)
    wanted = [jaccard(base, words) >= 0.8 for words in documents]
    assert [jaccard(base, words) for words in likes.values()] == sorted((jaccard(base, w) for w in likes.values()), reverse=True)
    assert (like != NO_DOCUMENT).tolist() == [False, False, *wanted[2:7], False, False]
    assert by_held.tolist() == [False] * 8 + [True]
    assert all(like[i] < i for i in range(9))


def test_signatures_do_not_depend_on_the_batch_and_estimate_the_jaccard_index() -> None:
    a = text(3)
    b = changed(a, 0.05)
    both = compute_signatures([" ".join(a), " ".join(b)], ASKED)
    assert np.array_equal(both[1:], compute_signatures([" ".join(b)], ASKED))
    assert (both[0] == both[1]).mean() == pytest.approx(jaccard(a, b), abs=0.13)  # three standard errors


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.95])
def test_bands_find_what_is_at_the_threshold(threshold: float) -> None:
    count, rows = choose_bands(128, threshold)
    assert count * rows <= 128
    assert 1 - (1 - threshold**rows) ** count >= 0.99


SENTENCES = " ".join(f"word{n} follows{n} word{n + 1}." for n in range(60))


@pytest.mark.parametrize(
    ("spam", "reason"),
    [
        (SENTENCES, None),
        (TALES[0] + TALES[1] + TALES[2], None),
        ("\n".join(["the same line of it"] * 5 + SENTENCES.split(". ")[:6]), "duplicate lines"),
        ("\n\n".join(["one paragraph"] * 4 + [SENTENCES[:300], SENTENCES[300:700]]), "duplicate paragraphs"),
        (" ".join(f"buy now {n}" for n in range(40)), "characters in the most frequent 2-gram"),
        (SENTENCES[:600] + " " + SENTENCES[:600], "characters in duplicate 5-grams"),
    ],
)
def test_repetition_is_found_by_gophers_limits(spam: str, reason: str | None) -> None:
    assert (reason in [name for name, _ in find_repetitions(spam)]) if reason else not list(find_repetitions(spam))
    tally = CleaningReport()
    assert QualityFilter(Filters(repetition=True))(spam, tally) is (reason is None)
    assert tally.filtered == {"repetition": int(reason is not None)}


def test_a_tally_of_parts_is_the_tally_of_the_whole_and_packs() -> None:
    texts = [f"{n} " * n for n in range(1, 40)]
    keep = QualityFilter(Filters(min_characters=30, repetition=True))
    whole, parts = CleaningReport(), [CleaningReport(), CleaningReport()]
    for n, given_text in enumerate(texts):
        assert keep(given_text, whole) == keep(given_text, parts[n > 17])
    parts[0].merge(parts[1])
    assert parts[0].to_dict() == whole.to_dict() == CleaningReport.from_state(whole.to_state()).to_dict()
    assert whole.filtered["min_characters"] and whole.filtered["repetition"]


@pytest.fixture(scope="module")
def cutter() -> tuple[FastEncoder, FastEncoder]:
    """The same tokenizer by parts, and as a whole."""
    backend = train_llama3([tale * 20 for tale in TALES], 400).backend_tokenizer
    by_parts, whole = FastEncoder(backend), FastEncoder(backend)
    whole.by_parts = False
    assert by_parts.by_parts
    return by_parts, whole


PIECES = st.sampled_from(
    [
        *" \n\t\r'’.,!-—\"(1٣²½ſİıəﬁ😀\u00a0\u0301\u200c\x1c\x85\u2028",
        "  ",
        "'s",
        "'ll",
        "\r\n",
        "söz",
        "Кənd",
        "بيت",
        "漢字",
        "ab",
        "<|eot_id|>",
    ]
)


@settings(max_examples=400, deadline=None)
@given(given_text=st.one_of(st.text(max_size=60), st.lists(PIECES, max_size=30).map("".join)))
def test_text_cut_by_parts_has_the_ids_of_the_whole_text(cutter: tuple[FastEncoder, FastEncoder], given_text: str) -> None:
    texts = [given_text, f"{given_text} {given_text}", f"x {given_text}"]
    by_parts, whole = ([ids.tolist() for ids in one(texts)] for one in cutter)
    assert by_parts == whole


def test_a_tokenizer_that_splits_in_another_way_is_given_whole_texts(llama: Path) -> None:
    backend = load_tokenizer(str(llama)).backend_tokenizer
    assert FastEncoder(backend).by_parts
    backend.add_tokens(["Kənddə bir"])
    assert not FastEncoder(backend).by_parts


def test_what_was_forgotten_is_cut_again_alike(cutter: tuple[FastEncoder, FastEncoder], monkeypatch: pytest.MonkeyPatch) -> None:
    from azrecipe.tokenization import fast_encoding

    monkeypatch.setattr(fast_encoding, "MAX_CACHED_PARTS", 8)
    monkeypatch.setattr(fast_encoding, "MAX_CACHED_CHARACTERS", 6)
    by_parts, whole = cutter
    for turn in range(4):
        texts = [f"{tale} evlərimizdəkilər, ev. {turn}\n \n" for tale in TALES]
        assert [ids.tolist() for ids in by_parts(texts)] == [ids.tolist() for ids in whole(texts)]
        assert len(by_parts.words) + len(by_parts.parts) < 200
        assert not any(len(word) > 6 for word in (*by_parts.words, *by_parts.parts))
