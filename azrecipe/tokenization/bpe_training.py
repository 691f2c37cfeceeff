"""Byte-level BPE tokenizers, trained with another tokenizer's rules."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from azrecipe.errors import CannotRun
from azrecipe.tokenization.encoding import batch_texts, translate_panics
from azrecipe.tokenization.tokenizer import LLAMA3_SPLIT, SPLIT_RULES, is_byte_level_bpe, list_added_tokens, load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ENCODING_PARTS = (
    "normalizer",
    "pre_tokenizer",
    "post_processor",
    "decoder",
    "model",
    "added_tokens",
)  # of tokenizer.json, all that decides an encoding
MIN_PAIR_COUNT = 2  # a pair that occurs once says nothing about the language
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


def build_byte_level_splitter(split: str) -> Any:
    """Build a pre-tokenizer that splits by a regular expression, then into bytes.

    The bytes are spelled in GPT-2's byte alphabet.
    """
    steps = [pre_tokenizers.Split(Regex(split), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


def train_like(
    base: PreTrainedTokenizerBase, texts: Iterable[str], vocab_size: int, pre_tokenizer: str = "base"
) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE with the rules of a base.

    It has the base's normaliser, post-processor, chat template and added tokens, special or not.

    Args:
        base: The base.
        texts: The corpus; it may be larger than memory.
        vocab_size: The size of the vocabulary, with added tokens and the 256 bytes, which come first. A corpus in which no
            more pairs occur twice gives a smaller one.
        pre_tokenizer: "base" for the pre-tokenizer of the base, or a name in SPLIT_RULES.

    Raises:
        CannotRun: The pre-tokenizer is "base" and the base is not a byte-level BPE, or its class does not load as it was
            saved.
    """
    old = json.loads(base.backend_tokenizer.to_str())
    is_byte_level = is_byte_level_bpe(base)
    if pre_tokenizer == "base" and not is_byte_level:
        raise CannotRun(
            f"the base tokenizer is not a byte-level BPE: a custom one needs a pre_tokenizer of its own ({', '.join(SPLIT_RULES)})"
        )
    backend = Tokenizer(models.BPE(ignore_merges=bool(old["model"].get("ignore_merges", False))))
    if is_byte_level and old["normalizer"]:
        backend.normalizer = base.backend_tokenizer.normalizer
    backend.pre_tokenizer = (
        base.backend_tokenizer.pre_tokenizer if pre_tokenizer == "base" else build_byte_level_splitter(SPLIT_RULES[pre_tokenizer])
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=MIN_PAIR_COUNT,
        special_tokens=list_added_tokens(base),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with translate_panics("training a tokenizer"):
        backend.train_from_iterator(batch_texts(texts), trainer=trainer)
    new = json.loads(backend.to_str())
    ids = new["model"]["vocab"]
    new["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in old["added_tokens"]]
    new["post_processor"] = _renumber_tokens(old["post_processor"], ids)
    return replace_backend(base, Tokenizer.from_str(json.dumps(new)))


def _renumber_tokens(post_processor: Any, ids: Mapping[str, int]) -> Any:
    """Renumber the special tokens in a post-processor, however deep."""
    if isinstance(post_processor, list):
        return [_renumber_tokens(entry, ids) for entry in post_processor]
    if not isinstance(post_processor, dict):
        return post_processor
    renumbered = {key: _renumber_tokens(value, ids) for key, value in post_processor.items()}
    if isinstance(renumbered.get("tokens"), list) and "ids" in renumbered:
        renumbered["ids"] = [ids[token] for token in renumbered["tokens"]]
    for key in ("cls", "sep"):  # BertProcessing's and RobertaProcessing's pairs of token and id
        if isinstance(renumbered.get(key), list):
            renumbered[key] = [renumbered[key][0], ids[renumbered[key][0]]]
    return renumbered


def shorten_vocabulary(trained: PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedTokenizerBase:
    """Shorten a trained vocabulary to a smaller size.

    This is what `train_like` returns for the smaller size on the same text, since BPE's merges nest. A tokenizer that has no
    more tokens is returned as it is.
    """
    if len(trained) <= vocab_size:
        return trained
    description = json.loads(trained.backend_tokenizer.to_str())
    model = description["model"]
    vocabulary: dict[str, int] = {token: i for token, i in model["vocab"].items() if i < vocab_size}
    model["vocab"] = vocabulary
    model["merges"] = list(_take_merges(model["merges"], vocabulary))
    return _copy_with_backend(trained, Tokenizer.from_str(json.dumps(description)))


def _take_merges(merges: Iterable[list[str]], vocabulary: Mapping[str, int]) -> Iterator[list[str]]:
    """Yield the merges up to that of the vocabulary's last token."""
    last = max(vocabulary, key=vocabulary.__getitem__)
    for first, second in merges:
        if first + second not in vocabulary:
            return
        yield [first, second]
        if first + second == last:
            return


def replace_backend(base: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerBase:
    """Copy a tokenizer with another backend.

    The copy has the settings, special tokens and chat template.

    Some classes build a backend of their own when they are loaded. Then, and where the base is not byte-level itself, the
    copy has transformers' general class.

    Raises:
        CannotRun: AutoTokenizer does not load the copy as it was saved.
    """
    tokenizer = _copy_with_backend(base, backend)
    if is_byte_level_bpe(base) and _loads_as_saved(tokenizer):
        return tokenizer
    from transformers import PreTrainedTokenizerFast

    settings = {name: getattr(base, name) for name in ("model_max_length", "padding_side", "truncation_side", "model_input_names")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **settings, **base.special_tokens_map)
    tokenizer.chat_template = base.chat_template
    if not _loads_as_saved(tokenizer):
        raise CannotRun(f"a tokenizer made from one of class {type(base).__name__} does not load as it was saved")
    return tokenizer


def _copy_with_backend(base: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerBase:
    return copy.deepcopy(base, {id(base.backend_tokenizer): backend})


def _loads_as_saved(tokenizer: PreTrainedTokenizerBase) -> bool:
    with TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        loaded = load_tokenizer(folder)
    before, after = (json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, loaded))
    return loaded.get_vocab() == tokenizer.get_vocab() and all(before[part] == after[part] for part in ENCODING_PARTS)


def train_llama3(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE with Llama 3's pre-tokenizer and special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = build_byte_level_splitter(LLAMA3_SPLIT)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in LLAMA3_SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with translate_panics("training a tokenizer"):
        tokenizer.train_from_iterator(batch_texts(texts), trainer=trainer)
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
