"""generate and chat on a very small model: what is streamed, what is remembered, what is refused."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from azrecipe.data import conversations
from azrecipe.data.readers import DataSource
from azrecipe.errors import SourceLocation
from azrecipe.inference import streaming
from azrecipe.inference.chat import ChatSession
from azrecipe.recipe.types import ConversationSource
from azrecipe.runs import finished_model
from azrecipe.tokenization import chat_templates
from azrecipe.utils.atomic_files import read_json, write_json
from tests.conftest import Done, write
from tests.small import Started

# An untrained model with tied embeddings says its last token again, here a line break; the penalty makes it say other things.
PENALTY = 3.0
GREEDY = streaming.GenerationSettings(max_new_tokens=24, temperature=0.0, top_p=1.0, repetition_penalty=PENALTY)
SAMPLED = streaming.GenerationSettings(max_new_tokens=24, temperature=1.0, top_p=0.9, repetition_penalty=1.1)


@pytest.fixture(autouse=True)
def interruptible() -> Iterator[None]:
    """Ctrl-C reaches this process and its children, even where the tests run as a job in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def speaker(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small Llama with Llama 3's chat template, as instruction tuning leaves one: EOS is the end of turn."""
    from azrecipe.tokenization.tokenizer import load_tokenizer, save_tokenizer

    folder = shutil.copytree(llama, tmp_path_factory.mktemp("chat") / "speaker")
    tokenizer = load_tokenizer(str(folder))
    chat_templates.set_chat_template(tokenizer, "llama3")
    save_tokenizer(tokenizer, folder)
    settings = read_json(folder / "generation_config.json")
    # do_sample and its kin as hub models have them: they must not make greedy writing sample
    write_json(
        folder / "generation_config.json", {**settings, "eos_token_id": [tokenizer.eos_token_id], "do_sample": True, "temperature": 0.6}
    )
    return folder


@pytest.fixture(scope="module")
def writer(speaker: Path) -> streaming.StreamingGenerator:
    return streaming.open_reader(finished_model.resolve_model(str(speaker))).load_generator("float32")


@pytest.fixture
def talk(cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, speaker: Path) -> Callable[..., Done]:
    """azrecipe chat with these lines on its stdin."""

    def call(
        *lines: str,
        arguments: tuple[str, ...] = ("--max-new-tokens", "12", "--repetition-penalty", str(PENALTY)),
        model: Path | None = None,
    ) -> Done:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("".join(f"{line}\n" for line in lines).encode()), encoding="utf-8"))
        return cli("chat", model or speaker, *arguments)

    return call


def plain(writer: streaming.StreamingGenerator, ids: list[int], settings: streaming.GenerationSettings, seed: int) -> str:
    """The same by transformers alone, in one piece."""
    import torch

    torch.manual_seed(seed)
    ways: dict[str, Any] = {"do_sample": True, "temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    prompt = torch.tensor([ids])
    out = writer.model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=settings.max_new_tokens,
        repetition_penalty=settings.repetition_penalty, **(ways if settings.temperature else {"do_sample": False}),
    )  # fmt: skip
    return str(writer.reader.tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True))


@pytest.mark.parametrize("settings", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_what_is_streamed_is_what_generate_writes(writer: streaming.StreamingGenerator, settings: streaming.GenerationSettings) -> None:
    ids = writer.reader.render([{"role": "user", "content": "Kənddə kim yaşayırdı?"}])
    pieces: list[str] = []
    streaming.seed_sampling(5)
    answer = writer.generate(ids, settings, pieces.append)
    assert "".join(pieces) == answer.text == plain(writer, ids, settings, 5)
    assert len(pieces) > 1


def test_characters_are_shown_whole(writer: streaming.StreamingGenerator) -> None:
    import torch

    text = "Gəl, 😀 şəhərə! 木"
    ids = writer.reader.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)  # characters of several tokens
    pieces: list[str] = []
    stream = streaming._CharacterStreamer(writer.reader.tokenizer, pieces.append)
    stream.put(torch.tensor([[1, 2]]))
    for i in ids:
        stream.put(torch.tensor([i]))
    assert "".join(pieces) == text  # before the end: nothing waits for a space
    assert not any(streaming.REPLACEMENT_CHARACTER in piece for piece in pieces)
    stream.end()
    assert "".join(pieces) == text


