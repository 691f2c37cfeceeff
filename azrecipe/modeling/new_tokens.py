"""The tokens that a model's base vocabulary lacks, stored beside the model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from azrecipe.errors import CommandError
from azrecipe.modeling.vocabulary_swap import find_shared_tokens
from azrecipe.tokenization.tokenizer import have_same_vocabulary
from azrecipe.utils.atomic_files import read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE_NAME = "new_tokens.json"


def find_new_tokens(model_path: str | None, model_tokenizer: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Find the ids of a model's new tokens, in ascending order.

    If the run swaps the vocabulary, these are the tokens that the model's own tokenizer lacks. Otherwise they come from the file
    that an earlier run wrote into the model's folder. Padding rows are no tokens.

    Args:
        model_path: The model's folder or hub name; None for a new model, which has no new tokens.
        model_tokenizer: The tokenizer that the model came with.
        tokenizer: The tokenizer that the run uses; ids refer to it.

    Raises:
        CommandError: The file cannot be read.
    """
    ids = set(tokenizer.get_vocab().values())
    if model_path is None:
        return []
    if not have_same_vocabulary(model_tokenizer, tokenizer):
        return sorted(ids - find_shared_tokens(model_tokenizer, tokenizer).keys())
    return sorted(ids & set(_read_ids(Path(model_path) / FILE_NAME)))


def save_new_tokens(ids: Sequence[int], folder: Path) -> None:
    """Write the ids as [first, last] pairs of consecutive ids.

    No file is written where there are none.
    """
    if ids:
        write_json(folder / FILE_NAME, {"count": len(ids), "ids": _group_consecutive(ids)})


def _group_consecutive(ids: Iterable[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in sorted(ids):
        if groups and groups[-1][1] == i - 1:
            groups[-1][1] = i
        else:
            groups.append([i, i])
    return groups


def _read_ids(file: Path) -> list[int]:
    try:
        data = read_json(file)
        return [i for first, last in data["ids"] for i in range(first, last + 1)] if data is not None else []
    except (ValueError, TypeError, KeyError) as error:
        raise CommandError(f"{file} was not written by a run: {error}") from None
