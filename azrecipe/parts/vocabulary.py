"""Tokenizers: opened, trained with another's rules, measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from azrecipe.errors import CannotRun
from azrecipe.parts.hub import opening
from azrecipe.parts.tokens import chunks, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Llama 3's split rule and special tokens, as Meta publishes them with the model (llama_models/llama3/tokenizer.py).
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)


def load_tokenizer(path: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """A fast tokenizer from a folder or the hub. Raises CannotRun, or CommandError for a folder that holds none."""
    from transformers import AutoTokenizer

    with opening("tokenizer", path):
        tokenizer = AutoTokenizer.from_pretrained(path, revision=revision or "main")
    if not getattr(tokenizer, "is_fast", False):
        raise CannotRun(f"the tokenizer of {path} has no fast version (tokenizer.json), which every stage needs")
    return tokenizer


def is_byte_level_bpe(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether tokens are byte strings in GPT-2's alphabet, merged by BPE: what Llama 3, Qwen and Mistral-Nemo use."""
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    return description["model"]["type"] == "BPE" and '"ByteLevel"' in json.dumps(description["pre_tokenizer"])


def train_like(base: PreTrainedTokenizerBase, texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A new byte-level BPE with the base's normaliser, pre-tokenizer, post-processor and special tokens.

    `vocab_size` counts special tokens and the 256 bytes. A corpus too small for it gives a smaller vocabulary. The
    corpus may be larger than memory.
    """
    trained = base.train_new_from_iterator(chunks(texts), vocab_size=vocab_size, show_progress=False)
    if base.chat_template is not None:
        trained.chat_template = base.chat_template
    return trained


def train_llama3(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A first byte-level BPE with Llama 3's pre-tokenizer and special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in LLAMA3_SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(chunks(texts), trainer=trainer)
    bos = LLAMA3_SPECIALS[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=LLAMA3_SPECIALS[1],
        pad_token=LLAMA3_SPECIALS[2],
        clean_up_tokenization_spaces=False,
    )


@dataclass(frozen=True)
class Measure:
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


def measure(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> Measure:
    """Count a tokenizer's tokens on documents of plain text."""
    tokens = sum(len(ids) for ids in encode(tokenizer, texts))
    return Measure(tokens, sum(len(text.split()) for text in texts), sum(len(text.encode()) for text in texts))


def same_vocabulary(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every token the same id, so that they can share embeddings."""
    return bool(a.get_vocab() == b.get_vocab())


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer so that AutoTokenizer opens it as it is now."""
    with contextlib.redirect_stdout(None):
        saved: Any = tokenizer.save_pretrained(folder)
    assert saved
