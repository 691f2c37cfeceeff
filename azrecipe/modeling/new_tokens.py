"""Knows which tokens of a model its base's vocabulary lacks, and hands that on in a file beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from azrecipe.errors import CommandError
from azrecipe.modeling.vocabulary_swap import shared_tokens
from azrecipe.tokenization.tokenizer import same_vocabulary
from azrecipe.utils.atomic_files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "new_tokens.json"


def find(model: str | None, own: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids, in `tokenizer`, of the tokens that are new, ascending. Empty where nothing is known of any.

    Where the run gives the model another vocabulary than its `own`: those that this lacks. Else what stands in the model's folder,
    from the run that made it. Rows that pad the vocabulary are no tokens. Raises CommandError for a file that cannot be read.
    """
    ids = set(tokenizer.get_vocab().values())
    if model is None:
        return []
    if not same_vocabulary(own, tokenizer):
        return sorted(ids - shared_tokens(own, tokenizer).keys())
    return sorted(ids & set(_read(Path(model) / FILE)))


def save(ids: Sequence[int], folder: Path) -> None:
    """Write the file, ids as [first, last] of each unbroken run of them; nothing where none is new."""
    if ids:
        write_json(folder / FILE, {"count": len(ids), "ids": _runs(ids)})


def _runs(ids: Iterable[int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for i in sorted(ids):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return runs


def _read(file: Path) -> list[int]:
    try:
        data = read_json(file)
        return [i for first, last in data["ids"] for i in range(first, last + 1)] if data is not None else []
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{file} is not what a run writes: {error}") from None
