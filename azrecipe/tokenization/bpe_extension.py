"""Extend the vocabulary of a byte-level BPE, with every old id kept."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from tokenizers import Tokenizer

from azrecipe.errors import CannotRun
from azrecipe.tokenization.bpe_training import MIN_PAIR_COUNT, replace_backend
from azrecipe.tokenization.encoding import encode_batch, load_backend, write_backend_file
from azrecipe.tokenization.tokenizer import is_byte_level_bpe
from azrecipe.utils.process_pool import WorkerPool, chunk_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


TokenPair = tuple[int, int]


@dataclass(frozen=True)
class BpeExtension:
    """A base tokenizer with new tokens above its own.

    Attributes:
        tokenizer: The extended tokenizer.
        added: The number of new ids.
        merges: The number of new merges; more than `added` where some spell a token of the base.
        dropped_for_protection: The pairs that were the most frequent but occur in protected text, and so are no merges.
        unused: The new tokens that the texts are never split into; each is part of a merge.
    """

    tokenizer: PreTrainedTokenizerBase
    added: int
    merges: int
    dropped_for_protection: int
    unused: int


def extend_tokenizer(base: PreTrainedTokenizerBase, texts: Iterable[str], new_tokens: int, protect: Iterable[str] = ()) -> BpeExtension:
    """Extend a tokenizer by continuing the training of its BPE.

    In continued BPE (Purason et al., arXiv 2512.03989) the base splits the texts, then the most frequent pair of adjacent
    tokens becomes a merge, again and again, until there are enough new tokens or no pair occurs twice. Old merges come first
    in rank and know no new token, so the new tokenizer splits any text where the base does, or less often. Old tokens,
    special ones too, keep their ids; new ids follow the highest. Special tokens spelled out in the texts take no part.

    Both iterables are read once and may be larger than memory; their distinct pre-tokens may not.

    Args:
        base: The tokenizer to extend.
        texts: The texts to learn from.
        new_tokens: How many new tokens to learn.
        protect: Texts that keep their ids exactly, whether special tokens spelled out in them are read as such or as text.

    Raises:
        CannotRun: The base is not a plain byte-level BPE, or its class does not load as it was saved.
    """
    return extend_to_sizes(base, texts, [new_tokens], protect)[0]


def extend_to_sizes(
    base: PreTrainedTokenizerBase, texts: Iterable[str], sizes: Sequence[int], protect: Iterable[str] = ()
) -> list[BpeExtension]:
    """Extend a tokenizer to several sizes with one training.

    A smaller extension is the beginning of a larger one.

    Args:
        base: The tokenizer to extend.
        texts: The texts to learn from.
        sizes: The numbers of new tokens.
        protect: Texts that keep their ids; see `extend_tokenizer`.

    Returns:
        An extension for each size.

    Raises:
        CannotRun: As `extend_tokenizer`.
    """
    vocabulary, guard = _MergeTable(_read_description(base)), _ProtectedPairs()
    guard.add(_count_pre_tokens(base, protect, (False, True)))
    training = _Training(vocabulary, guard)
    training.read(_count_pre_tokens(base, texts, (False,)))
    extensions = {}
    for size in sorted(set(sizes)):
        training.learn(size)
        tokenizer = _build_extended(base, vocabulary)
        extensions[size] = BpeExtension(tokenizer, vocabulary.added, len(vocabulary.new), len(guard.dropped), training.count_unused())
    return [extensions[size] for size in sizes]


def _read_description(base: PreTrainedTokenizerBase) -> Any:
    """Read a base's tokenizer.json, with added tokens in the model's vocabulary.

    Without that, the library assigns an added token an id after the highest of the model, and ignores the file.

    Raises:
        CannotRun: The base cannot be extended.
    """
    if not is_byte_level_bpe(base):
        raise CannotRun("the tokenizer to extend is not a byte-level BPE (as Llama 3's is): it has no merges to continue")
    description = json.loads(base.backend_tokenizer.to_str())
    model = description["model"]
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model[option]:
            raise CannotRun(f"the tokenizer to extend has {option} {model[option]!r}: its merges cannot be continued exactly")
    for token in description["added_tokens"]:
        name = token["content"]
        if token["special"] and model["ignore_merges"] and name not in model["vocab"] and _is_whole(base, name):
            raise CannotRun(f"the tokenizer to extend has the special token {name!r}, which plain text could then spell")
        model["vocab"][name] = token["id"]
    return description


def _is_whole(base: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the pre-tokenizer leaves a text in one unchanged piece."""
    return [piece for piece, _ in base.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)] == [text]


