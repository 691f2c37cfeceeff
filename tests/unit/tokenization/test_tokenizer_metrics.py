"""What a tokenizer comparison is made of: counts against slow ones, intervals, sweeps that equal trainings."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from azrecipe.data import tokenizer_corpus
from azrecipe.data.readers import DataSource
from azrecipe.errors import CannotRun
from azrecipe.modeling.loading import read_embedding_shape
from azrecipe.recipe.types import TextSource
from azrecipe.tokenization import bpe_extension, bpe_training, candidates, tokenizer, tokenizer_metrics
from azrecipe.tokenization.bpe_training import LLAMA3_SPECIALS, shorten_vocabulary, train_like, train_llama3
from azrecipe.tokenization.encoding import encode_texts
from azrecipe.tokenization.tokenizer import SPLIT_RULES, get_token_bytes, load_tokenizer, save_tokenizer
from azrecipe.utils import bootstrap
from azrecipe.utils.bootstrap import Resampling
from azrecipe.utils.process_pool import WorkerPool, chunk_texts
from tests.conftest import TALES, jsonl, write
from tests.small import environment
from tests.unit.utils.dying import dies

TEXTS = [
    TALES[0] * 3,
    TALES[1] * 4,
    TALES[3] * 2,
    "Azərbaycan'da 2024-cü il: Əli'mi gördün? " * 6,
    "İ ı Ə <|eot_id|> 12345 🙂",
    "bağ " * 30,
]


@pytest.fixture(scope="module")
def base() -> Any:
    return train_llama3(TEXTS[:2], 330)


def _hub_llama3(base: Any) -> Any:
    """As the hub has Llama 3's: the BOS template inside a sequence of post-processors; and one added token that is not special."""
    backend = Tokenizer.from_str(base.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    bos = LLAMA3_SPECIALS[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )
    backend.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=LLAMA3_SPECIALS[1], clean_up_tokenization_spaces=False
    )


