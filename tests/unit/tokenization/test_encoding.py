"""A text that the tokenizers library panics on is named, with its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from azrecipe.data.tokenized_cache import TokenizeSpec, load_or_tokenize
from azrecipe.errors import RecipeError
from azrecipe.tokenization.chat_templates import render_conversation
from azrecipe.tokenization.encoding import UnencodableTextError, encode_texts
from azrecipe.tokenization.fast_encoding import FastEncoder
from azrecipe.tokenization.tokenizer import LLAMA3_SPLIT
from azrecipe.tokenization.tokenizer_metrics import count_tokens
from azrecipe.utils.process_pool import WorkerPool
from tests.conftest import jsonl, write
from tests.unit.data.test_sources import source

EXPLODING = r"(?:#|##)+[^#a]|"  # with nothing behind the last #, the engine of the library tries each way to take them, and gives up
PANIC = "salam\n" + "#" * 60


@pytest.fixture
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    split = pre_tokenizers.Split(Regex(EXPLODING + LLAMA3_SPLIT), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


def test_the_text_is_named_by_its_number_and_beginning(tokenizer: Any) -> None:
    with pytest.raises(
        UnencodableTextError, match=r"fails on a text of 66 characters, which begins with 'salam #+': .*retry-limit"
    ) as caught:
        encode_texts(tokenizer, ["a", "b", PANIC, "c"])
    assert caught.value.index == 2 and caught.value.exit_code == 2
    assert [len(ids) for ids in encode_texts(tokenizer, ["a", "bc"])] == [1, 2]


@pytest.mark.long
def test_ten_million_spaces_are_named(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    with pytest.raises(UnencodableTextError, match="fails on a text of 10,000,002 characters") as caught:
        FastEncoder(tokenizer.backend_tokenizer)(["a", "b" + " " * 10_000_000 + "c"])
    assert caught.value.index == 1


def test_a_conversation_is_named(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(UnencodableTextError, match="begins with 'salam #"):
        render_conversation(tokenizer, [{"role": "user", "content": "x"}, {"role": "assistant", "content": PANIC}], False)


def test_held_out_text_is_named(tokenizer: Any) -> None:
    with WorkerPool(1) as workers, pytest.raises(UnencodableTextError, match="begins with 'salam #"):
        count_tokens(workers, tokenizer, {"held": ["x", PANIC]})


@pytest.mark.parametrize("count", [1, 2])
def test_a_document_of_a_source_is_named_by_its_line(tokenizer: Any, tmp_path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("azrecipe.utils.process_pool.count_cores", lambda: count)
    monkeypatch.setattr("azrecipe.data.tokenized_cache.MIN_POOL_CHARACTERS", 1)
    file = write(tmp_path / "a.jsonl", jsonl(*({"text": f"sətir {n}"} for n in range(7)), {"text": PANIC}, {"text": "son"}))
    with pytest.raises(RecipeError, match=r"r.yaml:1:1: .*a.jsonl:8:1: the tokenizer fails on a text of 66 characters"):
        load_or_tokenize(source(file), TokenizeSpec(tokenizer, frozenset()), tmp_path / "cache")
