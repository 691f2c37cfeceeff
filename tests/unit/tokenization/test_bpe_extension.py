"""A longer vocabulary: old ids and boundaries are kept, and merges are those that plain BPE training would find."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from azrecipe.errors import CannotRun
from azrecipe.tokenization.bpe_extension import extend_to_sizes, extend_tokenizer
from azrecipe.tokenization.bpe_training import LLAMA3_SPECIALS, train_llama3
from azrecipe.tokenization.encoding import encode_texts
from azrecipe.tokenization.tokenizer import load_tokenizer, save_tokenizer
from tests.conftest import TALES

ENGLISH = [TALES[0] * 5, TALES[2] * 5, "The cat had a mill; the fox had three stones. " * 3]
AZERBAIJANI = [TALES[1] * 5, TALES[3] * 5, "Uşaqlar səhər çayın qırağına gedərdilər, qoca isə bağa qayıdardı. " * 3]
OTHERS = ["Ағаш, су. Әже көлге барды 🙂 \n\n  12345 don't", "  \tǝə İ ı 👩‍👩‍👧 Azərbaycan'da", "aaaa aaa aaaaaaa aab abb", "", " "]
BASES = ("merges", "whole", "like_llama3")
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def _base(kind: str) -> Any:
    """train_llama3's; or with whole words looked up first; or so with special tokens after the model's vocabulary, as in Llama 3."""
    trained = train_llama3(ENGLISH, 300)
    description = json.loads(trained.backend_tokenizer.to_str())
    model, specials = description["model"], description["added_tokens"]
    model["ignore_merges"] = kind != "merges"
    if kind == "like_llama3":
        tokens = [token for token in sorted(model["vocab"], key=model["vocab"].get) if token not in LLAMA3_SPECIALS]
        tokens += ["ĠsÉĻhÉĻr", "qa", "mice", "qab"]  # no merge spells the first three
        model["merges"].append(["qa", "b"])
        model["vocab"] = {token: i for i, token in enumerate(tokens)}
        for i, token in enumerate(specials):
            token["id"] = len(tokens) + i
        description["post_processor"]["special_tokens"][LLAMA3_SPECIALS[0]]["ids"] = [len(tokens)]
    names = dict(zip(("bos_token", "eos_token", "pad_token"), LLAMA3_SPECIALS, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)), chat_template=TEMPLATE, clean_up_tokenization_spaces=False, **names
    )


@pytest.fixture(scope="module", params=BASES)
def base(request: pytest.FixtureRequest) -> Any:
    return _base(request.param)


@pytest.fixture(scope="module")
def long(base: Any) -> Any:
    return extend_tokenizer(base, AZERBAIJANI, 90)


def _model(tokenizer: Any) -> Any:
    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]


def _boundaries(tokenizer: Any, ids: Sequence[int]) -> set[int]:
    """Where tokens end, in bytes: a character of a token's spelling stands for one."""
    return set(accumulate(len(token) for token in tokenizer.convert_ids_to_tokens(ids)))


def _ids(tokenizer: Any, text: str) -> list[list[int]]:
    """A text's ids with special tokens in it read as text, and as tokens."""
    return [*encode_texts(tokenizer, [text]), tokenizer(text, add_special_tokens=False).input_ids]


WORDS = [*" ".join([*AZERBAIJANI, *ENGLISH, *OTHERS]).split(), " ", "  ", "\n", "🙂", "<|eot_id|>", "<|", "'da"]
TEXTS = st.one_of(
    st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join),
    st.lists(st.sampled_from(WORDS), max_size=12).map("".join),
    st.text(alphabet="aəAƏdr ığşәқжэя'’🙂\n1", max_size=40),
    st.text(max_size=30),
)


@settings(max_examples=300, deadline=None)
@given(text=TEXTS)
def test_new_tokens_join_old_ones_and_nothing_is_lost(base: Any, long: Any, text: str) -> None:
    for old, new in zip(_ids(base, text), _ids(long.tokenizer, text), strict=True):
        assert _boundaries(long.tokenizer, new) <= _boundaries(base, old)
        assert long.tokenizer.decode(new) == text


def test_it_learns_the_language(base: Any, long: Any) -> None:
    assert long.added == 90 <= long.merges
    assert sum(map(len, encode_texts(long.tokenizer, AZERBAIJANI))) < 0.4 * sum(map(len, encode_texts(base, AZERBAIJANI)))


