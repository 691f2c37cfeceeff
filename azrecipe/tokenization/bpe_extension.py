"""Longer vocabularies: how a byte-level BPE learns merges for a language on top of its own, every old id kept."""

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
from azrecipe.tokenization.bpe_training import LEAST, with_backend
from azrecipe.tokenization.encoding import on_disk, reader
from azrecipe.tokenization.tokenizer import is_byte_level_bpe
from azrecipe.utils.process_pool import Workers, chunked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Pair = tuple[int, int]


@dataclass(frozen=True)
class Extension:
    """A base tokenizer with new tokens above its own.

    `added`: new ids. `merges`: new merges; more than `added` where some spell a token that was there. `dropped_for_protection`:
    pairs that were the most frequent and did not become merges because they stand in protected text. `unused`: new tokens that
    the texts are never cut into; each is part of a merge.
    """

    tokenizer: PreTrainedTokenizerBase
    added: int
    merges: int
    dropped_for_protection: int
    unused: int


def extend(base: PreTrainedTokenizerBase, texts: Iterable[str], new_tokens: int, protect: Iterable[str] = ()) -> Extension:
    """Continue the base's BPE training on texts until it has `new_tokens` more tokens, or no pair stands in them twice.

    Continued BPE (Purason et al., arXiv 2512.03989): the texts are cut by the base, then the most frequent pair of adjacent
    tokens becomes a merge, again and again. Old merges come first in rank and know no new token, so what the new tokenizer does
    to any text is a coarsening of what the base does. Old tokens, special ones too, keep their ids; new ids follow the highest.
    Special tokens spelled out in the texts take no part. Each text of `protect` keeps its ids exactly, whether special tokens
    spelled out in it are read as such or as text. Both iterables are read once and may be larger than memory; their distinct
    pre-tokens may not. Raises CannotRun for a base that is not a plain byte-level BPE, or whose class does not open again as it
    was saved.
    """
    return extensions(base, texts, [new_tokens], protect)[0]


def extensions(base: PreTrainedTokenizerBase, texts: Iterable[str], sizes: Sequence[int], protect: Iterable[str] = ()) -> list[Extension]:
    """What `extend` gives for each of several numbers of new tokens, from one training: a smaller one begins a larger one."""
    known, guard = _Merges(_description(base)), _Guard()
    guard.add(_cuts(base, protect, (False, True)))
    training = _Training(known, guard)
    training.read(_cuts(base, texts, (False,)))
    found = {}
    for size in sorted(set(sizes)):
        training.learn(size)
        tokenizer = _with_merges(base, known)
        found[size] = Extension(tokenizer, known.added, len(known.new), len(guard.dropped), training.unused())
    return [found[size] for size in sizes]


