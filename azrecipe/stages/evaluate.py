"""Stage evaluate: several models on the same held-out text and the same prompts, side by side."""

from __future__ import annotations

import gc
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from azrecipe.parts import generation, metrics, model, run_dir, vocabulary
from azrecipe.parts.backend import Backend, check_precision, has_accelerator
from azrecipe.parts.files import read_json, write_json
from azrecipe.parts.sources import Inputs
from azrecipe.parts.watching import say
from azrecipe.recipe.load import Recipe
from azrecipe.recipe.types import Evaluate


def run(recipe: Recipe, runs_dir: Path, backend: Backend) -> dict[str, Any]:
    """Measure model after model; one that an interrupted run has measured is not measured again."""
    if not backend.main:
        return {}
    config: Evaluate = recipe.config
    place = run_dir.locate(recipe, runs_dir)
    inputs = Inputs(recipe, runs_dir)

    # Load and check: everything that can be refused is refused here.
    warning = check_precision("bf16_pure" if config.precision == "bfloat16" else "float32", use_liger_kernel=False)
    say(warning, bool(warning))
    folders = {name: inputs.folder(source, "models", name) for name, source in config.models.items()}
    held_out = inputs.validation(config.data.validation)
    for name, folder in folders.items():
        revision = config.models[name].revision
        model.check_sizes(model.skeleton(folder, revision=revision), vocabulary.load_tokenizer(folder, revision), folder)

    with run_dir.opened(recipe, place, inputs.found):
        found = {}
        for name, folder in folders.items():
            done = place.path / "models" / f"{name}.json"
            found[name] = read_json(done)
            if found[name] is None:
                found[name] = _measure(config, folder, config.models[name].revision, held_out)
                write_json(done, found[name])
            line = found[name]
            say(f"  {name}: " + ", ".join(f"{k} {line['bpb'][k]:.3f} bits/byte, fertility {line['fertility'][k]:.2f}" for k in held_out))
        result = {
            "stage": "evaluate",
            "models": found,
            "validation": {k: {"documents": len(t), "bytes": sum(len(x.encode()) for x in t), "words": sum(len(x.split()) for x in t)} for k, t in held_out.items()},
            "prompts": [generation.title(prompt) for prompt in config.prompts],
            "generation": asdict(config.generation),
            "definitions": {
                "bpb": "bits per byte: sum of -log2 p over all tokens of the held-out text / its UTF-8 bytes; comparable between tokenizers",
                "fertility": "tokens per white-space separated word, no special tokens",
            },
        }  # fmt: skip
        place.finish(result)
    return result


def _measure(config: Evaluate, folder: str, revision: str | None, held_out: dict[str, list[str]]) -> dict[str, Any]:
    tokenizer = vocabulary.load_tokenizer(folder, revision)
    net = model.load_model(folder, config.precision, revision=revision).eval()
    if has_accelerator():
        net = net.to(torch.accelerator.current_accelerator())
    size = config.per_device_eval_batch_size
    found = {
        "path": folder,
        "parameters": model.count(net),
        "vocab_size": len(tokenizer),
        "bpb": {k: round(metrics.bits(net, tokenizer, t, config.data.max_length, size).per_byte, 5) for k, t in held_out.items()},
        "fertility": {k: round(vocabulary.measure(tokenizer, t).fertility, 4) for k, t in held_out.items()},
        "bytes_per_token": {k: round(vocabulary.measure(tokenizer, t).bytes_per_token, 4) for k, t in held_out.items()},
        "samples": [generation.generate(net, tokenizer, prompt, config.generation, config.seed) for prompt in config.prompts],
    }
    del net
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found
