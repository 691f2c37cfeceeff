"""Models whose weights are not those of their configuration, or no numbers, are refused by name wherever they are opened."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from azrecipe.errors import CommandError
from azrecipe.modeling import weight_checks
from azrecipe.modeling.loading import check_weight_files, load_meta_model, load_model
from azrecipe.tokenization.tokenizer import load_tokenizer
from tests.conftest import Done, write
from tests.test_bad_input import EVALUATE, PRETRAIN, SFT

Weights = dict[str, torch.Tensor]
LAYER = "model.layers.1.mlp.up_proj.weight"


def rename(weights: Weights) -> Weights:
    return {f"_orig_mod.{name}": tensor for name, tensor in weights.items()}


def drop_layer(weights: Weights) -> Weights:
    return {name: tensor for name, tensor in weights.items() if ".layers.1." not in name}


def wrap(weights: Weights) -> Weights:
    return {f"module.{name}": tensor for name, tensor in weights.items()}


def add_layer(weights: Weights) -> Weights:
    return weights | {name.replace(".1.", ".2."): tensor.clone() for name, tensor in weights.items() if ".layers.1." in name}


def reshape(weights: Weights) -> Weights:
    return weights | {LAYER: torch.zeros(31, 16)}


def spoil(value: float) -> Callable[[Weights], Weights]:
    def change(weights: Weights) -> Weights:
        weights[LAYER][-1, -1] = value
        return weights

    return change


WRONG_NAMES = [
    (drop_layer, ("missing (9): model.layers.1.input_layernorm.weight", "and 4 more")),
    (wrap, ("missing (2", "not the model's (20): module.model.embed_tokens.weight")),
    (add_layer, ("not the model's (9): model.layers.2.input_layernorm.weight",)),
    (reshape, (f"of another shape (1): {LAYER} is [31, 16], and [32, 16] by the configuration",)),
]
NO_NUMBERS = [(spoil(value), (f"NaN or infinite (1): {LAYER}",)) for value in (float("nan"), float("inf"), float("-inf"))]


@pytest.fixture
def copy(llama: Path, tmp_path: Path) -> Path:
    """A copy of the model's folder."""
    return Path(shutil.copytree(llama, tmp_path / "llama"))


def change_weights(folder: Path, change: Callable[[Weights], Weights]) -> None:
    weights = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("change", "parts"), WRONG_NAMES, ids=[change.__name__ for change, _ in WRONG_NAMES])