def _description(base: PreTrainedTokenizerBase) -> Any:
    """The base's tokenizer.json, each added token in the model's vocabulary at its own id. Raises CannotRun.

    The library numbers an added token that the model lacks after the model's highest id, whatever the file says.
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
    """Whether the pre-tokenizer leaves a text in one piece that is spelled as the text."""
    return [piece for piece, _ in base.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)] == [text]


def _cuts(base: PreTrainedTokenizerBase, texts: Iterable[str], spelled_out: Sequence[bool]) -> Counter[bytes]:
    """How often the texts hold each pre-token, which stands as the base's ids for it (uint32).

    `spelled_out`: how special tokens in the texts are read, as text (True) or as tokens; the counts of all ways are added up.
    """
    counts: Counter[bytes] = Counter()
    with on_disk(base) as file, Workers() as workers:
        for found in workers.map(_cut, (file, tuple(spelled_out)), chunked(texts)):
            counts.update(found)
    return counts


def _cut(file: str, spelled_out: Sequence[bool], texts: list[str]) -> Counter[bytes]:
    counts: Counter[bytes] = Counter()
    backend = reader(file)
    for backend.encode_special_tokens in spelled_out:
        for encoding in backend.encode_batch(texts, add_special_tokens=False):
            ids = np.array(encoding.ids, dtype=np.uint32).tobytes()
            starts = np.flatnonzero(np.diff(np.array(encoding.word_ids, dtype=np.int64), prepend=-1)) * 4
            counts.update(ids[a:b] for a, b in pairwise([*starts.tolist(), len(ids)]))
    return counts


def _symbols(cut: bytes) -> list[int]:
    symbols: list[int] = np.frombuffer(cut, dtype=np.uint32).tolist()
    return symbols


class _Merges:
    """What can be spelled: all tokens and merges, the base's and, above them in rank and id, the new ones.

    A merge's rank is its place in the list.
    """

    def __init__(self, description: Any) -> None:
        self.ids: dict[str, int] = dict(description["model"]["vocab"])
        self.spelling = {i: token for token, i in self.ids.items()}
        self.first = max(self.spelling) + 1
        self.added = 0
        self.reserved = {token["content"] for token in description["added_tokens"]}
        self.old = len(description["model"]["merges"])
        self.ranks = {(self.ids[a], self.ids[b]): rank for rank, (a, b) in enumerate(description["model"]["merges"])}
        self.new: list[Pair] = []

    def spell(self, pair: Pair) -> str:
        return self.spelling[pair[0]] + self.spelling[pair[1]]

    def add(self, pair: Pair) -> int:
        """Append a merge. Returns the id of what it spells, a new one only for a new string."""
        token = self.spell(pair)
        if token not in self.ids:
            self.ids[token] = self.first + self.added
            self.spelling[self.ids[token]] = token
            self.added += 1
        self.ranks[pair] = self.old + len(self.new)
        self.new.append(pair)
        return self.ids[token]

    def settle(self, symbols: list[int]) -> list[int]:
        """Apply merges, lowest rank first and leftmost of those, until none applies: BPE from any state of a word."""
        while True:
            found = min(((self.ranks[pair], i) for i, pair in enumerate(pairwise(symbols)) if pair in self.ranks), default=None)
            if found is None:
                return symbols
            i = found[1]
            symbols = [*symbols[:i], self.ids[self.spell((symbols[i], symbols[i + 1]))], *symbols[i + 2 :]]


@dataclass
class _Guard:
    """What may not become a merge because a protected text would change.

    New merges come after the base's, so one fires on a word only if its pair stands in the base's cut of it. That holds with
    `ignore_merges` too, where a word that is a token becomes it at once: merges that make a string somewhere in a text make it
    of the string alone as well, so some new merge fires on the word before the new token is there.
    """

    pairs: set[Pair] = field(default_factory=set)
    dropped: set[Pair] = field(default_factory=set)

    def add(self, cuts: Iterable[bytes]) -> None:
        for cut in cuts:
            self.pairs.update(pairwise(_symbols(cut)))

    def refuses(self, pair: Pair) -> bool:
        """Whether a merge would fire on protected text; if so it is counted as dropped."""
        if pair in self.pairs:
            self.dropped.add(pair)
        return pair in self.pairs


class _Training:
    """The corpus as the tokenizer cuts it at this point of the training, and the counts of pairs in it.

    After every merge each word is cut exactly as a tokenizer with the merges so far cuts it, so a new token that is nowhere used
    is always part of a merge: no other way leads out of the words. `where` names the words a pair stands in, and some that it
    has left; `heap` holds (−count, pair) for each pair, and entries with counts that have changed since.
    """

    def __init__(self, known: _Merges, guard: _Guard) -> None:
        self.known, self.guard = known, guard
        self.words: list[list[int]] = []
        self.counts: list[int] = []
        self.pairs: Counter[Pair] = Counter()
        self.where: defaultdict[Pair, set[int]] = defaultdict(set)
        self.heap: list[tuple[int, Pair]] = []

    def read(self, cuts: Counter[bytes]) -> None:
        """Take in the words; those of one token, special ones among them, have nothing to merge."""
        for cut, count in cuts.items():
            symbols = _symbols(cut)
            if len(symbols) == 1:
                continue
            for pair in pairwise(symbols):
                self.pairs[pair] += count
                self.where[pair].add(len(self.words))
            self.words.append(symbols)
            self.counts.append(count)
        self.heap = [(-count, pair) for pair, count in self.pairs.items()]
        heapify(self.heap)

    def learn(self, new_tokens: int) -> None:
        """Add merges until there are so many new tokens or no pair is left."""
        while self.known.added < new_tokens and (pair := self._best()) is not None:
            added = self.known.added
            token = self.known.add(pair)
            self._apply(pair, token, fresh=self.known.added > added)

    def unused(self) -> int:
        """How many new tokens no word is cut into."""
        used = {i for symbols in self.words for i in symbols if i >= self.known.first}
        return self.known.added - len(used)

    def _best(self) -> Pair | None:
        """The most frequent pair that may become a merge, of equal ones that with the lowest ids."""
        while self.heap:
            entry, pair = heappop(self.heap)
            count = self.pairs[pair]
            if count < LEAST:
                continue
            if count != -entry:
                heappush(self.heap, (-count, pair))
                continue
            if self.known.spell(pair) not in self.known.reserved and not self.guard.refuses(pair):
                return pair
        return None

    def _apply(self, pair: Pair, token: int, fresh: bool) -> None:
        """Cut again the words that a merge just added changes.

        No merge knows a fresh token yet. One that was there may set off merges of lower rank: the word is settled.
        """
        change: Counter[Pair] = Counter()
        for word in self.where.pop(pair):
            if pair in pairwise(self.words[word]):
                before = self.words[word]
                self._replace(word, _joined(before, pair, token) if fresh else self.known.settle(before), change)
        for changed, difference in change.items():
            self.pairs[changed] += difference
            if difference > 0:
                heappush(self.heap, (-self.pairs[changed], changed))

    def _replace(self, word: int, symbols: list[int], change: Counter[Pair]) -> None:
        count = self.counts[word]
        for pair in pairwise(self.words[word]):
            change[pair] -= count
        for pair in pairwise(symbols):
            change[pair] += count
            self.where[pair].add(word)
        self.words[word] = symbols


def _joined(symbols: list[int], pair: Pair, token: int) -> list[int]:
    """A word with the token in place of the pair, from left to right."""
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


def _with_merges(base: PreTrainedTokenizerBase, known: _Merges) -> PreTrainedTokenizerBase:
    """A copy of the base, its chat template and settings with it, that knows the new merges."""
    description = _description(base)
    description["model"]["vocab"] = known.ids
    description["model"]["merges"] += [(known.spelling[a], known.spelling[b]) for a, b in known.new]
    return with_backend(base, Tokenizer.from_str(json.dumps(description)))