def _sentencepiece() -> Any:
    """A tokenizer that is not byte-level, as Gemma's or Llama 2's."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "<s>"], unk_token="<unk>", show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", clean_up_tokenization_spaces=False)


def _count(tokenizer: Any, texts: list[str]) -> tokenizer_metrics.TokenCounts:
    with WorkerPool(1) as workers:
        return tokenizer_metrics.count_tokens(workers, tokenizer, {"a": texts})["a"]


def test_counts_equal_a_slow_count(base: Any) -> None:
    counts = _count(base, TEXTS)
    for i, text in enumerate(TEXTS):
        ids = encode_texts(base, [text])[0]
        spelled = [get_token_bytes(token) for token in base.convert_ids_to_tokens(ids)]
        assert counts.tokens[i] == len(ids)
        assert (counts.words[i], counts.bytes[i], counts.characters[i]) == (len(text.split()), len(text.encode()), len(text))
        ends, at, several = np.cumsum([len(piece) for piece in spelled]), 0, 0
        for word in text.split():
            start = text.encode().index(word.encode(), at)
            at = start + len(word.encode())
            several += sum(1 for end, piece in zip(ends, spelled, strict=True) if end > start and end - len(piece) < at) > 1
        assert counts.continued_words[i] == several
        seen = {int(t): int(n) for t, n, d in zip(counts.seen_token, counts.seen_times, counts.seen_document, strict=True) if d == i}
        assert seen == dict(Counter(ids))
    assert counts.changed.sum() == 0


def test_words_kept_whole_are_words_of_letters_that_are_one_token(base: Any) -> None:
    longer = train_like(base, ["bağ evdə " * 50], 360)
    counts = _count(longer, ["bağ evdə, (bağ) 12 çay!", "çay"])
    assert counts.letter_words.tolist() == [4, 1]
    assert counts.whole_words.tolist() == [3, 0]  # in (bağ) it is whole between its brackets
    assert counts.continued_words.tolist() == [4, 1]


def test_processes_do_what_one_process_does(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_metrics, "chunk_texts", lambda texts: chunk_texts(texts, 100))
    monkeypatch.setattr(bpe_extension, "chunk_texts", lambda texts: chunk_texts(texts, 100))
    monkeypatch.setattr(bpe_extension, "WorkerPool", lambda: WorkerPool(2, min_characters=200))
    with WorkerPool(2, min_characters=200) as workers:
        together = tokenizer_metrics.count_tokens(workers, base, {"a": TEXTS * 5})["a"]
        assert workers.pool is not None
    alone = _count(base, TEXTS * 5)
    for name in ("tokens", "whole_words", "seen_document", "seen_token", "seen_times", "partial"):
        assert getattr(alone, name).tolist() == getattr(together, name).tolist()
    cuts = bpe_extension._count_pre_tokens(base, iter(TEXTS * 5), (False, True))
    assert cuts == {cut: 5 * n for cut, n in bpe_extension._count_pre_tokens(base, TEXTS, (False, True)).items()}


def test_text_is_read_no_faster_than_it_is_worked_on() -> None:
    read = []

    def texts() -> Iterator[str]:
        for n in range(50):
            read.append(n)
            yield "x" * 10

    with WorkerPool(2, min_characters=0) as workers:
        results = workers.map_chunks(len, (), chunk_texts(texts(), 10))
        assert next(results) == 1
        assert len(read) <= 5
        assert sum(results) == 49


def test_a_process_that_is_killed_is_told_in_words() -> None:
    with WorkerPool(2, min_characters=0) as workers, pytest.raises(CannotRun, match="most likely there was no memory left"):
        list(workers.map_chunks(dies, (), chunk_texts(["x"] * 9, 1)))


def test_measures_are_quotients_of_sums_inside_their_intervals(base: Any) -> None:
    counts = _count(base, TEXTS)
    found = tokenizer_metrics.compute_metrics(counts, counts, len(base), 2048, Resampling([str(i) for i in range(len(TEXTS))], 7))
    tokens, words = counts.tokens.sum(), counts.words.sum()
    assert found["fertility"]["value"] == pytest.approx(tokens / words, rel=1e-4)
    assert found["words_in_window"]["value"] == pytest.approx(2048 * words / tokens, rel=1e-4)
    assert found["tokens_vs_baseline"] == {"value": 1.0, "interval": [1.0, 1.0]}
    shares = np.bincount(counts.seen_token, counts.seen_times) / tokens
    assert found["renyi_efficiency"]["value"] == pytest.approx(math.log((shares**2.5).sum()) / -1.5 / math.log(len(base)), rel=1e-4)
    for measure in found.values():
        assert measure["interval"][0] <= measure["value"] <= measure["interval"][1]
    assert found["fertility"]["interval"][0] < found["fertility"]["interval"][1]


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(3)
    hits = 0
    for trial in range(200):
        words = random.integers(50, 400, 60)
        tokens = np.round(words * random.normal(2.0, 0.3, 60)).astype(np.int64)
        low, high = Resampling([str(i) for i in range(60)], trial).summarize_ratio(tokens, words)["interval"]
        hits += low <= 2.0 <= high
    assert 180 <= hits <= 199


def test_documents_of_one_group_are_drawn_together() -> None:
    tokens, words = np.array([30, 30, 30, 10, 10, 10]), np.array([10] * 6)
    apart = Resampling(list("abcdef"), 1).summarize_ratio(tokens, words)["interval"]
    together = Resampling(list("aaabbb"), 1).summarize_ratio(tokens, words)["interval"]
    assert together == [1.0, 3.0]
    assert apart[1] - apart[0] < 2.0
    assert Resampling(list("aaaaaa"), 1).summarize_ratio(tokens, words) == {"value": 2.0, "interval": None}


def test_very_many_documents_are_drawn_in_blocks(base: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bootstrap, "MAX_UNITS", 3)
    drawn = Resampling(list("abcdef"), 1)
    assert (drawn.num_units, drawn.draw_counts.shape) == (3, (bootstrap.NUM_RESAMPLES, 3))
    assert drawn.document_units.tolist() == [0, 1, 2, 0, 1, 2]
    assert drawn.summarize_ratio(np.array([1, 2, 3, 3, 2, 1]), np.array([1] * 6)) == {"value": 2.0, "interval": [2.0, 2.0]}
    counts = _count(base, TEXTS)
    found = tokenizer_metrics.compute_metrics(counts, counts, len(base), 64, Resampling(list("abcdef"), 1))
    assert found["renyi_efficiency"]["interval"][0] <= found["renyi_efficiency"]["value"]


def test_words_are_what_python_splits() -> None:
    text = "a\x1cb\x1fc\u2028d\u00a0e\u200bf g"
    assert [match.group() for match in tokenizer_metrics.WORD_PATTERN.finditer(text)] == text.split()


def test_a_word_of_nothing_is_cut_into_nothing() -> None:
    assert tokenizer_metrics.split_word(_sentencepiece(), "") in ([], [["▁"]], [["_"]], [[" "]])


def test_ids_that_are_left_out_need_rows_too(base: Any) -> None:
    backend = json.loads(base.backend_tokenizer.to_str())
    backend["model"]["vocab"]["zz"] = 500
    gap = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)))
    assert (len(gap), tokenizer.count_embedding_rows(gap)) == (331, 501)


@pytest.mark.parametrize("config", ['{"model_type": "clip"}', "[]", '{"model_type": "llama", "vocab_size": "x"}', "{", None])
def test_a_tokenizer_beside_no_language_model_has_no_embeddings_to_count(base: Any, tmp_path: Any, config: str | None) -> None:
    base.save_pretrained(tmp_path)
    if config is not None:
        write(tmp_path / "config.json", config)
    assert read_embedding_shape(str(tmp_path)) is None


def test_a_long_text_is_read_in_parts_that_lose_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_corpus, "PORTION_CHARACTERS", 10)
    text = "one line\nanother\n" + "a" * 25 + "\nend"
    parts = list(tokenizer_corpus._split_portions(text))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= 10
    assert parts[0] == "one line\n"


def test_processes_end_when_their_parent_is_killed(tmp_path: Any) -> None:
    script = write(tmp_path / "parent.py", PARENT)
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment())
    assert parent.stdout is not None
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    assert workers
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(map(_alive, workers)):
        time.sleep(0.1)
    assert not any(map(_alive, workers))


PARENT = """
import os, time
from azrecipe.utils.process_pool import WorkerPool
def pid(chunk):
    time.sleep(0.2)
    return os.getpid()