def test_a_character_that_is_never_finished_is_shown_at_the_end(writer: streaming.StreamingGenerator) -> None:
    import torch

    pieces: list[str] = []
    stream = streaming._CharacterStreamer(writer.reader.tokenizer, pieces.append)
    stream.put(torch.tensor([[1]]))
    for i in writer.reader.tokenizer("a😀", add_special_tokens=False)["input_ids"][:-1]:
        stream.put(torch.tensor([i]))
    assert pieces == ["a"]
    stream.end()
    assert stream.text.startswith("a") and set(stream.text[1:]) == {streaming.REPLACEMENT_CHARACTER}


def test_ctrl_c_ends_an_answer_and_keeps_what_was_written(writer: streaming.StreamingGenerator) -> None:
    pieces: list[str] = []

    def shown(piece: str) -> None:
        pieces.append(piece)
        if len(pieces) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    ids = writer.reader.render([{"role": "user", "content": "Salam"}])
    answer = writer.generate(ids, streaming.GenerationSettings(200, 0.0, 1.0, PENALTY), shown)
    assert answer.stop_reason == "stopped"
    assert answer.num_tokens < 200
    assert answer.text == "".join(pieces)


def test_an_answer_ends_at_the_end_of_turn(writer: streaming.StreamingGenerator) -> None:
    import torch

    ids = writer.reader.render([{"role": "user", "content": "Salam"}])
    assert writer.generate(ids, GREEDY, lambda _: None).stop_reason == "length"
    settings = writer.model.generation_config
    before = settings.eos_token_id
    out = writer.model.generate(torch.tensor([ids]), max_new_tokens=4, do_sample=False, repetition_penalty=PENALTY)
    settings.eos_token_id = [int(out[0, -1])]
    try:
        answer = writer.generate(ids, GREEDY, lambda _: None)
    finally:
        settings.eos_token_id = before
    assert (answer.stop_reason, answer.num_tokens) == ("end", 4)


def test_greedy_is_the_same_twice_and_sampling_for_a_seed(cli: Callable[..., Done], speaker: Path) -> None:
    def written(*options: str) -> str:
        done = cli("generate", speaker, "--prompt", "Bağda nə var?", "--max-new-tokens", 20, "--repetition-penalty", PENALTY, *options)
        assert done.code == 0
        return done.out

    assert written().strip()
    assert written() == written() == written("--seed", "7")
    sampled = written("--temperature", "1", "--seed", "3")
    assert sampled == written("--temperature", "1", "--seed", "3")
    assert sampled != written("--temperature", "1", "--seed", "4")


def test_a_prompt_is_answered_the_same_alone_and_among_others(cli: Callable[..., Done], speaker: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "prompts.txt", "Salam\n\nNecəsən?\n")
    options = ("--temperature", 1, "--max-new-tokens", 10, "--json")
    both = cli("generate", speaker, "--file", file, *options)
    alone = cli("generate", speaker, "--prompt", "Necəsən?", *options)
    lines = [json.loads(line) for line in both.out.splitlines()]
    assert [line["prompt"] for line in lines] == ["Salam", "Necəsən?"]
    assert lines[1] == json.loads(alone.out)
    assert lines[1].keys() == {"prompt", "form", "output", "tokens", "ended"}


def test_a_base_model_continues_text_and_does_not_chat(cli: Callable[..., Done], talk: Callable[..., Done], llama: Path) -> None:
    done = cli("generate", llama, "--prompt", "Kənddə bir", "--max-new-tokens", 4, "--json")
    assert json.loads(done.out)["form"] == "text"
    done = cli("generate", llama, "--prompt", "Salam", "--chat")
    assert done.code == 2 and "no chat template" in done.err and "--text" in done.err
    done = talk("Salam", model=llama)
    assert done.code == 2 and "generate --text" in done.err and "stage: sft" in done.err
    assert "loading" not in done.err


def test_what_cannot_be_answered_is_refused_before_the_weights_are_read(cli: Callable[..., Done], speaker: Path, tmp_path: Path) -> None:
    done = cli("generate", speaker, "--prompt", "uşaqlar " * 200, "--prompt", "Salam")
    assert done.code == 2 and "256 tokens" in done.err and "loading" not in done.err
    assert cli("generate", speaker).code == 2
    assert cli("generate", speaker, "--file", tmp_path / "none.txt").code == 2
    assert "not UTF-8" in cli("generate", speaker, "--file", write(tmp_path / "latin.txt", "\xfc".encode("latin-1"))).err
    assert cli("generate", speaker, "--prompt", "x", "--temperature", -1).code == 2
    assert cli("generate", speaker, "--prompt", "x", "--chat", "--text").code == 2


