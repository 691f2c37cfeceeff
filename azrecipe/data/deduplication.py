"""Find documents that repeat others, exactly or nearly (MinHash)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from azrecipe.data.readers import DataSource
from azrecipe.data.token_store import TokenStore
from azrecipe.errors import Problem, RecipeError
from azrecipe.recipe.types import Deduplication
from azrecipe.utils.atomic_files import atomic_folder, hold_lock, read_json, write_json
from azrecipe.utils.bootstrap import IntArray
from azrecipe.utils.console import print_progress

RULES_VERSION = 1  # of the rules below; the cache does not mix versions
HASH_SEED = 1
MIN_MEETING_CHANCE = 0.99  # that two documents at the threshold are equal in a band
MAX_PREDECESSORS = 8  # how many of the documents with an equal band one is compared with, besides the first
MAX_SAMPLES = 5
COMPARISON_ROWS = 50_000

Signatures = npt.NDArray[np.uint32]
NO_DOCUMENT = -1


def describe_signatures(settings: Deduplication) -> dict[str, Any]:
    """Describe what signatures depend on, for a cache key."""
    import rensa

    return {
        "rules": RULES_VERSION,
        "ngram_size": settings.ngram_size,
        "num_perm": settings.num_perm,
        "algorithm": rensa.RMinHash.ALGORITHM_VERSION,
    }


def compute_signatures(texts: Sequence[str], settings: Deduplication) -> Signatures:
    """Compute MinHash signatures of word n-grams, [texts, num_perm].

    Case and white space do not count.
    """
    from rensa import RMinHash

    if not texts:
        return np.zeros((0, settings.num_perm), np.uint32)
    matrix = RMinHash.digest_matrix_from_token_sets(
        [_split_ngrams(text, settings.ngram_size) for text in texts], settings.num_perm, HASH_SEED
    )
    return np.asarray(matrix.to_rows(), np.uint32)


def _split_ngrams(text: str, size: int) -> list[str]:
    words = text.lower().split()
    return [" ".join(words[i : i + size]) for i in range(max(1, len(words) - size + 1))]


def remove_duplicates(
    stores: Sequence[TokenStore], sources: Sequence[DataSource], held_out: Sequence[str], settings: Deduplication, cache: Path
) -> list[TokenStore]:
    """Remove the documents that repeat an earlier one of any source.

    A near duplicate is a document whose signature agrees with that of an earlier document, or of a held-out one, in a share
    of at least `settings.threshold`. This share estimates the Jaccard similarity of their n-grams. The result is cached.

    Args:
        stores: The store of each source.
        sources: The sources.
        held_out: The held-out documents.
        settings: The deduplication of the recipe.
        cache: The folder of the cache.

    Returns:
        The stores without these documents.

    Raises:
        RecipeError: A source has no documents left.
    """
    near = settings.method == "minhash"
    held_out_hash = hashlib.sha256("\0".join(held_out).encode()).hexdigest()
    inputs = [RULES_VERSION, settings.method, [s.key for s in stores], *([settings.threshold, held_out_hash] if near else [])]
    key = hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:32]
    folder = cache / f"unique-{key}"
    if not folder.is_dir():
        with hold_lock(cache / f"{folder.name}.lock"):
            if not folder.is_dir():
                print_progress(f"  searching for duplicates in {sum(s.num_documents for s in stores):,} documents")
                masks, summaries = _find_duplicates(stores, compute_signatures(held_out, settings) if near else None, settings)
                with atomic_folder(folder, replace=False) as tmp:
                    for i, mask in enumerate(masks):
                        np.save(tmp / f"{i}.npy", np.flatnonzero(mask))
                    write_json(tmp / "meta.json", {"sources": summaries})
    selected = [np.load(folder / f"{i}.npy") for i in range(len(stores))]
    if empty := [s for s, numbers in zip(sources, selected, strict=True) if not len(numbers)]:
        message = "every document of {} repeats one of an earlier source or a held-out one: leave the source out"
        raise RecipeError([Problem(s.location, message.format(s.title)) for s in empty])
    summaries = read_json(folder / "meta.json")["sources"]
    return [
        s.without_hashes()
        if len(numbers) == s.num_documents
        else s.select_documents(numbers, hashlib.sha256(f"{key} {s.key}".encode()).hexdigest()[:32], summary)
        for s, numbers, summary in zip(stores, selected, summaries, strict=True)
    ]


def _find_duplicates(
    stores: Sequence[TokenStore], held_out: Signatures | None, settings: Deduplication
) -> tuple[list[npt.NDArray[np.bool_]], list[dict[str, Any]]]:
    """Find the documents of each store that stay, and summarise the others.

    Documents are numbered through all stores.
    """
    starts = np.concatenate([[0], np.cumsum([s.num_documents for s in stores])])
    hashes = np.concatenate([np.asarray(s.hashes) for s in stores])
    _, first, inverse = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    original = first[inverse.reshape(-1)]
    is_first = original == np.arange(len(original))
    partner = np.full(len(original), NO_DOCUMENT)
    partner[~is_first] = original[~is_first]
    matches_held_out = np.zeros(len(original), np.bool_)
    if held_out is not None:
        numbers = np.flatnonzero(is_first)
        rows = np.concatenate(
            [held_out, *(np.asarray(s.signatures)[is_first[start:end]] for s, start, end in zip(stores, starts, starts[1:], strict=False))]
        )
        matches, by_held_out = find_near_duplicates(rows, len(held_out), settings.threshold)
        matches, matches_held_out[numbers] = matches[len(held_out) :], by_held_out[len(held_out) :]
        partner[numbers] = np.where(matches >= len(held_out), numbers[matches - len(held_out)], NO_DOCUMENT)
    dropped = (partner != NO_DOCUMENT) | matches_held_out
    summaries = []
    for start, end in pairwise(starts):
        counts = {
            "exact": ~is_first[start:end],
            **(
                {
                    "near": is_first[start:end] & dropped[start:end] & ~matches_held_out[start:end],
                    "near_held_out": matches_held_out[start:end],
                }
                if held_out is not None
                else {}
            ),
        }
        samples = [_describe_sample(int(n), int(partner[n]), starts) for n in _spread_samples(np.flatnonzero(dropped[start:end]) + start)]
        summaries.append({**{name: int(mask.sum()) for name, mask in counts.items()}, "samples": samples})
    return [~dropped[start:end] for start, end in pairwise(starts)], summaries


def _spread_samples(numbers: IntArray) -> IntArray:
    return numbers[np.unique(np.linspace(0, len(numbers) - 1, MAX_SAMPLES).astype(np.int64))] if len(numbers) else numbers


def _describe_sample(number: int, match: int, starts: IntArray) -> dict[str, Any]:
    """Describe a dropped document and the one that it repeats.

    Sources and documents count from 0.
    """
    sources = [int(np.searchsorted(starts, n, side="right")) - 1 for n in (number, match)]
    repeated: Any = "a held-out document" if match == NO_DOCUMENT else {"source": sources[1], "document": match - int(starts[sources[1]])}
    return {"document": number - int(starts[sources[0]]), "repeats": repeated}


def choose_bands(num_perm: int, threshold: float) -> tuple[int, int]:
    """Choose the number of bands and the rows of each.

    Bands are as long as they can be while two documents at the threshold are equal in one with MIN_MEETING_CHANCE.
    """
    fits = [r for r in range(1, num_perm + 1) if 1 - (1 - threshold**r) ** (num_perm // r) >= MIN_MEETING_CHANCE]
    rows = max(fits, default=1)
    return num_perm // rows, rows


def find_near_duplicates(rows: Signatures, num_held_out: int, threshold: float) -> tuple[IntArray, npt.NDArray[np.bool_]]:
    """Find for each signature an earlier one that agrees with it.

    Candidates are documents that are equal in a band (locality sensitive hashing; Leskovec et al., Mining of Massive
    Datasets, ch. 3). They are near duplicates if the whole signatures agree in a share of at least `threshold`.

    Args:
        rows: The signatures, [documents, num_perm].
        num_held_out: How many at the beginning are of held-out documents; these are never dropped.
        threshold: The share.

    Returns:
        The earlier document or NO_DOCUMENT, and whether a held-out document agrees, [documents] each.
    """
    matches = np.full(len(rows), NO_DOCUMENT)
    by_held_out = np.zeros(len(rows), np.bool_)
    count, width = choose_bands(rows.shape[1], threshold)
    for band in range(count):
        keys = np.zeros(len(rows), np.uint64)
        for column in range(band * width, (band + 1) * width):
            keys = (keys ^ rows[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            keys ^= keys >> np.uint64(29)
        order = np.argsort(keys, kind="stable")
        runs = np.concatenate([[0], np.cumsum(keys[order][1:] != keys[order][:-1])])
        run_starts = np.searchsorted(runs, runs)
        for distance in range(MAX_PREDECESSORS + 1):
            places = np.arange(len(rows))
            others = run_starts if distance == 0 else np.maximum(places - distance, run_starts)
            all_earlier, all_later = order[others], order
            is_candidate = (
                (others < places)
                & (all_later >= num_held_out)
                & np.where(all_earlier < num_held_out, ~by_held_out[all_later], matches[all_later] == NO_DOCUMENT)
            )
            all_earlier, all_later = all_earlier[is_candidate], all_later[is_candidate]
            for i in range(0, len(all_earlier), COMPARISON_ROWS):
                earlier, later = all_earlier[i : i + COMPARISON_ROWS], all_later[i : i + COMPARISON_ROWS]
                agree = (rows[earlier] == rows[later]).mean(axis=1) >= threshold
                by_held_out[later[agree & (earlier < num_held_out)]] = True
                within = agree & (earlier >= num_held_out)
                matches[later[within]] = earlier[within]
    return matches, by_held_out