def _count_pre_tokens(base: PreTrainedTokenizerBase, texts: Iterable[str], as_text: Sequence[bool]) -> Counter[bytes]:
    """Count the pre-tokens of texts.

    A pre-token is the base's ids for it, as bytes of uint32.

    Args:
        base: The tokenizer.
        texts: The texts.
        as_text: How special tokens in the texts are read, as text (True) or as tokens; the counts of all ways are added up.
    """
    counts: Counter[bytes] = Counter()
    with write_backend_file(base) as file, WorkerPool() as workers:
        for chunk_counts in workers.map_chunks(_count_chunk, (file, tuple(as_text)), chunk_texts(texts)):
            counts.update(chunk_counts)
    return counts


def _count_chunk(file: str, as_text: Sequence[bool], texts: list[str]) -> Counter[bytes]:
    counts: Counter[bytes] = Counter()
    backend = load_backend(file)
    for backend.encode_special_tokens in as_text:
        for encoding in encode_batch(backend, texts, with_offsets=True):
            ids = np.array(encoding.ids, dtype=np.uint32).tobytes()
            starts = np.flatnonzero(np.diff(np.array(encoding.word_ids, dtype=np.int64), prepend=-1)) * 4
            counts.update(ids[a:b] for a, b in pairwise([*starts.tolist(), len(ids)]))
    return counts


def _decode_ids(pre_token: bytes) -> list[int]:
    ids: list[int] = np.frombuffer(pre_token, dtype=np.uint32).tolist()
    return ids


