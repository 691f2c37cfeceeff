"""Knows the space in which new tokens meet old ones: word vectors of the target text, trained on the new tokenizer's tokens.

A new token has no place in the model's space, but both kinds of token occur in the text. Vectors trained on it say which
tokens that the model knows a new one is like; the same weighted sum is then taken in the model's space (`sparse_combinations`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from azrecipe.data.mixture import TOKENS, Mix
from azrecipe.utils.atomic_files import locked, whole_folder, write_json

if TYPE_CHECKING:
    from azrecipe.modeling.sparse_combinations import Sums

CAP = 30_000_000  # tokens of text read; more says little more about the tokens that are frequent enough to have a vector
# FOCUS's settings of fastText's CBOW (arXiv 2305.14481), else fastText's defaults, as gensim names them; no character n-grams.
SETTINGS: Mapping[str, Any] = {"vector_size": 100, "window": 5, "min_count": 10, "negative": 10, "alpha": 0.05, "sample": 1e-3}
EPOCHS, MOST_EPOCHS, READ = 3, 30, 10_000_000  # FOCUS's 3; more on a small text, until so many tokens have been read
PICKS = 8  # atoms of a pursuit; more fit the noise of so small a space, and their weights grow (docs/metrics.md)
SENTENCE = 10_000  # gensim drops, without a word, what a sentence holds beyond this

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Vectors:
    """Static embeddings: ids [n] of the tokens that have one, and their vectors [n, dim] float32."""

    ids: Rows
    vectors: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Composed:
    """New tokens as sums of old rows: `tokens` int64 [n] are new ids, the ids in `sums` are old ones."""

    tokens: Rows
    sums: Sums


def compose(mix: Mix, cache: Path, method: str, same: Mapping[int, int]) -> Composed:
    """Each token that has a vector and is new, as a sum of tokens that both vocabularies hold and that have one too.

    `same`: new id → old id of the tokens in both. Computed once for all processes of a machine and kept in `cache`, so that a
    run that starts again has the same sums bit for bit. The vectors are trained on the beginning of the mix with its seed.
    """
    import torch

    from azrecipe.modeling.sparse_combinations import Sums

    version, epochs = importlib.metadata.version("gensim"), [EPOCHS, MOST_EPOCHS, READ]
    texts = _name(format=1, mix=mix.fingerprint, cap=CAP, settings=SETTINGS, epochs=epochs, gensim=version)
    pairs = np.asarray(sorted(same.items()), dtype=np.int64).reshape(-1, 2)
    sums = _name(format=1, vectors=texts, method=method, picks=PICKS, same=hashlib.sha256(pairs.tobytes()).hexdigest())
    ids, vectors = _kept(cache / f"vectors-{texts}", ("ids", "vectors"), partial(_train, mix))
    parts = _kept(cache / f"sums-{sums}", ("tokens", "offsets", "ids", "weights"), partial(_sums, Vectors(ids, vectors), pairs, method))
    return Composed(parts[0], Sums(*map(torch.from_numpy, parts[1:])))


def _name(**what: Any) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]


def _kept(folder: Path, names: tuple[str, ...], make: Callable[[], tuple[npt.NDArray[Any], ...]]) -> list[npt.NDArray[Any]]:
    """Arrays from a folder of the cache, made by one process where they are not there yet; the others wait for it."""
    if not folder.is_dir():
        with locked(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                arrays = make()
                with whole_folder(folder, replace=False) as aside:
                    for name, array in zip(names, arrays, strict=True):
                        np.save(aside / f"{name}.npy", array)
                    write_json(aside / "meta.json", {"sizes": {name: len(array) for name, array in zip(names, arrays, strict=True)}})
    return [np.load(folder / f"{name}.npy") for name in names]


class Text:
    """The beginning of a mix as gensim reads it, again and again: lists of token names, each of at most SENTENCE.

    Whole documents up to `cap` tokens, and no more text than all sources hold together. `counts`: occurrences by token id.
    """

    def __init__(self, mix: Mix, cap: int) -> None:
        cap = min(cap, mix.epoch_tokens)
        order = mix.order(tokens=cap)
        used = order.find(TOKENS, cap) + 1
        self.parts: list[npt.NDArray[np.uint32]] = []
        for source, document in zip(order.source[:used].tolist(), order.document[:used].tolist(), strict=True):
            tokens = mix.stores[source].document(document)
            self.parts += [tokens[at : at + SENTENCE] for at in range(0, len(tokens), SENTENCE)]
        self.counts = np.bincount(np.concatenate([np.zeros(0, np.uint32), *self.parts]))
        self.names = [str(i) for i in range(len(self.counts))]  # gensim takes an integer for a row, not for a name

    def __iter__(self) -> Iterator[list[str]]:
        names = self.names
        for ids in self.parts:
            yield [names[i] for i in ids.tolist()]


def _train(mix: Mix) -> tuple[Rows, npt.NDArray[np.float32]]:
    """CBOW vectors of the tokens that occur at least min_count times, ids ascending; none where there are no two such.

    One worker, and no string is hashed: the same text and seed give the same vectors.
    """
    text = Text(mix, CAP)
    frequent = np.flatnonzero(text.counts >= SETTINGS["min_count"])
    if len(frequent) < 2:
        return np.zeros(0, np.int64), np.zeros((0, SETTINGS["vector_size"]), np.float32)
    from gensim.models import Word2Vec

    logging.getLogger("gensim").setLevel(logging.ERROR)  # it warns of a small text in terms of its own
    total, started = int(text.counts.sum()), time.monotonic()
    epochs = max(EPOCHS, min(MOST_EPOCHS, -(-READ // total)))
    print(f"  training vectors of {len(frequent):,} tokens: {epochs} times {total:,} tokens of text", file=sys.stderr, flush=True)
    model = Word2Vec(workers=1, seed=mix.seed, **SETTINGS)
    model.build_vocab_from_freq({str(i): int(text.counts[i]) for i in frequent}, corpus_count=len(text.parts))
    model.train(text, total_examples=len(text.parts), epochs=epochs)
    print(f"  trained in {time.monotonic() - started:,.0f} s", file=sys.stderr, flush=True)
    return frequent, np.ascontiguousarray(model.wv.vectors[[model.wv.key_to_index[str(i)] for i in frequent]], dtype=np.float32)


def _sums(known: Vectors, pairs: Rows, method: str) -> tuple[npt.NDArray[Any], ...]:
    """New ids, and the sums that stand for them: offsets, old ids, weights. `pairs` [n, 2]: new and old id of a shared token."""
    import torch

    from azrecipe.modeling.sparse_combinations import pursuit_sums, sparsemax_sums

    lengths = np.linalg.norm(known.vectors, axis=1, keepdims=True)
    vectors = known.vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    shared = np.isin(known.ids, pairs[:, 0])
    atoms, targets = torch.from_numpy(vectors[shared]), torch.from_numpy(vectors[~shared])
    tokens = known.ids[~shared]
    if not len(atoms):
        tokens, targets = tokens[:0], targets[:0]
    made = sparsemax_sums(targets, atoms) if method == "focus" else pursuit_sums(targets, atoms, PICKS)
    old_ids = pairs[np.searchsorted(pairs[:, 0], known.ids[shared]), 1] if len(pairs) else pairs[:, 1]
    return tokens, made.offsets.numpy(), old_ids[made.ids.numpy()], made.weights.numpy()
