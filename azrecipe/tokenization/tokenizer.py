"""Load, inspect and save tokenizers."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import models

from azrecipe.errors import CannotRun
from azrecipe.utils.atomic_files import read_json, write_json
from azrecipe.utils.hub_errors import translate_hub_errors
from azrecipe.utils.template_limits import limit_chat_templates

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3's split rule and special tokens, as Meta publishes them with the model (llama_models/llama3/tokenizer.py).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Named split rules for custom tokenizers. Llama 3's reads the first letters of many suffixes as an English contraction
# (Azərbaycan'da → Azərbaycan | 'd | a) and splits a word at a combining mark; the other two do neither.
_LETTERS = r"[^\r\n\p{L}\p{M}\p{N}]?[\p{L}\p{M}]+"
_REST = r"|\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_RULES: Mapping[str, str] = {
    "llama3": LLAMA3_SPLIT,
    "split_apostrophe_suffixes": _LETTERS + _REST,
    "keep_apostrophe_suffixes": _LETTERS + r"(?:['’ʼʻ‘][\p{L}\p{M}]+)*" + _REST,
}


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer from a folder or the hub.

    Raises:
        CannotRun: It cannot be loaded, or has no fast version.
        CommandError: The folder holds no tokenizer.
    """
    from transformers import AutoTokenizer

    limit_chat_templates()
    with translate_hub_errors("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main", trust_remote_code=False)
    if not getattr(tokenizer, "is_fast", False):
        raise CannotRun(f"the tokenizer of {path} has no fast version (tokenizer.json), which every stage needs")
    return tokenizer


def is_byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer is a byte-level BPE.

    Those of Llama 3, Qwen and Mistral-Nemo are.

    Its tokens are byte strings in GPT-2's alphabet.
    """
    backend = tokenizer.backend_tokenizer
    return (
        isinstance(backend.model, models.BPE)
        and backend.pre_tokenizer is not None
        and b'"ByteLevel"' in backend.pre_tokenizer.__getstate__()
    )


def list_added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """List the tokens outside BPE, special or not.

    They are read as a whole, never merged, and no merges are learned from them.
    """
    return [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items())]


def _build_byte_alphabet() -> dict[str, int]:
    """Build GPT-2's alphabet, a character for each byte.

    Printable bytes spell themselves; the others are spelled from U+0100 on (gpt-2, src/encoder.py).
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(other)}


BYTE_ALPHABET = _build_byte_alphabet()


def get_token_bytes(token: str) -> bytes:
    """Get the bytes of a byte-level token.

    An added token that is not in the byte alphabet gives its name as UTF-8.
    """
    return bytes(BYTE_ALPHABET[c] for c in token) if all(c in BYTE_ALPHABET for c in token) else token.encode()


def count_embedding_rows(tokenizer: PreTrainedTokenizerBase) -> int:
    """Count the embedding rows for a tokenizer's ids.

    These are more than its tokens where it leaves out ids.
    """
    highest: int = max(tokenizer.get_vocab().values())
    return highest + 1


def have_same_vocabulary(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every token the same id."""
    return bool(first.get_vocab() == second.get_vocab())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save a tokenizer so that transformers 5 and 4 load it unchanged."""
    with contextlib.redirect_stdout(None):
        saved: Any = tokenizer.save_pretrained(folder)
    assert saved
    file = folder / "tokenizer_config.json"
    write_json(file, _use_legacy_names(read_json(file), tokenizer))


def _use_legacy_names(data: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return a tokenizer_config.json whose names transformers 4 knows.

    transformers 5 reads both.
    """
    renamed = {key: value for key, value in data.items() if key != "extra_special_tokens"}
    extra_special_tokens = data.get("extra_special_tokens")
    if isinstance(extra_special_tokens, dict):  # tokens by name are the same in both
        renamed["extra_special_tokens"] = extra_special_tokens
    elif extra_special_tokens:
        renamed["additional_special_tokens"] = extra_special_tokens
    if data.get("tokenizer_class") == "TokenizersBackend":
        renamed["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(tokenizer.chat_template, str):  # also in chat_template.jinja, which older programs do not read
        renamed["chat_template"] = tokenizer.chat_template
    return dict(sorted(renamed.items()))
