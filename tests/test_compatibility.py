"""Other programs agree: transformers 4.57 and llama.cpp open what comes out, and mergekit merges to the same weights.

They have an environment of their own, which `make test-compatibility` makes. Without it these tests skip.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import model_probe
from tests.conftest import ROOT, TALES, Done
from tests.small import Project, environment

ENVIRONMENT = ROOT / ".venv-compatibility"
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}  # fmt: skip
LLAMA3_SCALING = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
LAYERS = {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}
LAYER_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
FAMILIES: dict[str, dict[str, Any]] = {
    "scaled": {"model_type": "llama", "tie_word_embeddings": False, "rope_parameters": LLAMA3_SCALING},
    "tied": {"model_type": "llama", "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "gemma3": {"model_type": "gemma3_text", **LAYERS, "rope_parameters": LAYER_ROPE},
    "qwen3": {"model_type": "qwen3", "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
}


pytestmark = pytest.mark.skipif(not ENVIRONMENT.exists(), reason=f"needs {ENVIRONMENT.name}: make test-compatibility makes it")


def run_there(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script with the other environment's Python."""
    command = [str(ENVIRONMENT / "bin" / "python"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def folders(finished: Project, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The final/ of every stage, and models of other kinds with random weights, saved as a stage saves them."""
    import torch

    from azrecipe.modeling.loading import build_model, save_model
    from azrecipe.tokenization.bpe_training import train_llama3

    folder, tokenizer = tmp_path_factory.mktemp("families"), train_llama3([tale * 20 for tale in TALES], 320)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = "{% for m in messages %}<|turn|>{{ m['content'] }}{% endfor %}"
    for name, config in FAMILIES.items():
        model = build_model(SIZES | config, tokenizer, "float32", "sdpa", seed=1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.2)
        save_model(model, tokenizer, folder / name)
    stages = {name: finished.path(name) / "final" for name in ("base", "cpt", "sft")}
    return {**stages, **{name: folder / name for name in FAMILIES}}


@pytest.fixture(scope="module")
def here(folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What these models give in this environment."""
    return {name: model_probe.probe(str(folder)) for name, folder in folders.items()}


def test_transformers_4_opens_every_stage(folders: dict[str, Path], here: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    import torch

    run_there(model_probe.__file__, tmp_path / "probe.json", *folders.values())
    there = json.loads((tmp_path / "probe.json").read_text())
    for name, folder in folders.items():
        left, right = here[name], there[str(folder)]
        torch.testing.assert_close(torch.tensor(left.pop("logits")), torch.tensor(right.pop("logits")), atol=1e-5, rtol=1e-5, msg=name)
        assert left == right, name


@pytest.mark.parametrize("name", ["cpt", "sft", "scaled", "qwen3"])
def test_llama_cpp_writes_the_same_text(
    name: str, folders: dict[str, Path], here: dict[str, dict[str, Any]], cli: Callable[..., Done], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    done = cli("export", folders[name], "--outtype", "f32", "--output", file, "--llama-cpp", ENVIRONMENT / "llama.cpp")
    assert done.code == 0, done.err[-3000:]
    probe = run_there(Path(__file__).with_name("gguf_probe.py"), file, model_probe.TEXT, json.dumps(here[name]["prompt_ids"]))
    there = json.loads(probe.stdout.splitlines()[-1])
    assert there["ids"] == [token for token in here[name]["ids"] if token != here[name]["bos"]]
    assert there["answer_ids"] == here[name]["answer_ids"]


MERGES = {
    "linear": ("linear", "", {"weight": 0.3}, {"weight": 0.9}),
    "slerp": ("slerp", "t: 0.25", {}, {}),
    "task_arithmetic": ("task_arithmetic", "", {"weight": 1.0}, {"weight": 0.6}),
    "ties": ("ties", "", {"weight": 1.0, "density": 0.4}, {"weight": 0.5, "density": 0.4}),
}


@pytest.mark.parametrize("name", MERGES)
def test_mergekit_merges_to_the_same_weights(name: str, tmp_path: Path) -> None:
    import torch

    from azrecipe.modeling.loading import build_model, load_model, save_model
    from azrecipe.tokenization.bpe_training import train_llama3

    tokenizer = train_llama3([tale * 20 for tale in TALES], 320)
    for seed, model in enumerate(("base", "first", "second")):
        save_model(build_model(SIZES | FAMILIES["scaled"], tokenizer, "float32", "sdpa", seed), tokenizer, tmp_path / model)
    method, extra, first, second = MERGES[name]
    with_base = method in ("task_arithmetic", "ties")
    weights = [options.get("weight", default) for options, default in zip((first, second), (0.75, 0.25), strict=True)]
    ours = [f"stage: merge\nproject: p\nmethod: {method}\nmodels:\n"]
    ours += [
        f"  {model}: {{name_or_path: ./{model}, weight: {weight}}}\n" for model, weight in zip(("first", "second"), weights, strict=True)
    ]
    ours += ["base: {name_or_path: ./base}\n"] if with_base else []
    ours += [f"density: {first['density']}\n"] if "density" in first else []
    (tmp_path / "merge.yaml").write_text("".join(ours))
    entries = [{"model": str(tmp_path / model), "parameters": options} for model, options in (("first", first), ("second", second))]
    base = {"base_model": str(tmp_path / ("base" if with_base else "first"))} if with_base or method == "slerp" else {}
    theirs = {"merge_method": method, "dtype": "float32", "models": entries, **base}
    if extra:
        theirs["parameters"] = {"t": float(extra.removeprefix("t: "))}
    (tmp_path / "mergekit.yaml").write_text(json.dumps(theirs))
    run_there("-m", "mergekit.scripts.run_yaml", tmp_path / "mergekit.yaml", tmp_path / "theirs", "--quiet")
    command = [sys.executable, "-m", "azrecipe", "run", "merge.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    left, right = (load_model(str(folder), "float32").state_dict() for folder in (tmp_path / "runs/p/merge/final", tmp_path / "theirs"))
    assert left.keys() == right.keys()
    for key, tensor in left.items():
        torch.testing.assert_close(tensor, right[key], atol=1e-6, rtol=1e-5, msg=key)
