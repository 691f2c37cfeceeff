"""What is written in batches is what is written one by one; what is drawn depends on the prompt and the seed alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.evaluation import generation
from azrecipe.evaluation.generation import GumbelSampler, TextGenerator
from azrecipe.modeling.loading import load_model
from azrecipe.recipe.types import Generation
from azrecipe.tokenization.tokenizer import load_tokenizer
from azrecipe.utils.atomic_files import append_json_lines, read_and_repair_lines

PROMPTS = ["Kənddə bir qoca", "A fox", "Yay gələndə uşaqlar çayın qırağında oynayar, axşam", "The miller had three sons", "Ə"]


@pytest.fixture(scope="module")
def loaded(llama: Path) -> tuple[Any, Any]:
    return load_model(str(llama), "float32").eval(), load_tokenizer(str(llama))


def writer(loaded: tuple[Any, Any], seed: int = 42, **changes: Any) -> TextGenerator:
    settings = {"max_new_tokens": 24, "temperature": 0.0, "top_p": 1.0, "repetition_penalty": 1.0, **changes}
    return TextGenerator(*loaded, Generation(**settings), seed)


def greedy(loaded: tuple[Any, Any], prompt: str, count: int) -> list[int]:
    """The largest logit, a token at a time, without a cache, a mask or padding."""
    model, tokenizer = loaded
    ids = list(tokenizer(prompt)["input_ids"])
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[start:]


def test_a_padded_batch_writes_what_each_prompt_alone_gets(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    assert len({len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) == len(PROMPTS), "each is padded differently"
    for line, prompt in zip(writer(loaded).generate(PROMPTS), PROMPTS, strict=True):
        new = greedy(loaded, prompt, 24)
        stops = [i for i, token in enumerate(new) if token in generation.find_stop_tokens(model, tokenizer)]
        new = new[: stops[0] + 1] if stops else new
        assert (line["output"], line["tokens"], line["ended"]) == (tokenizer.decode(new, skip_special_tokens=True), len(new), bool(stops))


@pytest.mark.parametrize(
    "changes", [{"repetition_penalty": 1.5}, {"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.5, "repetition_penalty": 1.2}]
)
def test_the_batch_changes_nothing_of_what_is_drawn_or_penalised(loaded: tuple[Any, Any], changes: dict[str, float]) -> None:
    together = writer(loaded, **changes).generate(PROMPTS)
    assert together == [writer(loaded, **changes).generate([prompt])[0] for prompt in PROMPTS]
    assert together == writer(loaded, **changes).generate(PROMPTS[::-1])[::-1]
    if "temperature" in changes:
        assert together != writer(loaded, seed=7, **changes).generate(PROMPTS)


def test_draws_follow_the_softmax() -> None:
    scores = torch.tensor([2.0, 1.0, 0.0, float("-inf")])
    drawn = GumbelSampler(range(20_000))(torch.zeros(20_000, 1), scores.expand(20_000, 4)).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(shares, scores.softmax(-1), atol=0.01)
    assert shares[3] == 0


def test_writing_stops_at_every_end_of_turn_that_the_model_names(llama: Path) -> None:
    loaded = load_model(str(llama), "float32").eval(), load_tokenizer(str(llama))
    before = {prompt: greedy(loaded, prompt, 24) for prompt in PROMPTS}
    stop = before[PROMPTS[0]][3]
    loaded[0].generation_config.eos_token_id = [stop]
    loaded[0].generation_config.temperature = 0.1  # settings of the model's own take no part
    loaded[0].generation_config.do_sample = True
    ended = 0
    for line, prompt in zip(writer(loaded).generate(PROMPTS), PROMPTS, strict=True):
        new = before[prompt]
        at = new.index(stop) + 1 if stop in new else None
        assert (line["tokens"], line["ended"]) == (at or 24, at is not None)
        ended += line["ended"]
    assert ended
    assert loaded[0].generation_config.eos_token_id == [stop], "and stay as they were"


def test_a_conversation_goes_through_the_template_where_there_is_one(llama: Path) -> None:
    from azrecipe.tokenization.chat_templates import set_chat_template

    tokenizer = load_tokenizer(str(llama))
    messages = [{"role": "user", "content": "Salam"}]
    assert generation.encode_prompt(tokenizer, messages) == (tokenizer("Salam")["input_ids"], "text")
    set_chat_template(tokenizer, "llama3")
    ids, form = generation.encode_prompt(tokenizer, messages)
    assert form == "chat"
    assert tokenizer.decode(ids).endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


def test_a_file_that_a_crash_tore_is_gone_on_with(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    whole, torn = tmp_path / "whole.jsonl", tmp_path / "torn.jsonl"
    asked = [*PROMPTS, *(f"{prompt} {n}" for n in range(3) for prompt in PROMPTS)]
    maker = writer(loaded, temperature=1.0, max_new_tokens=8)
    assert list(generation.generate_missing(whole, asked, maker, 4)) == [4, 8, 12, 16, 20]
    lines = whole.read_bytes().splitlines(keepends=True)
    for kept in (0, 1, 6, 19):
        torn.write_bytes(b"".join(lines[:kept]) + lines[kept][:25])
        assert generation.is_incomplete(torn, len(asked))
        list(generation.generate_missing(torn, asked, maker, 4))
        assert torn.read_bytes() == whole.read_bytes(), "no prompt twice, and nothing else than without the crash"
    assert not generation.is_incomplete(torn, len(asked))
    assert [line["prompt"] for line in generation.read_generations(torn)] == asked


def test_lines_are_whole_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "a" / "lines.jsonl"
    assert read_and_repair_lines(file) == []
    append_json_lines(file, [{"text": "ə\u2028\n"}, {"text": "b"}])
    with file.open("ab") as opened:
        opened.write(b'{"text": "\xc9')
    assert read_and_repair_lines(file) == [{"text": "ə\u2028\n"}, {"text": "b"}]
    append_json_lines(file, [{"text": "c"}])
    assert [line["text"] for line in read_and_repair_lines(file)][1:] == ["b", "c"]