def test_old_tokens_and_all_else_stay_as_they_are(base: Any, tmp_path: Path) -> None:
    before = base.backend_tokenizer.to_str()
    long = extend_tokenizer(base, AZERBAIJANI, 90)
    assert base.backend_tokenizer.to_str() == before
    save_tokenizer(long.tokenizer, tmp_path)
    for tokenizer in (long.tokenizer, load_tokenizer(str(tmp_path))):
        vocabulary = tokenizer.get_vocab()
        assert len(tokenizer) == len(base) + 90
        assert sorted(vocabulary.values()) == list(range(len(base) + 90))
        assert {token: i for token, i in vocabulary.items() if i < len(base)} == base.get_vocab()
        assert {i: str(token) for i, token in tokenizer.added_tokens_decoder.items()} == {
            i: str(token) for i, token in base.added_tokens_decoder.items()
        }
        for name in ("bos_token_id", "eos_token_id", "pad_token_id", "chat_template"):
            assert getattr(tokenizer, name) == getattr(base, name)
        text = "<|start_header_id|>qoca<|end_header_id|>\n\n<|eot_id|>"
        specials = [i for i in base(text).input_ids if i in base.added_tokens_decoder]
        assert [i for i in tokenizer(text).input_ids if i in base.added_tokens_decoder] == specials
        new, old = json.loads(tokenizer.backend_tokenizer.to_str()), json.loads(before)
        assert all(new[part] == old[part] for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "added_tokens"))
        assert new["model"]["merges"][: len(old["model"]["merges"])] == old["model"]["merges"]
        assert new["model"]["ignore_merges"] == old["model"]["ignore_merges"]


def test_protected_text_keeps_every_id(base: Any, long: Any) -> None:
    protected = [*ENGLISH, *OTHERS, "qoca <|eot_id|>mice", "bağ"]
    free = long.tokenizer
    assert encode_texts(free, protected) != encode_texts(base, protected)
    guarded = extend_tokenizer(base, AZERBAIJANI, 60, iter(protected))
    assert (guarded.added, long.dropped_for_protection) == (60, 0)
    assert guarded.dropped_for_protection > 0
    for text in protected:
        assert _ids(guarded.tokenizer, text) == _ids(base, text)


def test_each_new_token_is_used_or_part_of_another(base: Any, long: Any) -> None:
    used = {i for ids in encode_texts(long.tokenizer, AZERBAIJANI) for i in ids}
    new = {token for token, i in long.tokenizer.get_vocab().items() if i >= len(base)}
    unused = {token for token in new if long.tokenizer.get_vocab()[token] not in used}
    assert unused <= {part for pair in _model(long.tokenizer)["merges"] for part in pair}
    assert len(unused) == long.unused


def test_a_smaller_extension_begins_a_larger_one(base: Any) -> None:
    sizes = [60, 0, 25, 10_000, 25]
    several = extend_to_sizes(base, AZERBAIJANI, sizes, ENGLISH[:1])
    assert several[2] is several[4]
    assert several[3].added < 10_000
    for size, one in zip(sizes, several, strict=True):
        alone = extend_tokenizer(base, (text for text in AZERBAIJANI), size, ENGLISH[:1])
        assert alone.tokenizer.backend_tokenizer.to_str() == one.tokenizer.backend_tokenizer.to_str()
        assert (alone.added, alone.merges, alone.unused) == (one.added, one.merges, one.unused)
        assert alone.dropped_for_protection == one.dropped_for_protection
    tokens = [one.tokenizer.get_vocab() for one in several]
    assert tokens[1].items() <= tokens[2].items() <= tokens[0].items() <= tokens[3].items()


def test_it_ends_where_no_pair_stands_twice(base: Any) -> None:
    everything = extend_tokenizer(base, ["bağda ağac", "bağda"], 1000)
    assert everything.added < 1000
    assert len(encode_texts(everything.tokenizer, ["bağda"])[0]) == 1
    assert len(encode_texts(everything.tokenizer, [" ağac"])[0]) > 1


def test_special_tokens_in_the_texts_take_no_part(base: Any) -> None:
    plain = extend_tokenizer(base, ["qoca bağa"] * 3, 5)
    spelled = extend_tokenizer(base, ["<|eot_id|>qoca bağa<|begin_of_text|><|eot_id|>"] * 3, 5)
    assert spelled.tokenizer.get_vocab() == plain.tokenizer.get_vocab()


def test_special_tokens_spelled_out_in_protected_text_are_protected_as_text_too(base: Any) -> None:
    texts, protected = ["neot <<|| eot_id <|eo"] * 3, "qoca<|eot_id|>"
    free, guarded = extend_tokenizer(base, texts, 12).tokenizer, extend_tokenizer(base, texts, 4, [protected]).tokenizer
    assert encode_texts(free, [protected]) != encode_texts(base, [protected])
    assert _ids(guarded, protected) == _ids(base, protected)


