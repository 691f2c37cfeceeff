"""Tokenizers: opened, measured and saved."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import models

from azrecipe.errors import CannotRun
from azrecipe.tokenization.encoding import encode_texts
from azrecipe.utils.hub_errors import translate_hub_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3's split rule and special tokens, as Meta publishes them with the model (llama_models/llama3/tokenizer.py).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Named split rules for custom tokenizers. Llama 3's takes the first letters of many suffixes for an English contraction
# (Azərbaycan'da → Azərbaycan | 'd | a) and cuts a word at a combining mark; the other two have no such branch.
_LETTERS = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
_REST = r"|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_RULES: Mapping[str, str] = {
    "llama3": LLAMA3_SPLIT,
    "split_apostrophe_suffixes": _LETTERS + _REST,
    "keep_apostrophe_suffixes": _LETTERS + r"(?:['’ʼʻ‘][\p{L}\p{M}]+)*" + _REST,
}


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a folder or the hub. Raises CannotRun, or CommandError for a folder that holds none."""
    from transformers import AutoTokenizer

    with translate_hub_errors("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main")
    if not getattr(tokenizer, "is_fast", False):
        raise CannotRun(f"the tokenizer of {path} has no fast version (tokenizer.json), which every stage needs")
    return tokenizer


def is_byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens are byte strings in GPT-2's alphabet, merged by BPE: what Llama 3, Qwen and Mistral-Nemo use."""
    backend = tokenizer.backend_tokenizer
    return (
        isinstance(backend.model, models.BPE)
        and backend.pre_tokenizer is not None
        and b'"ByteLevel"' in backend.pre_tokenizer.__getstate__()
    )


def list_added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that stand outside BPE, special or not: they are read whole, never merged and never trained on."""
    return [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]


@dataclass(frozen=True)
class TokenizerMeasure:
    """A tokenizer on held-out text. Sums over the whole set, never means of ratios."""

    tokens: int
    words: int
    bytes: int

    @property
    def fertility(self) -> float:
        """Tokens a word; a word is what white space separates. No special tokens are counted."""
        return self.tokens / self.words

    @property
    def bytes_per_token(self) -> float:
        """Bytes of UTF-8 text a token."""
        return self.bytes / self.tokens


def measure_tokenizer(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> TokenizerMeasure:
    """Count a tokenizer's tokens on documents of plain text."""
    tokens = sum(len(ids) for ids in encode_texts(tokenizer, texts))
    return TokenizerMeasure(tokens, sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts))


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's spelling of bytes as characters: printable ones as they are, the others from U+0100 on (gpt-2, src/encoder.py)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}


BYTE_ALPHABET = _byte_alphabet()


def get_token_bytes(token: str) -> bytes:
    """The bytes that a byte-level token stands for; an added token's name as UTF-8 where it is not in the byte alphabet."""
    return bytes(BYTE_ALPHABET[c] for c in token) if all(c in BYTE_ALPHABET for c in token) else token.encode()


def count_embedding_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """The rows of embeddings that a tokenizer's ids need: more than it has tokens where it leaves out ids."""
    highest: int = max(tokenizer.get_vocab().values())
    return highest + 1


def have_same_vocabulary(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every token the same id, so that they can share embeddings."""
    return bool(a.get_vocab() == b.get_vocab())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that AutoTokenizer opens it as it is now."""
    with contextlib.redirect_stdout(None):
        saved: Any = tokenizer.save_pretrained(folder)
    assert saved
