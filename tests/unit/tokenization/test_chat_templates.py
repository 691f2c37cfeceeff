"""Conversations: the mask token by token, and rows that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from azrecipe.data import conversations as data_conversations
from azrecipe.tokenization import chat_templates
from azrecipe.tokenization.tokenizer import load_tokenizer

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
    chat_templates.set_chat_template(found, "llama3")
    return found


def test_the_loss_covers_the_answers_and_their_end_of_turn_and_nothing_else(tokenizer: Any) -> None:
    example = chat_templates.tokenize_conversation(tokenizer, TALK, 512, assistant_only=True)
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

    ours = chat_templates.tokenize_conversation(tokenizer, TALK, 512, assistant_only=True)
    tokenizer.chat_template = (files("trl") / "chat_templates" / "llama3_training.jinja").read_text()
    theirs = chat_templates.tokenize_conversation(tokenizer, TALK, 512, assistant_only=True)
    assert ours == theirs


def test_the_end_of_turn_is_where_generation_stops(tokenizer: Any) -> None:
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizer.pad_token != tokenizer.eos_token
    prompt = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, tokenize=False)
    assert prompt.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_conversation_cut_before_its_answer_has_nothing_to_train(tokenizer: Any) -> None:
    assert chat_templates.tokenize_conversation(tokenizer, TALK[1:3], 6, assistant_only=True).num_trained_tokens == 0
    assert chat_templates.tokenize_conversation(tokenizer, TALK[1:3], 512, assistant_only=False).num_trained_tokens > 0


def test_equal_conversations_are_one_and_never_move_sides() -> None:
    talks = [[{"role": "user", "content": str(n)}, {"role": "assistant", "content": "a"}] for n in range(200)]
    train, held, duplicates = data_conversations.split_held_out([*talks, *talks[:7]], 0.2)
    assert duplicates == 7
    assert len(train) + len(held) == 200
    assert 20 < len(held) < 60
    again_train, again_held, _ = data_conversations.split_held_out(talks[50:], 0.2)
    assert all(talk in train for talk in again_train)
    assert all(talk in held for talk in again_held)


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Random conversations, Azerbaijani among them: one or several turns, some with a system message."""
    import random

    draw = random.Random(42)
    words = ["Kənddə", "ağac", "şəhər", "çay", "gözəl", "the", "river", "2024", "üçün", "«ev»", "😀", "x\ny", "e\u0301", "бала"]

    def said() -> str:
        return " ".join(draw.choice(words) for _ in range(draw.randint(1, 12)))

    found = []
    for _ in range(count):
        talk = [{"role": "system", "content": said()}] if draw.random() < 0.4 else []
        for _ in range(draw.randint(1, 4)):
            talk += [{"role": "user", "content": said()}, {"role": "assistant", "content": said()}]
        found.append(talk)
    return found


@pytest.mark.parametrize("name", ["llama3", "qwen2_5", "gemma3", "phi3", "qwen3_instruct_2507"])
def test_masks_are_trls_own_on_a_thousand_conversations(llama: Path, name: str) -> None:
    """TRL's shipped training templates, tokenised by its SFTTrainer and by us; and our own template for Llama 3 against TRL's."""
    from importlib.resources import files

    from trl.trainer.sft_trainer import _tokenize

    tokenizer = load_tokenizer(str(llama))
    chat_templates._add_special_tokens(
        tokenizer, ("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>")
    )
    tokenizer.chat_template = (files("trl") / "chat_templates" / f"{name}_training.jinja").read_text()
    ours, theirs, own = [], [], []
    talks = conversations(1000)
    for talk in talks:
        example = chat_templates.tokenize_conversation(tokenizer, talk, 10_000, assistant_only=True)
        ours.append((example.input_ids, [label != -100 for label in example.labels]))
        found = _tokenize(tokenizer, talk, return_assistant_tokens_mask=True)
        theirs.append((list(found["input_ids"]), [bool(on) for on in found["assistant_masks"]]))
    assert ours == theirs
    if name == "llama3":
        chat_templates.set_chat_template(tokenizer, "llama3")
        for talk in talks:
            example = chat_templates.tokenize_conversation(tokenizer, talk, 10_000, assistant_only=True)
            own.append((example.input_ids, [label != -100 for label in example.labels]))
        assert own == theirs


@pytest.mark.parametrize("name", list(chat_templates.SHIPPED_TEMPLATES))
def test_a_shipped_template_trains_the_answers_and_the_end_of_turn_and_nothing_else(llama: Path, name: str) -> None:
    tokenizer = load_tokenizer(str(llama))
    new = chat_templates.set_chat_template(tokenizer, name)
    shipped = chat_templates.SHIPPED_TEMPLATES[name]
    assert [tokenizer.convert_ids_to_tokens(i) for i in new] == [t for t in shipped.special_tokens if name != "llama3"]
    assert tokenizer.eos_token == shipped.end_of_turn == chat_templates.find_end_of_turn(tokenizer) != tokenizer.pad_token
    for talk in conversations(50):
        example = chat_templates.tokenize_conversation(tokenizer, talk, 10_000, assistant_only=True)
        trained = tokenizer.decode([label for label in example.labels if label != -100])
        answers = [m["content"].strip() for m in talk if m["role"] == "assistant"]
        assert trained == "".join(answer + shipped.end_of_turn for answer in answers)
        prompt = tokenizer.apply_chat_template(talk[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert example.input_ids[: len(prompt)] == list(prompt)


def test_a_conversation_that_is_cut_ends_with_a_whole_turn(tokenizer: Any) -> None:
    whole = chat_templates.tokenize_conversation(tokenizer, TALK, 512, assistant_only=True)
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    for length in range(1, len(whole.input_ids)):
        cut = chat_templates.tokenize_conversation(tokenizer, TALK, length, assistant_only=True)
        assert cut.truncated
        assert len(cut.input_ids) <= length
        assert not cut.num_trained_tokens or cut.labels[-1] == eot
        assert cut.labels.count(eot) in (0, 1)


def test_a_template_without_an_end_of_turn_in_its_marks_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    from azrecipe.errors import CommandError

    file = tmp_path / "mine.jinja"
    for text, words in (
        ("{% for m in messages %}{{ m.content }}<|eot_id|>{% endfor %}", "does not mark the assistant's text"),
        (
            "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}<|eot_id|>{% endfor %}",
            "no special token that ends the assistant's turn",
        ),
    ):
        file.write_text(text)
        with pytest.raises(CommandError, match=words):
            chat_templates.set_chat_template(tokenizer, str(file))
    file.write_text(
        "{{ bos_token }}{% for m in messages %}{% generation %}{{ m.content }}<|end_header_id|>{% endgeneration %}\n{% endfor %}"
    )
    chat_templates.set_chat_template(tokenizer, str(file))
    assert tokenizer.eos_token == "<|end_header_id|>"


def test_padding_is_never_the_end_of_turn(llama: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    tokenizer.pad_token = "<|eot_id|>"
    chat_templates.set_chat_template(tokenizer, "llama3")
    assert tokenizer.pad_token == "<|finetune_right_pad_id|>"


def test_without_marks_the_end_of_turn_is_what_stands_behind_the_answer(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}\n{{ m.content }}<|eom_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
    )
    chat_templates.set_chat_template(tokenizer, str(file), marks=False)
    assert tokenizer.eos_token == "<|eom_id|>"
    cut = chat_templates.tokenize_conversation(tokenizer, TALK, 40, assistant_only=False)
    assert cut.truncated
    assert cut.labels[-1] == tokenizer.eos_token_id
