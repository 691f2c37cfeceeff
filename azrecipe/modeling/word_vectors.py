"""Word vectors of a text, which relate new tokens to old ones.

A new token has no row in the model, but new and old tokens occur in the same text. Vectors that are trained on this text, split by
the new tokenizer, say which old tokens a new one resembles. The same weighted sum is then taken of the model's rows
(`sparse_combinations`).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from azrecipe.data.mixture import TOKEN_COLUMN, Mixture
from azrecipe.utils.atomic_files import atomic_folder, hold_lock, write_json
from azrecipe.utils.console import print_progress

if TYPE_CHECKING:
    from azrecipe.modeling.sparse_combinations import SparseCombinations

MAX_TOKENS = 30_000_000  # of text; more adds little for the tokens that are frequent enough to have a vector
# FOCUS's settings of fastText's CBOW (arXiv 2305.14481), else fastText's defaults, as gensim names them; no character n-grams.
WORD2VEC_SETTINGS: Mapping[str, Any] = {"vector_size": 100, "window": 5, "min_count": 10, "negative": 10, "alpha": 0.05, "sample": 1e-3}
MIN_EPOCHS, MAX_EPOCHS, TARGET_TOKENS = 3, 30, 10_000_000  # FOCUS uses 3; a small text gets more, until so many tokens are read
MAX_ATOMS = 8  # of a pursuit; more would fit the noise of so small a space, and their weights grow (docs/metrics.md)
MAX_SENTENCE_TOKENS = 10_000  # gensim silently drops the rest of a longer sentence

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class WordVectors:
    """Static embeddings of the tokens that have one.

    ids: int64 [n]; vectors: float32 [n, dim].
    """

    ids: IntArray
    vectors: npt.NDArray[np.float32]


@dataclass(frozen=True)
class ComposedEmbeddings:
    """New tokens as sums of old embedding rows.

    tokens: int64 [n], new ids. The ids in `combinations` are old ones.
    """

    tokens: IntArray
    combinations: SparseCombinations


def compose_embeddings(mixture: Mixture, cache_dir: Path, method: str, shared_tokens: Mapping[int, int]) -> ComposedEmbeddings:
    """Compose each new token with a vector from shared tokens with one.

    The sums are computed once for all processes of a machine and stored in `cache_dir`, so a resumed run has the same sums bit for
    bit. The vectors are trained on the beginning of the mixture with its seed.

    Args:
        mixture: The training text, tokenised by the new tokenizer.
        cache_dir: The folder that stores vectors and sums.
        method: "focus" or "omp".
        shared_tokens: New id → old id of the tokens in both vocabularies.
    """
    import torch

    from azrecipe.modeling.sparse_combinations import SparseCombinations

    version, epochs = importlib.metadata.version("gensim"), [MIN_EPOCHS, MAX_EPOCHS, TARGET_TOKENS]
    vectors_key = _hash_key(format=1, mix=mixture.fingerprint, cap=MAX_TOKENS, settings=WORD2VEC_SETTINGS, epochs=epochs, gensim=version)
    pairs = np.asarray(sorted(shared_tokens.items()), dtype=np.int64).reshape(-1, 2)
    sums_key = _hash_key(format=1, vectors=vectors_key, method=method, picks=MAX_ATOMS, same=hashlib.sha256(pairs.tobytes()).hexdigest())
    ids, vectors = _load_or_compute(cache_dir / f"vectors-{vectors_key}", ("ids", "vectors"), partial(_train_vectors, mixture))
    tokens, *arrays = _load_or_compute(
        cache_dir / f"sums-{sums_key}", ("tokens", "offsets", "ids", "weights"), partial(_combine, WordVectors(ids, vectors), pairs, method)
    )
    return ComposedEmbeddings(tokens, SparseCombinations(*map(torch.from_numpy, arrays)))


def _hash_key(**fields: Any) -> str:
    """Name a cache entry by a hash of what it depends on."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:32]


def _load_or_compute(folder: Path, names: tuple[str, ...], compute: Callable[[], tuple[npt.NDArray[Any], ...]]) -> list[npt.NDArray[Any]]:
    """Load arrays from the cache; one process computes what is missing.

    The other processes wait for it.
    """
    if not folder.is_dir():
        with hold_lock(folder.with_name(f"{folder.name}.lock")):
            if not folder.is_dir():
                arrays = compute()
                with atomic_folder(folder, replace=False) as partial_folder:
                    for name, array in zip(names, arrays, strict=True):
                        np.save(partial_folder / f"{name}.npy", array)
                    write_json(
                        partial_folder / "meta.json", {"sizes": {name: len(array) for name, array in zip(names, arrays, strict=True)}}
                    )
    return [np.load(folder / f"{name}.npy") for name in names]


