"""Which documents of a job's sources repeat others: by the hash of their text, or nearly, by MinHash signatures of it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from azrecipe.data.readers import Located
from azrecipe.data.token_store import Store
from azrecipe.errors import Problem, RecipeError
from azrecipe.recipe.types import Deduplication
from azrecipe.utils.atomic_files import locked, read_json, whole_folder, write_json

VERSION = 1  # of what is below: what was found in another way is not taken from the cache
SEED = 1
CERTAIN = 0.99  # the least chance that two documents at the threshold meet in a band
BACK = 8  # documents with equal bands that one is compared with, besides the first
SAMPLES = 5
ROWS = 50_000

Ints = npt.NDArray[np.int64]
Signatures = npt.NDArray[np.uint32]
NONE = -1


def identity(asked: Deduplication) -> dict[str, Any]:
    """What signatures depend on, for a cache key."""
    import rensa

    return {"rules": VERSION, "ngram_size": asked.ngram_size, "num_perm": asked.num_perm, "algorithm": rensa.RMinHash.ALGORITHM_VERSION}


def signatures(texts: Sequence[str], asked: Deduplication) -> Signatures:
    """MinHash signatures of texts' word n-grams, [texts, num_perm]; case and white space do not count."""
    from rensa import RMinHash

    if not texts:
        return np.zeros((0, asked.num_perm), np.uint32)
    matrix = RMinHash.digest_matrix_from_token_sets([_ngrams(text, asked.ngram_size) for text in texts], asked.num_perm, SEED)
    return np.asarray(matrix.to_rows(), np.uint32)


def _ngrams(text: str, size: int) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]


def unique(stores: Sequence[Store], sources: Sequence[Located], held_out: Sequence[str], asked: Deduplication, cache: Path) -> list[Store]:
    """The stores without documents that an earlier one, of the same source or another, repeats; looked for once and cached.

    Near duplicates are those whose signatures agree with an earlier document's, or a held-out one's, in a share of at least
    asked.threshold: an estimate of the Jaccard similarity of their n-grams. Raises RecipeError where a source has nothing left.
    """
    near = asked.method == "minhash"
    held = hashlib.sha256("\0".join(held_out).encode()).hexdigest()
    what = [VERSION, asked.method, [s.key for s in stores], *([asked.threshold, held] if near else [])]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    folder = cache / f"unique-{key}"
    if not folder.is_dir():
        with locked(cache / f"{folder.name}.lock"):
            if not folder.is_dir():
                print(f"  looking for duplicates in {sum(s.documents for s in stores):,} documents", file=sys.stderr, flush=True)
                masks, found = _find(stores, signatures(held_out, asked) if near else None, asked)
                with whole_folder(folder, replace=False) as aside:
                    for i, mask in enumerate(masks):
                        np.save(aside / f"{i}.npy", np.flatnonzero(mask))
                    write_json(aside / "meta.json", {"sources": found})
    kept = [np.load(folder / f"{i}.npy") for i in range(len(stores))]
    if empty := [s for s, numbers in zip(sources, kept, strict=True) if not len(numbers)]:
        message = "every document of {} repeats one of an earlier source or a held-out one: leave the source out"
        raise RecipeError([Problem(s.place, message.format(s.title)) for s in empty])
    found = read_json(folder / "meta.json")["sources"]
    return [
        s.light() if len(numbers) == s.documents else s.only(numbers, hashlib.sha256(f"{key} {s.key}".encode()).hexdigest()[:32], told)
        for s, numbers, told in zip(stores, kept, found, strict=True)
    ]


