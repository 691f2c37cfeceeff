"""Measure tokenizers: counts for each document, and metrics from their sums.

Every metric is defined, with its source, in docs/metrics.md.
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

from azrecipe.tokenization.encoding import encode_batch, encode_texts, load_backend, write_backend_file
from azrecipe.tokenization.tokenizer import count_embedding_rows, get_token_bytes, is_byte_level_bpe
from azrecipe.utils.bootstrap import NUM_RESAMPLES, RESAMPLES_PER_BLOCK, FloatArray, IntArray, Resampling, round_significant
from azrecipe.utils.process_pool import WorkerPool, chunk_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENYI_ALPHA = 2.5  # order of the Rényi entropy, as Zouhar et al. (2023) choose it
MAX_TIMED_BYTES = 4_000_000  # the most text that the encoding speed is measured on

WORD_PATTERN = re.compile(r"\S+")  # exactly what str.split() gives
LETTER_WORD_PATTERN = regex.compile(r"\p{L}[\p{L}\p{M}]*(?:['’ʼʻ‘][\p{L}\p{M}]+)*")  # a word of letters and marks, apostrophes inside


@dataclass(frozen=True)
class HeldOutSet:
    """The documents of a held-out set, and the group of each.

    A group is resampled as one.
    """

    texts: list[str]
    groups: list[str]


@dataclass(frozen=True)
class TokenCounts:
    """The counts of a tokenizer on documents.

    All arrays are [documents], except the last three.

    Attributes:
        tokens: The tokens.
        words: The words, separated by white space.
        bytes: The bytes of UTF-8 text.
        characters: The characters.
        letter_words: The words of letters.
        whole_words: The words of letters that are one token.
        continued_words: The words, separated by white space, of several tokens.
        changed: Whether decoding changes the document.
        partial: The tokens that are part of a character (of a byte-level BPE) or unknown (of another tokenizer).
        seen_document: The document, for each distinct token of each document, [distinct tokens].
        seen_token: The token, [distinct tokens].
        seen_times: How often it occurs in the document, [distinct tokens].
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
    """Encode each set's documents as plain text, and count."""
    partial = _flag_partial_tokens(tokenizer)
    with write_backend_file(tokenizer) as file:
        return {
            name: _concatenate(list(workers.map_chunks(_count_chunk, (file,), chunk_texts(texts))), partial) for name, texts in sets.items()
        }


def _concatenate(rows: Sequence[Mapping[str, IntArray]], partial: IntArray) -> TokenCounts:
    sums: dict[str, IntArray] = {name: np.concatenate([row[name] for row in rows]) for name in SUMMED_FIELDS}
    starts = np.cumsum([0, *(len(row["tokens"]) for row in rows)])
    document = np.concatenate([row["document"] + start for row, start in zip(rows, starts[:-1], strict=True)])
    token, times = (np.concatenate([row[name] for row in rows]) for name in ("token", "times"))
    parts = np.bincount(document, times * partial[token], minlength=len(sums["tokens"])).astype(np.int64)
    return TokenCounts(**sums, partial=parts, seen_document=document, seen_token=token, seen_times=times)


def _count_chunk(file: str, texts: Sequence[str]) -> dict[str, IntArray]:
    backend = load_backend(file)
    backend.encode_special_tokens = True
    encodings = encode_batch(backend, texts, with_offsets=True)
    decoded = backend.decode_batch([encoding.ids for encoding in encodings], skip_special_tokens=False)
    sums = np.zeros((len(SUMMED_FIELDS), len(texts)), dtype=np.int64)
    distinct_tokens = []
    for i, (text, encoding) in enumerate(zip(texts, encodings, strict=True)):
        spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        words, letters = _count_match_tokens(WORD_PATTERN, text, spans), _count_match_tokens(LETTER_WORD_PATTERN, text, spans)
        sums[:, i] = (
            len(spans), len(words), len(text.encode()), len(text),
            len(letters), np.count_nonzero(letters == 1), np.count_nonzero(words > 1), decoded[i] != text,
        )  # fmt: skip
        tokens, times = np.unique(np.array(encoding.ids, dtype=np.int64), return_counts=True)
        distinct_tokens.append((np.full(len(tokens), i), tokens, times))
    counts = {name: sums[row] for row, name in enumerate(SUMMED_FIELDS)}
    return counts | {name: np.concatenate([part[k] for part in distinct_tokens]) for k, name in enumerate(("document", "token", "times"))}


def _count_match_tokens(pattern: re.Pattern[str] | regex.Pattern[str], text: str, spans: IntArray) -> IntArray:
    """Count the tokens of each match of a pattern, [matches].

    Args:
        pattern: The pattern.
        text: The text.
        spans: The characters of each token, in order, [tokens, 2].
    """
    words = np.array([match.span() for match in pattern.finditer(text)], dtype=np.int64).reshape(-1, 2)
    counts: IntArray = np.searchsorted(spans[:, 0], words[:, 1], "left") - np.searchsorted(spans[:, 1], words[:, 0], "right")
    return counts