class MixtureText:
    """The beginning of a mixture as gensim reads it, repeatedly.

    It yields lists of token names, each of at most MAX_SENTENCE_TOKENS. It holds whole documents of up to `max_tokens` tokens, and no
    more text than all sources together have. `token_counts` has the occurrences by token id.
    """

    def __init__(self, mixture: Mixture, max_tokens: int) -> None:
        max_tokens = min(max_tokens, mixture.epoch_tokens)
        order = mixture.build_order(tokens=max_tokens)
        num_documents = order.find_document(TOKEN_COLUMN, max_tokens) + 1
        self.sentences: list[npt.NDArray[np.uint32]] = []
        for source, document in zip(order.source[:num_documents].tolist(), order.document[:num_documents].tolist(), strict=True):
            tokens = mixture.stores[source].read_document(document)
            self.sentences += [tokens[start : start + MAX_SENTENCE_TOKENS] for start in range(0, len(tokens), MAX_SENTENCE_TOKENS)]
        self.token_counts = np.bincount(np.concatenate([np.zeros(0, np.uint32), *self.sentences]))
        self.token_names = [str(i) for i in range(len(self.token_counts))]  # gensim takes an integer for a row number, not for a name

    def __iter__(self) -> Iterator[list[str]]:
        names = self.token_names
        for ids in self.sentences:
            yield [names[i] for i in ids.tolist()]


def _train_vectors(mixture: Mixture) -> tuple[IntArray, npt.NDArray[np.float32]]:
    """Train CBOW vectors of the tokens that occur min_count times or more.

    One worker trains and no string is hashed, so the same text and seed give the same vectors.

    Returns:
        Token ids in ascending order, and their vectors [n, vector_size]. Empty where fewer than two tokens are frequent enough.
    """
    text = MixtureText(mixture, MAX_TOKENS)
    frequent = np.flatnonzero(text.token_counts >= WORD2VEC_SETTINGS["min_count"])
    if len(frequent) < 2:
        return np.zeros(0, np.int64), np.zeros((0, WORD2VEC_SETTINGS["vector_size"]), np.float32)
    from gensim.models import Word2Vec

    logging.getLogger("gensim").setLevel(logging.ERROR)  # its warnings about a small text do not help users
    num_tokens, started = int(text.token_counts.sum()), time.monotonic()
    epochs = max(MIN_EPOCHS, min(MAX_EPOCHS, -(-TARGET_TOKENS // num_tokens)))
    print_progress(f"  training vectors of {len(frequent):,} tokens: {epochs} times {num_tokens:,} tokens of text")
    model = Word2Vec(workers=1, seed=mixture.seed, **WORD2VEC_SETTINGS)
    model.build_vocab_from_freq({str(i): int(text.token_counts[i]) for i in frequent}, corpus_count=len(text.sentences))
    model.train(text, total_examples=len(text.sentences), epochs=epochs)
    print_progress(f"  trained in {time.monotonic() - started:,.0f} s")
    return frequent, np.ascontiguousarray(model.wv.vectors[[model.wv.key_to_index[str(i)] for i in frequent]], dtype=np.float32)


def _combine(word_vectors: WordVectors, shared_pairs: IntArray, method: str) -> tuple[npt.NDArray[Any], ...]:
    """Combine shared tokens for each new token.

    Args:
        word_vectors: The tokens that have a vector.
        shared_pairs: [n, 2], new and old id of each shared token, sorted by new id.
        method: "focus" or "omp".

    Returns:
        The new ids, then offsets, old ids and weights of their sums.
    """
    import torch

    from azrecipe.modeling.sparse_combinations import combine_by_pursuit, combine_by_sparsemax

    lengths = np.linalg.norm(word_vectors.vectors, axis=1, keepdims=True)
    vectors = word_vectors.vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    shared = np.isin(word_vectors.ids, shared_pairs[:, 0])
    atoms, targets = torch.from_numpy(vectors[shared]), torch.from_numpy(vectors[~shared])
    tokens = word_vectors.ids[~shared]
    if not len(atoms):
        tokens, targets = tokens[:0], targets[:0]
    combinations = combine_by_sparsemax(targets, atoms) if method == "focus" else combine_by_pursuit(targets, atoms, MAX_ATOMS)
    old_ids = shared_pairs[np.searchsorted(shared_pairs[:, 0], word_vectors.ids[shared]), 1] if len(shared_pairs) else shared_pairs[:, 1]
    return tokens, combinations.offsets.numpy(), old_ids[combinations.ids.numpy()], combinations.weights.numpy()
