"""Encode text to token ids, in this process or in others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from azrecipe.errors import CommandError, get_first_line

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerBase

EXCERPT_CHARACTERS = 60
IGNORE_INDEX = -100  # the label that PyTorch's cross entropy leaves out
BATCH_TEXTS = 256


class UnencodableTextError(CommandError):
    """A text that the tokenizers library fails on.

    Attributes:
        index: Its number among the texts of the call.
        reason: What the library says.
    """

    def __init__(self, index: int, text: str, reason: str) -> None:
        excerpt = " ".join(text[: 10 * EXCERPT_CHARACTERS].split())[:EXCERPT_CHARACTERS]
        super().__init__(f"the tokenizer fails on a text of {len(text):,} characters, which begins with '{excerpt}': {reason}")
        self.index, self.reason = index, reason


def get_panic_reason(error: BaseException) -> str | None:
    """Return what a panic of a library in Rust says, else None.

    The class of panics is no Exception and in no module. One that is as deep in a regular expression as its engine goes is the kind that
    occurs: ten million spaces in a row do it.
    """
    return get_first_line(error) if type(error).__name__ == "PanicException" else None


def encode_batch(backend: Tokenizer, texts: Sequence[str], *, with_offsets: bool = False) -> list[Encoding]:
    """Encode texts without special tokens.

    Raises UnencodableTextError where the library panics.
    """
    encode = backend.encode_batch if with_offsets else backend.encode_batch_fast
    try:
        return list(encode(list(texts), add_special_tokens=False))
    except BaseException as error:
        if get_panic_reason(error) is None:
            raise
        raise _find_unencodable_text(backend, texts, error) from None


@contextmanager
def translate_panics(what: str) -> Iterator[None]:
    """Turn a panic of the tokenizers library into CommandError."""
    try:
        yield
    except BaseException as error:
        if (reason := get_panic_reason(error)) is None:
            raise
        raise CommandError(f"{what}: the tokenizers library fails on a text: {reason}") from None


def _find_unencodable_text(backend: Tokenizer, texts: Sequence[str], error: BaseException) -> UnencodableTextError:
    """Find the first of some texts that the library panics on."""
    for index in sorted(range(len(texts)), key=lambda i: -len(texts[i])):  # a long one, most likely
        try:
            backend.encode_batch_fast([texts[index]], add_special_tokens=False)
        except BaseException as again:
            if (reason := get_panic_reason(again)) is None:
                raise
            return UnencodableTextError(index, texts[index], reason)
    return UnencodableTextError(0, texts[0], get_first_line(error))


def hash_tokenizer(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash what a tokenizer does to text."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Encode plain text without special tokens.

    Special tokens spelled out in the text stay ordinary text.
    """
    backend = tokenizer.backend_tokenizer
    before = backend.encode_special_tokens
    backend.encode_special_tokens = True
    try:
        return [encoding.ids for encoding in encode_batch(backend, texts)]
    finally:
        backend.encode_special_tokens = before


@contextmanager
def write_backend_file(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Write a tokenizer's backend to a temporary file for other processes.

    It is large, so each process reads it once, with `load_backend`.
    """
    with TemporaryDirectory() as folder:
        file = Path(folder, "tokenizer.json")
        file.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
        yield str(file)


@lru_cache(maxsize=1)
def load_backend(file: str) -> Tokenizer:
    """Load the backend in a file, without truncation and padding.

    The caller sets how it reads special tokens in texts.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(file)
    backend.no_truncation()
    backend.no_padding()
    return backend


def batch_texts(texts: Iterable[str]) -> Iterator[list[str]]:
    """Batch texts, for the tokenizers library to encode in parallel."""
    iterator = iter(texts)
    while chunk := list(islice(iterator, BATCH_TEXTS)):
        yield chunk