def _find(
    stores: Sequence[Store], held_out: Signatures | None, asked: Deduplication
) -> tuple[list[npt.NDArray[np.bool_]], list[dict[str, Any]]]:
    """For each store, which documents stay, and what is said of the others. Documents are numbered through all stores."""
    starts = np.concatenate([[0], np.cumsum([s.documents for s in stores])])
    hashes = np.concatenate([np.asarray(s.hashes) for s in stores])
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    original = first[inverse.reshape(-1)]
    alone = original == np.arange(len(original))
    partner = np.full(len(original), NONE)
    partner[~alone] = original[~alone]
    held = np.zeros(len(original), np.bool_)
    if held_out is not None:
        numbers = np.flatnonzero(alone)
        rows = np.concatenate(
            [held_out, *(np.asarray(s.signatures)[alone[a:b]] for s, a, b in zip(stores, starts, starts[1:], strict=False))]
        )
        like, by_held = near(rows, len(held_out), asked.threshold)
        like, held[numbers] = like[len(held_out) :], by_held[len(held_out) :]
        partner[numbers] = np.where(like >= len(held_out), numbers[like - len(held_out)], NONE)
    dropped = (partner != NONE) | held
    told = []
    for a, b in pairwise(starts):
        counts = {
            "exact": ~alone[a:b],
            **({"near": alone[a:b] & dropped[a:b] & ~held[a:b], "near_held_out": held[a:b]} if held_out is not None else {}),
        }
        samples = [_sample(int(n), int(partner[n]), starts) for n in _spread(np.flatnonzero(dropped[a:b]) + a)]
        told.append({**{name: int(of.sum()) for name, of in counts.items()}, "samples": samples})
    return [~dropped[a:b] for a, b in pairwise(starts)], told


def _spread(numbers: Ints) -> Ints:
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, SAMPLES).astype(np.int64))] if len(numbers) else numbers


def _sample(number: int, like: int, starts: Ints) -> dict[str, Any]:
    """A document that was dropped, and which it repeats: source and document count from 0."""
    where = [int(np.searchsorted(starts, n, side="right")) - 1 for n in (number, like)]
    again: Any = "a held-out document" if like == NONE else {"source": where[1], "document": like - int(starts[where[1]])}
    return {"document": number - int(starts[where[0]]), "repeats": again}


def bands(num_perm: int, threshold: float) -> tuple[int, int]:
    """(bands, rows in a band): as long as bands can be while two at the threshold still meet in one with CERTAIN chance."""
    fits = [r for r in range(1, num_perm + 1) if 1 - (1 - threshold**r) ** (num_perm // r) >= CERTAIN]
    rows = max(fits, default=1)
    return num_perm // rows, rows


def near(rows: Signatures, held: int, threshold: float) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """For each signature, [documents, num_perm], an earlier one that agrees with it, or NONE; and whether one of the first `held` does.

    Those are the held-out ones: they are dropped by nothing. Candidates are documents that are equal in a band (locality
    sensitive hashing; Leskovec et al., Mining of Massive Datasets, ch. 3); what counts is the share of the whole signature.
    """
    like = np.full(len(rows), NONE)
    by_held = np.zeros(len(rows), np.bool_)
    count, width = bands(rows.shape[1], threshold)
    for band in range(count):
        keys = np.zeros(len(rows), np.uint64)
        for column in range(band * width, (band + 1) * width):
            keys = (keys ^ rows[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        run = np.concatenate([[0], np.cumsum(keys[order][1:] != keys[order][:-1])])
        begins = np.searchsorted(run, run)  # where each one's run begins
        for back in range(BACK + 1):
            at = np.arange(len(rows))
            others = begins if back == 0 else np.maximum(at - back, begins)
            a, b = order[others], order
            worth = (others < at) & (b >= held) & np.where(a < held, ~by_held[b], like[b] == NONE)
            a, b = a[worth], b[worth]
            for i in range(0, len(a), ROWS):
                earlier, later = a[i : i + ROWS], b[i : i + ROWS]
                agree = (rows[earlier] == rows[later]).mean(axis=1) >= threshold
                by_held[later[agree & (earlier < held)]] = True
                among = agree & (earlier >= held)
                like[later[among]] = earlier[among]
    return like, by_held
