"""Conversations: the mask token by token, and rows that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from azrecipe.parts import chat, templates
from azrecipe.parts.vocabulary import load_tokenizer

TALK = [
    {"role": "system", "content": "Qısa cavab ver."},
    {"role": "user", "content": "Salam!"},
    {"role": "assistant", "content": "Əleyküm salam."},
    {"role": "user", "content": "Necəsən?"},
    {"role": "assistant", "content": "Yaxşıyam."},
]


@pytest.fixture
def tokenizer(llama: Path) -> Any:
    found = load_tokenizer(str(llama))
    templates.apply_template(found, "llama3")
    return found


def test_the_loss_covers_the_answers_and_their_end_of_turn_and_nothing_else(tokenizer: Any) -> None:
    example = templates.tokenize(tokenizer, TALK, 512, assistant_only=True)
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    expected: list[tuple[int, bool]] = [(tokenizer.bos_token_id, False)]
    for message in TALK:
        for text, trained in ((header.format(message["role"]), False), (message["content"] + "<|eot_id|>", message["role"] == "assistant")):
            expected += [(i, trained) for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert example.input_ids == [i for i, _ in expected]
    assert example.labels == [i if trained else -100 for i, trained in expected]
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert example.labels.count(eot) == 2
    assert example.input_ids.count(tokenizer.bos_token_id) == 1


def test_the_mask_is_the_one_that_trl_takes_from_its_own_llama3_template(tokenizer: Any) -> None:
    from importlib.resources import files

    ours = templates.tokenize(tokenizer, TALK, 512, assistant_only=True)
    tokenizer.chat_template = (files("trl") / "chat_templates" / "llama3_training.jinja").read_text()
    theirs = templates.tokenize(tokenizer, TALK, 512, assistant_only=True)
    assert ours == theirs


def test_the_end_of_turn_is_where_generation_stops(tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.pad_token != tokenizer.eos_token
    prompt = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_conversation_cut_before_its_answer_has_nothing_to_train(tokenizer: Any) -> None:
    assert templates.tokenize(tokenizer, TALK[1:3], 6, assistant_only=True).trained == 0
    assert templates.tokenize(tokenizer, TALK[1:3], 512, assistant_only=False).trained > 0


def test_equal_conversations_are_one_and_never_move_sides() -> None:
    talks = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "a"}] for n in range(200)]
    train, held, duplicates = chat.split([*talks, *talks[:7]], 0.2)
    assert duplicates == 7
    assert len(train) + len(held) == 200
    assert 20 < len(held) < 60
    again_train, again_held, _ = chat.split(talks[50:], 0.2)
    assert all(talk in train for talk in again_train)
    assert all(talk in held for talk in again_held)