class _MergeTable:
    """All tokens and merges, of the base and new ones.

    The new ones are above those of the base in rank and id.

    The rank of a merge is its position in the list.
    """

    def __init__(self, description: Any) -> None:
        self.ids: dict[str, int] = dict(description["model"]["vocab"])
        self.spelling = {i: token for token, i in self.ids.items()}
        self.first = max(self.spelling) + 1
        self.added = 0
        self.reserved = {token["content"] for token in description["added_tokens"]}
        self.old = len(description["model"]["merges"])
        self.ranks = {(self.ids[a], self.ids[b]): rank for rank, (a, b) in enumerate(description["model"]["merges"])}
        self.new: list[TokenPair] = []

    def spell(self, pair: TokenPair) -> str:
        return self.spelling[pair[0]] + self.spelling[pair[1]]

    def add(self, pair: TokenPair) -> int:
        """Append a merge, and return the id of its token.

        Only a new string gets a new id.
        """
        token = self.spell(pair)
        if token not in self.ids:
            self.ids[token] = self.first + self.added
            self.spelling[self.ids[token]] = token
            self.added += 1
        self.ranks[pair] = self.old + len(self.new)
        self.new.append(pair)
        return self.ids[token]

    def settle(self, symbols: list[int]) -> list[int]:
        """Apply merges until none applies, lowest rank first, then leftmost."""
        while True:
            first = min(((self.ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in self.ranks), default=None)
            if first is None:
                return symbols
            i = first[1]
            symbols = [*symbols[:i], self.ids[self.spell((symbols[i], symbols[i + 1]))], *symbols[i + 2 :]]


@dataclass
class _ProtectedPairs:
    """The pairs that cannot become merges because a protected text would change.

    New merges come after those of the base, so one applies to a word only if its pair occurs where the base has split the
    word. That holds with `ignore_merges` too, where a word that is a token becomes the token at once: merges that produce a
    string somewhere in a text produce it from the string alone as well, so some new merge applies to the word first.
    """

    pairs: set[TokenPair] = field(default_factory=set)
    dropped: set[TokenPair] = field(default_factory=set)

    def add(self, pre_tokens: Iterable[bytes]) -> None:
        for pre_token in pre_tokens:
            self.pairs.update(pairwise(_decode_ids(pre_token)))

    def refuses(self, pair: TokenPair) -> bool:
        """Whether a merge would change protected text; then it counts as dropped."""
        if pair in self.pairs:
            self.dropped.add(pair)
        return pair in self.pairs


class _Training:
    """The words of the corpus, as tokens, during the training.

    After every merge each word is split exactly as a tokenizer with the merges so far splits it. So a new token that no word
    has any more is part of another merge.

    Attributes:
        words: The tokens of each word.
        counts: How often each word occurs.
        pairs: How often each pair of adjacent tokens occurs.
        words_of_pair: The words that a pair occurs in, and some that it no longer occurs in.
        heap: (-count, pair) for each pair, and entries with outdated counts.
    """

    def __init__(self, vocabulary: _MergeTable, guard: _ProtectedPairs) -> None:
        self.vocabulary, self.guard = vocabulary, guard
        self.words: list[list[int]] = []
        self.counts: list[int] = []
        self.pairs: Counter[TokenPair] = Counter()
        self.words_of_pair: defaultdict[TokenPair, set[int]] = defaultdict(set)
        self.heap: list[tuple[int, TokenPair]] = []

    def read(self, pre_tokens: Counter[bytes]) -> None:
        """Read the words.

        Words of one token, as special ones, have nothing to merge.
        """
        for pre_token, count in pre_tokens.items():
            symbols = _decode_ids(pre_token)
            if len(symbols) == 1:
                continue
            for pair in pairwise(symbols):
                self.pairs[pair] += count
                self.words_of_pair[pair].add(len(self.words))
            self.words.append(symbols)
            self.counts.append(count)
        self.heap = [(-count, pair) for pair, count in self.pairs.items()]
        heapify(self.heap)

    def learn(self, new_tokens: int) -> None:
        """Add merges until there are `new_tokens` or no pairs."""
        while self.vocabulary.added < new_tokens and (pair := self._pop_best_pair()) is not None:
            added = self.vocabulary.added
            token = self.vocabulary.add(pair)
            self._apply(pair, token, fresh=self.vocabulary.added > added)

    def count_unused(self) -> int:
        """Count the new tokens that no word has."""
        used = {i for symbols in self.words for i in symbols if i >= self.vocabulary.first}
        return self.vocabulary.added - len(used)

    def _pop_best_pair(self) -> TokenPair | None:
        """Pop the most frequent pair that can become a merge.

        Of equally frequent pairs, the one with the lowest ids comes first.
        """
        while self.heap:
            entry, pair = heappop(self.heap)
            count = self.pairs[pair]
            if count < MIN_PAIR_COUNT:
                continue
            if count != -entry:
                heappush(self.heap, (-count, pair))
                continue
            if self.vocabulary.spell(pair) not in self.vocabulary.reserved and not self.guard.refuses(pair):
                return pair
        return None

    def _apply(self, pair: TokenPair, token: int, fresh: bool) -> None:
        """Apply a new merge to the words.

        No merge uses a fresh token yet. An old token can trigger merges of lower rank, so then the word is settled.
        """
        change: Counter[TokenPair] = Counter()
        for word in self.words_of_pair.pop(pair):
            if pair in pairwise(self.words[word]):
                before = self.words[word]
                self._replace_word(word, _merge_pair(before, pair, token) if fresh else self.vocabulary.settle(before), change)
        for changed, difference in change.items():
            self.pairs[changed] += difference
            if difference > 0:
                heappush(self.heap, (-self.pairs[changed], changed))

    def _replace_word(self, word: int, symbols: list[int], change: Counter[TokenPair]) -> None:
        count = self.counts[word]
        for pair in pairwise(self.words[word]):
            change[pair] -= count
        for pair in pairwise(symbols):
            change[pair] += count
            self.words_of_pair[pair].add(word)
        self.words[word] = symbols


def _merge_pair(symbols: list[int], pair: TokenPair, token: int) -> list[int]:
    """Replace a pair in a word by its token, left to right."""
    joined: list[int] = []
    i = 0
    while i < len(symbols):
        if symbols[i] == pair[0] and i + 1 < len(symbols) and symbols[i + 1] == pair[1]:
            joined.append(token)
            i += 2
        else:
            joined.append(symbols[i])
            i += 1
    return joined


def _build_extended(base: PreTrainedTokenizerBase, vocabulary: _MergeTable) -> PreTrainedTokenizerBase:
    """Copy the base with its settings, and add the new merges."""
    description = _read_description(base)
    description["model"]["vocab"] = vocabulary.ids
    description["model"]["merges"] += [(vocabulary.spelling[a], vocabulary.spelling[b]) for a, b in vocabulary.new]
    return replace_backend(base, Tokenizer.from_str(json.dumps(description)))
