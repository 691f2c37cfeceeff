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
from azrecipe.tokenization.encoding import chunks
from azrecipe.tokenization.tokenizer import LLAMA3_SPLIT, SPLITS, added_names, is_byte_level_bpe, load_tokenizer, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model", "added_tokens")  # all that decides an encoding
LEAST = 2  # a pair that the corpus holds once says nothing about the language
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


def byte_level(split: str) -> Any:
    """A pre-tokenizer that cuts by a regular expression and spells the pieces in GPT-2's byte alphabet."""
    parts = [pre_tokenizers.Split(Regex(split), behavior="isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(parts)


def train_like(
    base: PreTrainedTokenizerBase, texts: Iterable[str], vocab_size: int, pre_tokenizer: str = "base"
) -> PreTrainedTokenizerBase:
    """A new byte-level BPE with the base's normaliser, post-processor, chat template and added tokens, special or not.

    `pre_tokenizer`: "base" for the base's own, or a name in SPLITS. `vocab_size` counts added tokens and the 256 bytes, which
    come first. A corpus with no pair left that stands in it twice gives a smaller vocabulary. The corpus may be larger than memory. Raises CannotRun for
    "base" with a base that is not a byte-level BPE, or whose class does not open again as it was saved.
    """
    old = json.loads(base.backend_tokenizer.to_str())
    native = is_byte_level_bpe(base)
    if pre_tokenizer == "base" and not native:
        raise CannotRun(f"the base tokenizer is not a byte-level BPE: a custom one needs a pre_tokenizer of its own ({', '.join(SPLITS)})")
    blank = Tokenizer(models.BPE(ignore_merges=bool(old["model"].get("ignore_merges", False))))
    if native and old["normalizer"]:
        blank.normalizer = base.backend_tokenizer.normalizer
    blank.pre_tokenizer = base.backend_tokenizer.pre_tokenizer if pre_tokenizer == "base" else byte_level(SPLITS[pre_tokenizer])
    blank.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=LEAST,
        special_tokens=added_names(base),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    blank.train_from_iterator(chunks(texts), trainer=trainer)
    new = json.loads(blank.to_str())
    ids = new["model"]["vocab"]
    new["added_tokens"] = [{**token, "id": ids[token["content"]]} for token in old["added_tokens"]]
    new["post_processor"] = _renumbered(old["post_processor"], ids)
    return with_backend(base, Tokenizer.from_str(json.dumps(new)))


def _renumbered(post_processor: Any, ids: Mapping[str, int]) -> Any:
    """A post-processor with the special tokens that it names at their new ids, however deep it names them."""
    if isinstance(post_processor, list):
        return [_renumbered(part, ids) for part in post_processor]
    if not isinstance(post_processor, dict):
        return post_processor
    made = {key: _renumbered(value, ids) for key, value in post_processor.items()}
    if isinstance(made.get("tokens"), list) and "ids" in made:
        made["ids"] = [ids[token] for token in made["tokens"]]
    for key in ("cls", "sep"):  # BertProcessing's and RobertaProcessing's pairs of token and id
        if isinstance(made.get(key), list):
            made[key] = [made[key][0], ids[made[key][0]]]
    return made


def shorter(trained: PreTrainedTokenizerBase, vocab_size: int) -> PreTrainedTokenizerBase:
    """What `train_like` gives for a smaller `vocab_size` on the same text, without training: BPE's merges nest.

    Returns the same tokenizer where it has no more tokens than that.
    """
    if len(trained) <= vocab_size:
        return trained
    description = json.loads(trained.backend_tokenizer.to_str())
    model = description["model"]
    vocabulary: dict[str, int] = {token: i for token, i in model["vocab"].items() if i < vocab_size}
    model["vocab"] = vocabulary
    model["merges"] = list(_until(model["merges"], vocabulary))
    return _around(trained, Tokenizer.from_str(json.dumps(description)))


def _until(merges: Iterable[list[str]], vocabulary: Mapping[str, int]) -> Iterator[list[str]]:
    """The merges up to the one that made the vocabulary's last token: training ends with it."""
    last = max(vocabulary, key=vocabulary.__getitem__)
    for left, right in merges:
        if left + right not in vocabulary:
            return
        yield [left, right]
        if left + right == last:
            return


def with_backend(base: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerBase:
    """The base's settings, special tokens and chat template around another backend.

    Raises CannotRun unless AutoTokenizer opens it, saved, as it is: some classes build a backend of their own. Then, and where
    the base is not byte-level itself, the class is transformers' general one.
    """
    made = _around(base, backend)
    if is_byte_level_bpe(base) and _opens_as_saved(made):
        return made
    from transformers import PreTrainedTokenizerFast

    kept = {name: getattr(base, name) for name in ("model_max_length", "padding_side", "truncation_side", "model_input_names")}
    made = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **kept, **base.special_tokens_map)
    made.chat_template = base.chat_template
    if not _opens_as_saved(made):
        raise CannotRun(f"a tokenizer made from one of class {type(base).__name__} does not open again as it was saved")
    return made


def _around(base: PreTrainedTokenizerBase, backend: Tokenizer) -> PreTrainedTokenizerBase:
    return copy.deepcopy(base, {id(base.backend_tokenizer): backend})


def _opens_as_saved(tokenizer: PreTrainedTokenizerBase) -> bool:
    with TemporaryDirectory() as folder:
        save_tokenizer(tokenizer, Path(folder))
        opened = load_tokenizer(folder)
    before, after = (json.loads(t.backend_tokenizer.to_str()) for t in (tokenizer, opened))
    return opened.get_vocab() == tokenizer.get_vocab() and all(before[part] == after[part] for part in PARTS)


def train_llama3(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A first byte-level BPE with Llama 3's pre-tokenizer and special tokens."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level(LLAMA3_SPLIT)
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