def _flag_partial_tokens(tokenizer: PreTrainedTokenizerBase) -> IntArray:
    """Flag the ids of partial characters with 1, [ids].

    For a tokenizer that is not byte-level it is the id of unknown text.
    """
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
    """Compute every metric of a tokenizer on one set, each {"value", "interval"}.

    Args:
        counts: The counts of the tokenizer.
        baseline: The counts of the baseline on the same documents.
        vocab_size: The size of the vocabulary.
        window: A context window, in tokens.
        resampling: The bootstrap of the documents.
    """
    ratio = resampling.summarize_ratio
    return {
        "fertility": ratio(counts.tokens, counts.words),
        "bytes_per_token": ratio(counts.bytes, counts.tokens),
        "characters_per_token": ratio(counts.characters, counts.tokens),
        "words_in_window": ratio(counts.words, counts.tokens, window),
        "strr": ratio(counts.whole_words, counts.letter_words),
        "continued_words": ratio(counts.continued_words, counts.words),
        "renyi_efficiency": _compute_renyi_efficiency(counts, vocab_size, resampling),
        "partial_character_tokens": ratio(counts.partial, counts.tokens),
        "tokens_vs_baseline": ratio(counts.tokens, baseline.tokens),
    }


def _compute_renyi_efficiency(counts: TokenCounts, vocab_size: int, resampling: Resampling) -> dict[str, Any]:
    """Compute H_α / log |V| of the tokens, α = RENYI_ALPHA.

    Zouhar et al. 2023, arXiv 2306.16842.
    """
    import torch

    tokens, row = np.unique(counts.seen_token, return_inverse=True)
    indices = torch.from_numpy(np.stack([row, resampling.document_units[counts.seen_document]]))
    times = torch.from_numpy(counts.seen_times.astype(np.float64))
    table = torch.sparse_coo_tensor(indices, times, (len(tokens), resampling.num_units), check_invariants=False).coalesce()

    def efficiency(drawn: npt.NDArray[Any]) -> FloatArray:
        times = torch.sparse.mm(table, torch.from_numpy(drawn.T.astype(np.float64)))
        shares = times / times.sum(0)
        efficiencies: FloatArray = (shares.pow(RENYI_ALPHA).sum(0).log() / (1 - RENYI_ALPHA) / np.log(vocab_size)).numpy()
        return efficiencies

    value = float(efficiency(np.ones((1, resampling.num_units)))[0])
    blocks = (
        [efficiency(resampling.draw_counts[i : i + RESAMPLES_PER_BLOCK]) for i in range(0, NUM_RESAMPLES, RESAMPLES_PER_BLOCK)]
        if resampling.num_units > 1
        else []
    )
    return resampling.summarize_value(value, np.concatenate(blocks) if blocks else np.zeros(0))


def compute_parity(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], resampling: Resampling) -> dict[str, Any]:
    """Compute the tokens of parallel text over those of its English side.

    Petrov et al. 2023, arXiv 2305.15425. A pair is the text and its English translation.
    """
    tokens, english_tokens = (np.array([len(ids) for ids in encode_texts(tokenizer, [pair[side] for pair in pairs])]) for side in (0, 1))
    return resampling.summarize_ratio(tokens, english_tokens)


def count_unused_tokens(tokenizer: PreTrainedTokenizerBase, counts: Mapping[str, TokenCounts]) -> dict[str, Any]:
    """Count the tokens of the BPE vocabulary that no held-out text has."""
    added = set(tokenizer.added_tokens_decoder)
    vocabulary = {i for i in tokenizer.get_vocab().values() if i not in added}
    used = {int(i) for set_counts in counts.values() for i in np.unique(set_counts.seen_token)}
    unused = len(vocabulary - used)
    return {"value": unused, "share": round_significant(unused / len(vocabulary))}


def measure_speed(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Any]:
    """Measure the encoding speed with all threads, best of three passes.

    The sample is the first MAX_TIMED_BYTES of the texts.
    """
    sample: list[str] = []
    size = 0
    for text in texts:
        if size >= MAX_TIMED_BYTES:
            break
        sample.append(text)
        size += len(text.encode())
    times, tokens = [], 0
    for _ in repeat(None, 3):
        start = time.perf_counter()
        tokens = sum(len(ids) for ids in encode_texts(tokenizer, sample))
        times.append(time.perf_counter() - start)
    return {"tokens_per_second": round(tokens / min(times)), "bytes_per_second": round(size / min(times)), "measured_on_bytes": size}


def split_word(tokenizer: PreTrainedTokenizerBase, word: str) -> list[list[str]]:
    """Split a word after a space into tokens.

    Returns a list for each pre-token.

    Bytes that are part of a character are shown as ‹C9›.
    """
    encoding = tokenizer.backend_tokenizer.encode(f" {word}", add_special_tokens=False)
    if is_byte_level_bpe(tokenizer):
        tokens = [_format_bytes(get_token_bytes(token)) for token in encoding.tokens]
    else:
        tokens = [f" {word}"[a:b] for a, b in encoding.offsets]
    tokens = [tokens[0].removeprefix(" "), *tokens[1:]] if tokens else []
    pieces = [
        [token for _, token in group if token] for _, group in groupby(zip(encoding.word_ids, tokens, strict=True), lambda pair: pair[0])
    ]
    return [piece for piece in pieces if piece]


def _format_bytes(spelled: bytes) -> str:
    try:
        return spelled.decode()
    except UnicodeDecodeError:
        return "".join(f"‹{byte:02X}›" for byte in spelled)
