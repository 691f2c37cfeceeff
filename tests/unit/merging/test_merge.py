"""Models that cannot be merged are refused by name; shards and NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.errors import CommandError
from azrecipe.merging.merge import plan_merge, write_merged_weights
from azrecipe.merging.shard_writer import ShardWriter
from azrecipe.merging.weight_files import open_weight_files
from azrecipe.modeling.loading import load_meta_model, load_model, save_model
from azrecipe.recipe.types import MergeConfig, MergeModel
from azrecipe.tokenization import bpe_training
from azrecipe.tokenization.tokenizer import count_embedding_rows


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    return {
        "small": bpe_training.train_llama3(iter(["a b c d"]), 600),
        "large": bpe_training.train_llama3(iter(["ab ab ab cd cd cd"]), 602),
    }


def save(folder: Path, tokenizer: Any, seed: int = 0, **changes: Any) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**{**sizes, "vocab_size": count_embedding_rows(tokenizer), "tie_word_embeddings": True, **changes})
    torch.manual_seed(seed)
    save_model(LlamaForCausalLM(config), tokenizer, folder)
    return folder


def configure(names: list[str], method: str = "linear", **changes: Any) -> MergeConfig:
    models = {name: MergeModel(name_or_path=name) for name in names}
    return MergeConfig("merge", "p", "", 42, models, method, 1.0, **changes)


def plan(folders: dict[str, Path], tokenizers: dict[str, Any], config: MergeConfig) -> Any:
    return plan_merge(config, {name: load_meta_model(str(folder)) for name, folder in folders.items()}, tokenizers)


def merge(folders: dict[str, Path], tokenizers: dict[str, Any], config: MergeConfig, out: Path, max_shard_bytes: int = 1 << 30) -> Path:
    planned = plan(folders, tokenizers, config)
    files = {name: open_weight_files(str(folder), load_meta_model(str(folder))) for name, folder in folders.items()}
    assert all(files.values())
    out.mkdir()
    writer = ShardWriter(out, max_shard_bytes)
    write_merged_weights(planned, {name: each for name, each in files.items() if each is not None}, writer)
    writer.finish()
    planned.model.config.save_pretrained(out)
    return out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "second and first have other weights: 9 are in one of them only, as model.layers.2"),
        ({"intermediate_size": 32}, "second has weights of other shapes than first: model.layers.0.mlp.gate_proj.weight is [32, 16] and [24, 16] and 5 others"),
        ({"tie_word_embeddings": False}, "second has an output matrix of its own, and first uses its input embeddings"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(tmp_path: Path, tokenizers: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    folders = {"first": save(tmp_path / "a", tokenizers["small"]), "second": save(tmp_path / "b", tokenizers["small"], **changes)}
    both = dict.fromkeys(folders, tokenizers["small"])
    with pytest.raises(CommandError) as caught:
        plan(folders, both, configure(list(folders)))
    assert message in str(caught.value)


def test_weights_in_several_files_are_the_same_model(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    folders = {name: save(tmp_path / name, tokenizers["small"], seed) for seed, name in enumerate(("first", "second"))}
    both = dict.fromkeys(folders, tokenizers["small"])
    whole = merge(folders, both, configure(list(folders)), tmp_path / "whole")
    parts = merge(folders, both, configure(list(folders)), tmp_path / "parts", max_shard_bytes=4_000)
    assert (parts / "model.safetensors.index.json").exists() and len(list(parts.glob("model-*"))) > 2
    first, second = (load_model(str(folder), "float32").state_dict() for folder in (whole, parts))
    sources = [load_model(str(folder), "float32").state_dict() for folder in folders.values()]
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        torch.testing.assert_close(tensor, (sources[0][name] + sources[1][name]) / 2)


def test_rows_follow_the_tokens(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    folders = {"first": save(tmp_path / "a", tokenizers["large"]), "second": save(tmp_path / "b", tokenizers["small"], 1)}
    named = {"first": tokenizers["large"], "second": tokenizers["small"]}
    merged = load_model(str(merge(folders, named, configure(list(folders)), tmp_path / "out")), "float32")
    rows = [load_model(str(folder), "float32").get_input_embeddings().weight for folder in folders.values()]
    old, result = tokenizers["small"].get_vocab(), merged.get_input_embeddings().weight
    kept = 0
    for token, row in tokenizers["large"].get_vocab().items():
        kept += token not in old
        torch.testing.assert_close(result[row], (rows[0][row] + rows[1][old[token]]) / 2 if token in old else rows[0][row])
    assert kept


def test_weights_by_group(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    folders = {name: save(tmp_path / name, tokenizers["small"], seed) for seed, name in enumerate(("first", "second"))}
    both = dict.fromkeys(folders, tokenizers["small"])
    models = {"first": MergeModel("a", weights={"layers[0]": 0.25, "all": 1.0}), "second": MergeModel("b", weights={"layers[0]": 0.75})}
    merged = load_model(str(merge(folders, both, MergeConfig("merge", "p", "", 42, models, "linear", 1.0), tmp_path / "out")), "float32")
    first, second = (load_model(str(folder), "float32").state_dict() for folder in folders.values())
    for name, tensor in merged.state_dict().items():
        expected = 0.25 * first[name] + 0.75 * second[name] if ".layers.0." in name else first[name]
        torch.testing.assert_close(tensor, expected, msg=name)
    models = {"first": MergeModel("a", weights={"layers[0]": 1.0}), "second": MergeModel("b", weights={"layers[1]": 1.0, "norm": 1.0})}
    with pytest.raises(CommandError, match=r"the models' weights of model\.embed_tokens\.weight add up to 0"):
        plan(folders, both, MergeConfig("merge", "p", "", 42, models, "linear", 1.0))


def test_what_is_no_number_is_refused(tmp_path: Path, tokenizers: dict[str, Any]) -> None:
    from safetensors.torch import load_file, save_file

    folders = {name: save(tmp_path / name, tokenizers["small"], seed) for seed, name in enumerate(("first", "second"))}
    both = dict.fromkeys(folders, tokenizers["small"])
    file = folders["second"] / "model.safetensors"
    stored = load_file(file)
    stored["model.norm.weight"][3] = float("nan")
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CommandError, match=r"second: model\.norm\.weight has numbers that are NaN or infinite"):
        merge(folders, both, configure(list(folders)), tmp_path / "nan")
    stored["model.norm.weight"][3] = 3e5
    save_file(stored, file, metadata={"format": "pt"})
    with pytest.raises(CommandError, match=r"model\.norm\.weight: the merged weight has numbers that are NaN, infinite or too large"):
        merge(folders, both, configure(list(folders), dtype="float16"), tmp_path / "overflow")
