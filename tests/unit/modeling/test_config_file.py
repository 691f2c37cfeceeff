"""A saved model's files have the names of transformers 5 and of 4: each alone says the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

from azrecipe.modeling.config_file import add_legacy_keys
from azrecipe.tokenization.tokenizer import load_tokenizer, save_tokenizer
from azrecipe.utils.atomic_files import read_json, write_json

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 256}
DEFAULT = {"rope_type": "default", "rope_theta": 20_000.0}
LAYERS = {"num_key_value_heads": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 20_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {"rope_type": "longrope", "rope_theta": 20_000.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": DEFAULT}),
    "llama scaled": ("llama", {"rope_parameters": LLAMA3}),
    "qwen yarn": ("qwen2", {"rope_parameters": YARN}),
    "gemma3": ("gemma3_text", {**LAYERS, "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}, "sliding_attention": DEFAULT}}),
    "olmo3": ("olmo3", {**LAYERS, "rope_parameters": {"full_attention": YARN | {"rope_theta": 5e5}, "sliding_attention": DEFAULT | {"rope_theta": 5e5}}}),
    "partial": ("phi", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.75}}),
    "phi3": ("phi3", {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE}),
    "gpt_neox": ("gpt_neox", {"rope_parameters": {**DEFAULT, "partial_rotary_factor": 0.75}}),
}  # fmt: skip


def read(folder: Path, data: dict[str, Any]) -> dict[str, Any]:
    """What transformers reads from a config.json: the settings of the model, without the names that both spellings add."""
    write_json(folder / "config.json", data)
    settings = AutoConfig.from_pretrained(folder).to_dict()
    if "rope_type" in settings["rope_parameters"]:
        settings["rope_parameters"].pop("type", None)
    return {key: value for key, value in settings.items() if key not in ("_name_or_path", "partial_rotary_factor")}


@pytest.mark.parametrize("family", FAMILIES)
def test_either_spelling_alone_gives_the_same_model(family: str, tmp_path: Path) -> None:
    model_type, fields = FAMILIES[family]
    config = AutoConfig.for_model(model_type, **SIZES, **fields, dtype="bfloat16", pad_token_id=0)
    config.save_pretrained(tmp_path)
    new = read_json(tmp_path / "config.json")
    add_legacy_keys(tmp_path, config)
    both = read_json(tmp_path / "config.json")
    old = {key: value for key, value in both.items() if key not in ("rope_parameters", "dtype")}
    assert new.items() <= both.items()
    assert read(tmp_path, old) == read(tmp_path, new) == read(tmp_path, both)


def test_an_unknown_kind_of_rotary_embedding_keeps_its_file(tmp_path: Path) -> None:
    fields = {**LAYERS, "rope_parameters": {"full_attention": LLAMA3, "sliding_attention": DEFAULT}}
    config = AutoConfig.for_model("olmo3", **SIZES, **fields)  # transformers 4's OLMo 3 has one theta
    config.save_pretrained(tmp_path)
    add_legacy_keys(tmp_path, config)
    assert "rope_theta" not in read_json(tmp_path / "config.json")


def test_a_tokenizers_names_are_those_of_both(llama: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(llama))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    save_tokenizer(tokenizer, tmp_path)
    data = read_json(tmp_path / "tokenizer_config.json")
    assert (data["tokenizer_class"], data["additional_special_tokens"]) == ("PreTrainedTokenizerFast", ["<|turn|>"])
    assert data["chat_template"] == (tmp_path / "chat_template.jinja").read_text() == tokenizer.chat_template
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert type(again) is type(tokenizer) and again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map and again.all_special_ids == tokenizer.all_special_ids
    assert again.extra_special_tokens == ["<|turn|>"] and again.chat_template == tokenizer.chat_template
    save_tokenizer(again, tmp_path / "again")
    assert read_json(tmp_path / "again" / "tokenizer_config.json") == data