if __name__ == "__main__":
    with WorkerPool(2, min_characters=0) as workers:
        print(*set(workers.map_chunks(pid, (), [["x"]] * 4)), flush=True)
        time.sleep(60)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_of_characters_are_counted_and_shown(base: Any) -> None:
    counts = _count(base, ["🙂"])
    assert counts.partial.tolist() == [4]
    assert tokenizer_metrics.split_word(base, "Ə") == [["‹C6›", "‹8F›"]] or tokenizer_metrics.split_word(base, "Ə") == [["Ə"]]
    assert tokenizer_metrics.split_word(base, "a🙂") == [["a"], ["‹F0›", "‹9F›", "‹99›", "‹82›"]]


@pytest.mark.parametrize("kind", ["merges", "like_the_hub"])
@pytest.mark.parametrize("pre_tokenizer", ["base", *SPLIT_RULES])
def test_a_smaller_vocabulary_is_what_training_it_gives(base: Any, kind: str, pre_tokenizer: str) -> None:
    base = _hub_llama3(base) if kind == "like_the_hub" else base
    longest = train_like(base, TEXTS, 380, pre_tokenizer)
    for size in (candidates.get_min_vocab_size(base), 300, 341, len(longest)):
        direct, cut = (
            json.loads(t.backend_tokenizer.to_str())
            for t in (train_like(base, TEXTS, size, pre_tokenizer), shorten_vocabulary(longest, size))
        )
        assert direct == cut
        assert len(shorten_vocabulary(longest, size)) == size