def test_a_turn_is_asked_with_the_whole_conversation_before_it(
    writer: streaming.StreamingGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = ChatSession(writer, GREEDY, seed=1)
    talk.reset("Qısa danış.")
    for question in ("Salam", "Bəs sonra?"):
        talk.ask(question)
    first = talk.messages[:4]
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    ids = writer.reader.tokenizer.apply_chat_template(first, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert talk.messages[4]["content"] == plain(writer, list(ids), GREEDY, 1)
    assert capsys.readouterr().out == f"{talk.messages[2]['content']}\n{talk.messages[4]['content']}\n"


def test_reset_forgets_and_keeps_the_system_message(talk: Callable[..., Done]) -> None:
    arguments = ("--system", "Qısa danış.", "--temperature", "1", "--max-new-tokens", "12")
    alone = talk("Kim gəldi?", arguments=arguments)
    after = talk("Salam", "Necəsən?", "/reset", "Kim gəldi?", arguments=arguments)
    kept = talk("Salam", "Necəsən?", "Kim gəldi?", arguments=arguments)
    assert alone.out.strip()
    assert after.code == 0 and after.out.endswith(alone.out)
    assert not kept.out.endswith(alone.out)


def test_a_saved_conversation_is_training_data(talk: Callable[..., Done], tmp_path: Path) -> None:
    file = write(
        tmp_path / "kept.jsonl", '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    )  # no newline
    done = talk(f"/save {file}", "Salam", f"/save {file}", "/system Qısa danış.", "Kim?", "Niyə?", f"/save {file}", "/exit", "never asked")
    assert done.code == 0 and "nothing to save" in done.err
    read = conversations.read_conversations(
        DataSource(ConversationSource(path=str(file), split="train"), SourceLocation("recipe.yaml", 1, 1))
    )
    assert [[m["role"] for m in messages] for messages in read] == [
        ["user", "assistant"], ["user", "assistant"], ["system", "user", "assistant", "user", "assistant"],
    ]  # fmt: skip
    assert done.out == "".join(f"{m['content']}\n" for m in [*read[1], *read[2]] if m["role"] == "assistant")
    assert "cut short" in done.err  # twelve tokens are no whole answer, and who trains on it should know


def test_save_leaves_another_file_alone(talk: Callable[..., Done], tmp_path: Path) -> None:
    notes = write(tmp_path / "notes.txt", "Do not lose me.\n")
    done = talk("Salam", f"/save {notes}", f"/save {tmp_path / 'no' / 'folder.jsonl'}", "/save", "/sav x", "/help")
    assert done.code == 0
    assert notes.read_text() == "Do not lose me.\n"
    assert "not saved" in done.err and "there is no command /sav" in done.err and "/reset" in done.err


def test_a_long_conversation_loses_its_oldest_turns_and_says_so(
    writer: streaming.StreamingGenerator, capsys: pytest.CaptureFixture[str]
) -> None:
    talk = ChatSession(writer, GREEDY, seed=1)
    talk.reset("Qısa danış.")
    for n in range(8):
        talk.ask(f"Sual {n}: yay gələndə uşaqlar nə edir?")
    told = capsys.readouterr().err
    assert "outgrew the model's 256 tokens" in told
    assert talk.messages[0] == {"role": "system", "content": "Qısa danış."}
    assert talk.messages[1]["role"] == "user" and "Sual 0" not in str(talk.messages) and "Sual 7" in str(talk.messages)
    before = talk.messages
    talk.ask("uşaqlar " * 200)
    assert "it was not sent" in capsys.readouterr().err
    assert talk.messages == before


def test_ctrl_c_stops_the_answer_and_not_the_program(speaker: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(speaker, tmp_path / "long")
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "max_position_embeddings": 20_000})
    command = [sys.executable, "-m", "azrecipe", "chat", str(folder), "--max-new-tokens", "15000", "--repetition-penalty", str(PENALTY)]
    files = {name: tmp_path / name for name in ("in", "out", "err")}
    os.mkfifo(files["in"])
    process = Started(command, tmp_path, **files)
    with files["in"].open("wb", buffering=0) as lines:
        lines.write(b"Salam\n")
        while process.poll() is None and not (files["out"].exists() and files["out"].read_bytes()):
            time.sleep(0.005)
        process.send(signal.SIGINT)
        file = tmp_path / "kept.jsonl"
        lines.write(f"/save {file}\n".encode())
        until = time.monotonic() + 20
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.01)
    assert process.wait(60) == 0
    told = files["err"].read_text()
    assert "[stopped]" in told and "Traceback" not in told
    assert [m["role"] for m in json.loads(file.read_text())["messages"]] == ["user", "assistant"]
