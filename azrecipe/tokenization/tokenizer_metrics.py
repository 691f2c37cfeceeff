"""How a tokenizer is judged: counts for each held-out document, and measures from their sums.

Every measure is defined, with its source, in docs/metrics.md.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, repeat
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import regex

from azrecipe.tokenization.encoding import encode_texts, load_backend, write_backend_file
from azrecipe.tokenization.tokenizer import count_embedding_rows, get_token_bytes, is_byte_level_bpe
from azrecipe.utils.bootstrap import NUM_RESAMPLES, RESAMPLES_PER_BLOCK, FloatArray, IntArray, Resampling, round_significant
from azrecipe.utils.process_pool import WorkerPool, chunk_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENYI_ALPHA = 2.5  # order of the Rényi entropy, as Zouhar et al. (2023) choose it
MAX_TIMED_BYTES = 4_000_000  # bytes of text that the encoding speed is measured on at most

WORD_PATTERN = re.compile(r"\S+")  # exactly what str.split() gives
LETTER_WORD_PATTERN = regex.compile(r"\p{L}[\p{L}\p{M}]*(?:['’ʼʻ‘][\p{L}\p{M}]+)*")  # a word of letters and marks, apostrophes inside


@dataclass(frozen=True)
class HeldOutSet:
    """A held-out set: its documents, and for each the group that is resampled as one."""

    texts: list[str]
    groups: list[str]


@dataclass(frozen=True)
class TokenCounts:
    """A tokenizer on a set of documents; all arrays [documents] but the last three.

    `whole_words` and `letter_words` count words of letters, `continued_words` and `words` what white space separates.
    `partial` counts tokens that are part of a character (of a byte-level BPE) or unknown (of another tokenizer).
    `seen_*` [distinct tokens of each document]: the document, the token and how often it stands there.
    """

    tokens: IntArray
    words: IntArray
    bytes: IntArray
    characters: IntArray
    letter_words: IntArray
    whole_words: IntArray
    continued_words: IntArray
    changed: IntArray
    partial: IntArray
    seen_document: IntArray
    seen_token: IntArray
    seen_times: IntArray


SUMMED_FIELDS = ("tokens", "words", "bytes", "characters", "letter_words", "whole_words", "continued_words", "changed")


def count_tokens(workers: WorkerPool, tokenizer: PreTrainedTokenizerBase, sets: Mapping[str, Sequence[str]]) -> dict[str, TokenCounts]:
    """Cut each set's documents, as plain text without special tokens, and count."""
    partial = _partial(tokenizer)
    with write_backend_file(tokenizer) as file:
        return {name: _put_together(list(workers.map_chunks(_count, (file,), chunk_texts(texts))), partial) for name, texts in sets.items()}


def _put_together(rows: Sequence[Mapping[str, IntArray]], partial: IntArray) -> TokenCounts:
    sums: dict[str, IntArray] = {name: np.concatenate([row[name] for row in rows]) for name in SUMMED_FIELDS}
    starts = np.cumsum([0, *(len(row["tokens"]) for row in rows)])
    document = np.concatenate([row["document"] + start for row, start in zip(rows, starts[:-1], strict=True)])
    token, times = (np.concatenate([row[name] for row in rows]) for name in ("token", "times"))
    parts = np.bincount(document, times * partial[token], minlength=len(sums["tokens"])).astype(np.int64)
    return TokenCounts(**sums, partial=parts, seen_document=document, seen_token=token, seen_times=times)


def _count(file: str, texts: Sequence[str]) -> dict[str, IntArray]:
    backend = load_backend(file)
    backend.encode_special_tokens = True
    encodings = backend.encode_batch(list(texts), add_special_tokens=False)
    back = backend.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
    sums = np.zeros((len(SUMMED_FIELDS), len(texts)), dtype=np.int64)
    seen = []
    for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        words, letters = _pieces(WORD_PATTERN, text, spans), _pieces(LETTER_WORD_PATTERN, text, spans)
        sums[:, i] = (
            len(spans), len(words), len(text.encode()), len(text),
            len(letters), np.count_nonzero(letters == 1), np.count_nonzero(words > 1), back[i] != text,
        )  # fmt: skip
        tokens, times = np.unique(np.array(encoding.ids, dtype=np.int64), return_counts=True)
        seen.append((np.full(len(tokens), i), tokens, times))
    found = {name: sums[row] for row, name in enumerate(SUMMED_FIELDS)}
    return found | {name: np.concatenate([part[k] for part in seen]) for k, name in enumerate(("document", "token", "times"))}


def _pieces(pattern: re.Pattern[str] | regex.Pattern[str], text: str, spans: IntArray) -> IntArray:
    """For each match of a pattern: how many tokens stand on it. `spans` [tokens, 2] are their characters, in order."""
    words = np.array([match.span() for match in pattern.finditer(text)], dtype=np.int64).reshape(-1, 2)
    found: IntArray = np.searchsorted(spans[:, 0], words[:, 1], "left") - np.searchsorted(spans[:, 1], words[:, 0], "right")
    return found