def test_special_and_added_tokens_keep_working_in_a_custom_tokenizer(base: Any, tmp_path: Any) -> None:
    hub = _hub_llama3(base)
    hub.chat_template = "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>{{ m.content }}<|eot_id|>{% endfor %}"
    save_tokenizer(train_like(hub, TEXTS, 340), tmp_path)
    custom = load_tokenizer(str(tmp_path))
    assert {t.content: t.special for t in custom.added_tokens_decoder.values()} == {
        t.content: t.special for t in hub.added_tokens_decoder.values()
    }
    ids = custom("bağ")["input_ids"]
    assert ids[0] == custom.bos_token_id == custom.convert_tokens_to_ids(LLAMA3_SPECIALS[0])
    assert max(ids) < len(custom)
    chat = custom.apply_chat_template([{"role": "user", "content": "bağ <tool>"}], tokenize=False)
    cut = custom.convert_ids_to_tokens(custom(chat, add_special_tokens=False)["input_ids"])
    assert [t for t in cut if t.startswith("<")] == ["<|start_header_id|>", "<|end_header_id|>", "<tool>", "<|eot_id|>"]


@pytest.mark.parametrize(("pre_tokenizer", "pieces"), [
    ("llama3", ["Azərbaycan", "'d", "a"]),
    ("split_apostrophe_suffixes", ["Azərbaycan", "'da"]),
    ("keep_apostrophe_suffixes", ["Azərbaycan'da"]),
])  # fmt: skip
def test_a_pre_tokenizer_decides_where_a_suffix_is_cut(base: Any, pre_tokenizer: str, pieces: list[str]) -> None:
    trained = train_like(base, ["Azərbaycan'da " * 40, *TEXTS], 420, pre_tokenizer)
    assert ["".join(piece) for piece in tokenizer_metrics.split_word(trained, "Azərbaycan'da")] == pieces
    assert tokenizer_metrics.split_word(trained, "Azərbaycan'da")[0] == [pieces[0]]
    for text in [*TEXTS, "don't  \n\n o'qidi oʻzbek ’da", "e\u0301 \u0301 हिन्दी 1234567"]:
        assert trained.decode(encode_texts(trained, [text])[0]) == text


def test_combining_marks_stay_in_their_word() -> None:
    cut = bpe_training.build_byte_level_splitter(SPLIT_RULES["split_apostrophe_suffixes"]).pre_tokenize_str("ka\u0301ra")
    assert len(cut) == 1


def test_a_base_that_is_not_byte_level_still_gives_custom_tokenizers(tmp_path: Any) -> None:
    other = _sentencepiece()
    with pytest.raises(CannotRun, match="keep_apostrophe_suffixes"):
        train_like(other, TEXTS, 330)
    trained = train_like(other, TEXTS, 330, "llama3")
    save_tokenizer(trained, tmp_path)
    opened = load_tokenizer(str(tmp_path))
    assert opened.bos_token == "<s>"
    assert opened.decode(encode_texts(opened, [TEXTS[3]])[0]) == TEXTS[3]
    counts = _count(other, ["Bağ ☂ ev", "ev"])
    assert counts.partial.tolist() == [sum(encode_texts(other, ["Bağ ☂ ev"])[0].count(i) for i in [other.unk_token_id]), 0]


def test_special_tokens_in_the_text_are_cut_out_and_counted(base: Any, tmp_path: Any) -> None:
    file = write(tmp_path / "t.jsonl", jsonl({"text": "bağ <|eot_id|>ev<|eot_id|> " * 20}, {"text": "ev bağ " * 5}))
    source = DataSource(TextSource(str(file), "train"), None)  # type: ignore[arg-type]
    text = tokenizer_corpus.TokenizerCorpus([source], None, frozenset(), tokenizer.list_added_tokens(base))
    pieces = list(text)
    assert text.to_dict()["special_tokens_in_text"] == 40
    assert not any("eot" in piece for piece in pieces)
    learned = set(train_like(base, text, 400).get_vocab()) - set(base.get_vocab())
    assert learned
    assert not any("eot" in token or "|" in token for token in learned)


def test_a_pair_that_stands_there_once_is_not_learned(base: Any) -> None:
    assert len(train_like(base, ["abcdefgh"], 400)) == candidates.get_min_vocab_size(base) - 1