def _reference(base: Any, texts: list[str], new_tokens: int, protect: list[str]) -> tuple[dict[str, int], list[Any], set[Any]]:
    """The same by brute force: each step cuts every word anew with the library's own BPE and tries its candidates out."""
    model = _model(base)
    vocab, merges = model["vocab"] | {str(t): i for i, t in base.added_tokens_decoder.items()}, list(map(tuple, model["merges"]))
    start, refused = len(vocab), set()

    def words(texts: list[str]) -> Counter[str]:
        return Counter(piece for text in texts for piece, _ in base.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text))

    def cut(words: Counter[str], vocab: Any, merges: Any) -> dict[str, list[str]]:
        bpe = models.BPE(vocab=vocab, merges=merges, ignore_merges=model["ignore_merges"])
        return {word: [token.value for token in bpe.tokenize(word)] for word in words}

    corpus, protected = words(texts), words(protect)
    before = cut(protected, vocab, merges)
    while len(vocab) < start + new_tokens:
        counts: Counter[Any] = Counter()
        for word, tokens in cut(corpus, vocab, merges).items():
            for pair in pairwise(tokens):
                counts[pair] += corpus[word]
        for pair in sorted(counts, key=lambda p: (-counts[p], vocab[p[0]], vocab[p[1]])):
            if counts[pair] < 2:
                return vocab, merges, refused
            if pair in refused:
                continue
            more = vocab | ({} if "".join(pair) in vocab else {"".join(pair): len(vocab)})
            if cut(protected, more, [*merges, pair]) == before:
                vocab, merges = more, [*merges, pair]
                break
            refused.add(pair)
        else:
            break
    return vocab, merges, refused


def _compare(base: Any, texts: list[str], new_tokens: int, protect: list[str]) -> Any:
    found = extend_tokenizer(base, texts, new_tokens, protect)
    vocab, merges, refused = _reference(base, texts, new_tokens, protect)
    assert found.tokenizer.get_vocab() == vocab
    assert list(map(tuple, _model(found.tokenizer)["merges"])) == merges
    assert found.merges == len(merges) - len(_model(base)["merges"])
    assert found.dropped_for_protection == len(refused)
    return found


def test_it_equals_brute_force(base: Any) -> None:
    _compare(base, AZERBAIJANI, 60, [])
    _compare(base, AZERBAIJANI + OTHERS, 40, ENGLISH)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    texts=st.lists(st.text(alphabet="aəqms  thce", max_size=60), max_size=4),
    protect=st.lists(st.text(alphabet="aəqms  thce", max_size=8), max_size=2),
)
def test_it_equals_brute_force_on_text_full_of_ties(base: Any, texts: list[str], protect: list[str]) -> None:
    _compare(base, texts, 25, protect)


def test_a_merge_may_spell_a_token_that_is_there() -> None:
    base = _base("like_llama3")
    found = _compare(base, ["qaqa qaç səhər qaçdı isəhər mice micedə xqabdı"] * 3, 40, [])
    assert found.merges > found.added


def test_a_merge_that_spells_an_old_token_sets_off_old_merges() -> None:
    base = _base("like_llama3")
    found = _compare(base, ["xqab yqab qac"] * 3, 1, [])
    assert (found.added, found.merges) == (1, 2)
    assert "qab" in found.tokenizer.tokenize("zqab")


def test_tokenizers_that_cannot_be_continued_are_refused_in_words() -> None:
    words = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(CannotRun, match="not a byte-level BPE"):
        extend_tokenizer(PreTrainedTokenizerFast(tokenizer_object=words), ["a"], 1)
    base = _base("merges")
    base.backend_tokenizer.model.dropout = 0.1
    with pytest.raises(CannotRun, match=r"dropout 0\.1"):
        extend_tokenizer(base, ["a"], 1)
    base = _base("like_llama3")
    base.add_special_tokens({"additional_special_tokens": ["PAD"]})
    with pytest.raises(CannotRun, match="'PAD', which plain text could then spell"):
        extend_tokenizer(base, ["a"], 1)


def test_an_added_word_is_not_spelled_by_merges() -> None:
    base = _base("whole")
    base.add_tokens([AddedToken("gq", single_word=True)])  # inside a longer word it is not seen
    i = base.convert_tokens_to_ids("gq")
    found = extend_tokenizer(base, ["gq gqa", "vgqv"] * 3, 30)
    assert found.tokenizer.convert_tokens_to_ids("gq") == i == len(base) - 1
    assert ["g", "q"] not in _model(found.tokenizer)["merges"]