def test_weights_of_other_names_or_shapes_are_refused(copy: Path, change: Callable[[Weights], Weights], parts: tuple[str, ...]) -> None:
    change_weights(copy, change)
    for open_model in (lambda path: load_model(path, "float32"), load_meta_model, check_weight_files):
        with pytest.raises(CommandError) as error:
            open_model(str(copy))
        assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(("change", "parts"), NO_NUMBERS, ids=["nan", "inf", "-inf"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_weights_that_are_no_numbers_are_refused(
    copy: Path, change: Callable[[Weights], Weights], parts: tuple[str, ...], precision: str
) -> None:
    change_weights(copy, change)
    with pytest.raises(CommandError) as error:
        load_model(str(copy), precision)
    assert all(part in str(error.value) for part in parts), error.value


def test_files_of_pickles_are_checked_when_they_are_loaded(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(weights, copy / "pytorch_model.bin")
    assert torch.equal(load_model(str(copy), "float32").get_input_embeddings().weight, weights["model.embed_tokens.weight"])
    torch.save(drop_layer(weights), copy / "pytorch_model.bin")
    with pytest.raises(CommandError, match=r"missing \(9\): model.layers.1"):
        load_model(str(copy), "float32")


@pytest.mark.parametrize("prefix", [rename, lambda weights: {n.replace("layers.1.", "layers.1._orig_mod."): t for n, t in weights.items()}])
def test_names_of_compiled_models_are_read(
    copy: Path, llama: Path, prefix: Callable[[Weights], Weights], capsys: pytest.CaptureFixture[str]
) -> None:
    change_weights(copy, prefix)
    load_meta_model(str(copy))
    loaded, expected = (load_model(str(folder), "float32").state_dict() for folder in (copy, llama))
    assert "torch.compile's prefix _orig_mod., which is left out" in capsys.readouterr().err
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    with pytest.raises(CommandError, match="no other program knows them"):
        check_weight_files(str(copy))


def test_a_stored_head_and_old_buffers_are_no_strangers(copy: Path) -> None:
    def add(weights: Weights) -> Weights:
        head = weights["model.embed_tokens.weight"].clone()
        return weights | {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}

    change_weights(copy, add)
    load_meta_model(str(copy))
    load_model(str(copy), "float32")


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "half a download": (cut, "model.safetensors: the file is cut short or damaged .*: download it again"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors: the file is cut short or damaged"),
    "noise": (lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 5000), "model.safetensors: the file is cut short or damaged"),
    "a pointer": (
        lambda f: write(f / "model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n"),
        "model.safetensors: a Git LFS pointer, not the weights themselves: download it again with git lfs pull",
    ),
    "no file": (lambda f: (f / "model.safetensors").unlink(), "holds a model's configuration and no weights"),
    "torn list": (
        lambda f: (f / "model.safetensors").rename(f / "x.safetensors") and write(f / "model.safetensors.index.json", '{"weight_map": {'),
        "model.safetensors.index.json: not the list of a model's files",
    ),
    "list of a lost file": (
        lambda f: (
            (f / "model.safetensors").rename(f / "x.safetensors")
            and write(f / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": {LAYER: "y.safetensors"}}))
        ),
        "lacks 1 of the 1 files of its model: y.safetensors",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_files_are_refused_by_name(copy: Path, kind: str) -> None:
    damage, message = DAMAGE[kind]
    damage(copy)
    for open_model in (lambda path: load_model(path, "float32"), load_meta_model, check_weight_files):
        with pytest.raises(CommandError, match=message):
            open_model(str(copy))


CONFIGS: dict[str, dict[str, object]] = {
    "layers": {"num_hidden_layers": 100_000},
    "no layers": {"num_hidden_layers": -1},
    "float layers": {"num_hidden_layers": 1e40},
    "text": {"hidden_size": "large"},
    "zero": {"hidden_size": 0},
    "no heads": {"num_attention_heads": 0},
    "huge": {"hidden_size": 2**62},
    "vocabulary": {"vocab_size": -5},
    "list": {"intermediate_size": [1, 2]},
    "type": {"model_type": "no-such-model"},
    "no type": {"model_type": None},
    "activation": {"hidden_act": "no-such-function"},
    "rope": {"rope_parameters": {"rope_type": "no-such-rope"}},
    "null": {"num_attention_heads": None},
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_absurd_configurations_are_refused(copy: Path, kind: str) -> None:
    config = json.loads((copy / "config.json").read_text(encoding="utf-8"))
    write(copy / "config.json", json.dumps(config | CONFIGS[kind]))
    for open_model in (lambda path: load_model(path, "float32"), load_meta_model):
        with pytest.raises(CommandError, match=str(copy)):
            open_model(str(copy))


CODE = "raise SystemExit('this code must not run')\n"


def add_model_code(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddForCausalLM"}
    write(folder / "config.json", json.dumps(config | {"model_type": "odd", "auto_map": auto_map}))
    write(folder / "configuration_odd.py", CODE)
    write(folder / "modeling_odd.py", CODE)
    return "configuration_odd.py, by config.json; modeling_odd.py, by config.json"


def add_tokenizer_code(folder: Path) -> str:
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    auto_map = {"AutoTokenizer": ["tokenization_odd.OddTokenizer", "tokenization_odd.OddTokenizer"]}
    write(folder / "tokenizer_config.json", json.dumps(config | {"tokenizer_class": "OddTokenizer", "auto_map": auto_map}))
    write(folder / "tokenization_odd.py", CODE)
    return "tokenization_odd.py, by tokenizer_config.json"


@pytest.mark.parametrize("add_code", [add_model_code, add_tokenizer_code])
def test_code_of_a_folder_is_never_run_nor_asked_about(
    copy: Path, add_code: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = add_code(copy)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    with pytest.raises(CommandError) as error:
        load_tokenizer(str(copy))
        load_model(str(copy), "float32")
    assert f"comes with code of its own ({files}), and azrecipe runs no such code" in str(error.value)


COMMANDS: dict[str, tuple[str, ...]] = {
    "run": ("run", "r.yaml"),
    "check": ("check", "r.yaml"),
    "sft": ("run", "s.yaml"),
    "dpo": ("run", "s.yaml", "--set", "method=dpo"),
    "evaluate": ("run", "e.yaml"),
    "generate": ("generate", "./llama", "--prompt", "Salam"),
    "serve": ("serve", "./llama"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_a_model_without_a_layer(project: Path, llama: Path, cli: Callable[..., Done], command: str) -> None:
    shutil.copytree(llama, project / "llama")
    change_weights(project / "llama", drop_layer)
    for name, text in (("r.yaml", PRETRAIN), ("s.yaml", SFT), ("e.yaml", EVALUATE)):
        write(name, text)
    done = cli(*COMMANDS[command])
    assert done.code == 2, done.text
    assert "llama: its weights do not fit its config.json" in done.text
    assert "missing (9): model.layers.1.input_layernorm.weight" in done.text
    assert "Traceback" not in done.text and "LOAD REPORT" not in done.text
    assert not list(project.glob("runs/p/*/result.json"))


def test_every_number_is_looked_at() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = torch.nn.Linear(33, 65).to(dtype)
        weight_checks.check_finite("m", model)
        for value in (float("nan"), float("inf"), float("-inf")):
            for place in (0, 1000, 33 * 65 - 1):
                broken = torch.nn.Linear(33, 65).to(dtype)
                with torch.no_grad():
                    broken.weight.view(-1)[place] = value
                with pytest.raises(CommandError, match=r"\(1\): weight"):
                    weight_checks.check_finite("m", broken)