def _partial(tokenizer: PreTrainedTokenizerBase) -> IntArray:
    """For each id, 1 if the token is no whole number of characters; for a tokenizer that is not byte-level, if it is unknown."""
    vocabulary = tokenizer.get_vocab()
    flags = np.zeros(count_embedding_rows(tokenizer), dtype=np.int64)
    if is_byte_level_bpe(tokenizer):
        for token, i in vocabulary.items():
            try:
                get_token_bytes(token).decode()
            except UnicodeDecodeError:
                flags[i] = 1
    elif tokenizer.unk_token_id is not None:
        flags[tokenizer.unk_token_id] = 1
    return flags


def compute_metrics(counts: TokenCounts, baseline: TokenCounts, vocab_size: int, window: int, resampling: Resampling) -> dict[str, Any]:
    """Every measure of a tokenizer on one set, each {"value", "interval"}; `window` in tokens."""
    c, ratio = counts, resampling.summarize_ratio
    return {
        "fertility": ratio(c.tokens, c.words),
        "bytes_per_token": ratio(c.bytes, c.tokens),
        "characters_per_token": ratio(c.characters, c.tokens),
        "words_in_window": ratio(c.words, c.tokens, window),
        "strr": ratio(c.whole_words, c.letter_words),
        "continued_words": ratio(c.continued_words, c.words),
        "renyi_efficiency": _renyi(c, vocab_size, resampling),
        "partial_character_tokens": ratio(c.partial, c.tokens),
        "tokens_vs_baseline": ratio(c.tokens, baseline.tokens),
    }


def _renyi(counts: TokenCounts, vocab_size: int, resampling: Resampling) -> dict[str, Any]:
    """H_α / log |V| of the distribution of tokens (Zouhar et al. 2023, arXiv 2306.16842), α = ALPHA."""
    import torch

    tokens, row = np.unique(counts.seen_token, return_inverse=True)
    where = torch.from_numpy(np.stack([row, resampling.document_units[counts.seen_document]]))
    times = torch.from_numpy(counts.seen_times.astype(np.float64))
    table = torch.sparse_coo_tensor(where, times, (len(tokens), resampling.num_units), check_invariants=False).coalesce()

    def efficiency(drawn: npt.NDArray[Any]) -> FloatArray:
        times = torch.sparse.mm(table, torch.from_numpy(drawn.T.astype(np.float64)))
        shares = times / times.sum(0)
        found: FloatArray = (shares.pow(RENYI_ALPHA).sum(0).log() / (1 - RENYI_ALPHA) / np.log(vocab_size)).numpy()
        return found

    value = float(efficiency(np.ones((1, resampling.num_units)))[0])
    blocks = (
        [efficiency(resampling.draw_counts[i : i + RESAMPLES_PER_BLOCK]) for i in range(0, NUM_RESAMPLES, RESAMPLES_PER_BLOCK)]
        if resampling.num_units > 1
        else []
    )
    return resampling.summarize_value(value, np.concatenate(blocks) if blocks else np.zeros(0))


def compute_parity(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], resampling: Resampling) -> dict[str, Any]:
    """Tokens of the language's side over tokens of the English side of parallel text (Petrov et al. 2023, arXiv 2305.15425)."""
    ours, english = (np.array([len(ids) for ids in encode_texts(tokenizer, [pair[side] for pair in pairs])]) for side in (0, 1))
    return resampling.summarize_ratio(ours, english)


def count_unused_tokens(tokenizer: PreTrainedTokenizerBase, counts: Mapping[str, TokenCounts]) -> dict[str, Any]:
    """Tokens of BPE's own vocabulary that no held-out text is cut into."""
    outside = set(tokenizer.added_tokens_decoder)
    inside = {i for i in tokenizer.get_vocab().values() if i not in outside}
    used = {int(i) for c in counts.values() for i in np.unique(c.seen_token)}
    unused = len(inside - used)
    return {"value": unused, "share": round_significant(unused / len(inside))}


def measure_speed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Any]:
    """Encoding, best of three passes over the first TIMED bytes, all threads: tokens/s and bytes/s."""
    sample: list[str] = []
    size = 0
    for text in texts:
        if size >= MAX_TIMED_BYTES:
            break
        sample.append(text)
        size += len(text.encode())
    times, tokens = [], 0
    for _ in repeat(None, 3):
        began = time.perf_counter()
        tokens = sum(len(ids) for ids in encode_texts(tokenizer, sample))
        times.append(time.perf_counter() - began)
    return {"tokens_per_second": round(tokens / min(times)), "bytes_per_second": round(size / min(times)), "measured_on_bytes": size}


def split_word(tokenizer: PreTrainedTokenizerBase, word: str) -> list[list[str]]:
    """A word's tokens as it is cut after a space, in a list for each piece that the pre-tokenizer makes.

    Bytes that are part of a character are shown as ‹C9›.
    """
    encoding = tokenizer.backend_tokenizer.encode(f" {word}", add_special_tokens=False)
    if is_byte_level_bpe(tokenizer):
        tokens = [_readable(get_token_bytes(token)) for token in encoding.tokens]
    else:
        tokens = [f" {word}"[a:b] for a, b in encoding.offsets]
    tokens = [tokens[0].removeprefix(" "), *tokens[1:]] if tokens else []
    pieces = [
        [token for _, token in group if token] for _, group in groupby(zip(encoding.word_ids, tokens, strict=True), lambda pair: pair[0])
    ]
    return [piece for piece in pieces if piece]


def _readable(spelled: bytes) -> str:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "".join(f"‹{byte:02X}›" for byte in spelled)
