"""Unit tests of the previews of `azrecipe check`."""

from __future__ import annotations

from typing import Any

import pytest

from azrecipe.cli.check_preview import format_example
from azrecipe.data.finetuning_examples import PreferenceExample
from azrecipe.operations.check_preview import MAX_EXAMPLE_TOKENS, build_example_preview
from azrecipe.tokenization.chat_templates import TokenizedExample
from azrecipe.tokenization.encoding import IGNORE_INDEX


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_trained_tokens_are_marked_and_characters_stay_whole(tokenizer: Any) -> None:
    prompt, answer = encode(tokenizer, "ab"), encode(tokenizer, "cə")
    assert len(answer) == 3  # ə is two bytes
    example = TokenizedExample(prompt + answer, [IGNORE_INDEX] * len(prompt) + answer)
    assert format_example(build_example_preview(tokenizer, example), colour=False).plain == "a·b⟦c·ə⟧"
    coloured = format_example(build_example_preview(tokenizer, example), colour=True)
    assert coloured.plain == "a·bc·ə"
    assert [coloured.plain[span.start : span.end] for span in coloured.spans if "green" in str(span.style)] == ["c", "ə"]


def test_long_examples_are_cut_with_a_count(tokenizer: Any) -> None:
    ids = encode(tokenizer, "a" * (MAX_EXAMPLE_TOKENS + 7))
    assert format_example(build_example_preview(tokenizer, TokenizedExample(ids, ids)), colour=False).plain.endswith("⟧ … 7 tokens more")


def test_both_answers_of_a_preference_can_be_shown(tokenizer: Any) -> None:
    example = PreferenceExample(encode(tokenizer, "q"), encode(tokenizer, "yes"), encode(tokenizer, "no"))
    assert format_example(build_example_preview(tokenizer, example.to_example(True)), colour=False).plain == "q⟦y·e·s⟧"
    assert format_example(build_example_preview(tokenizer, example.to_example(False)), colour=False).plain == "q⟦n·o⟧"
