"""A small project to measure on: text, a tokenizer, a recipe of the published job, and the job opened with a model of random weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
sys.path.append(str(ROOT / "benchmarks"))

SEED = 42
STEPS = 20  # of a row's schedule; no row comes to the end, where a trainer saves
ROWS = {False: 100_000, True: 512}  # of the vocabulary, by whether it is the toy: more than the tokenizer has
LLAMA_1B = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}, "tie_word_embeddings": True,
}  # fmt: skip
TOY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
RECIPE = """
stage: pretrain
project: benchmark
seed: {seed}
model: {{config: {config}}}
tokenizer: {{name_or_path: ./tokenizer}}
data:
  max_length: {length}
  datasets: [{{path: text.jsonl}}]
  validation: {{target: {{path: held.jsonl}}}}
phases: [{{name: all, trainable_parameters: [all], learning_rate: 1e-4, max_steps: {steps}}}]
training:
  global_batch_size: {batch}
  per_device_train_batch_size: {per_device}
  precision: bf16_mixed
  use_liger_kernel: {liger}
  save_steps: 100000
"""


def make_project(folder: Path, toy: bool, text: Path | None) -> Path:
    """Write the project once; returns its recipe. `text`: JSON lines with a `text` each; None: text made from a seed."""
    from tokenizer import make_text, read

    from azrecipe.tokenization.bpe_training import train_llama3
    from azrecipe.tokenization.tokenizer import save_tokenizer

    recipe = folder / "recipe.yaml"
    if recipe.exists():
        return recipe
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "text.jsonl"
    if text is None:
        make_text(file, 1 if toy else 12)
    else:
        file.write_bytes(text.read_bytes())
    lines = list(read(file))
    kept = 4 if toy else 400
    write_lines(folder / "held.jsonl", lines[:kept])
    write_lines(file, lines[kept : 200 if toy else None])
    save_tokenizer(train_llama3(lines[kept : 200 if toy else 2500], 400 if toy else 16_000), folder / "tokenizer")
    filled = RECIPE.format(
        seed=SEED, config=json.dumps(TOY if toy else LLAMA_1B), length=64 if toy else 2048,
        steps=STEPS, batch=4 if toy else 56, per_device=2 if toy else 7, liger=str(not toy).lower(),
    )  # fmt: skip
    recipe.write_text(filled, encoding="utf-8")
    return recipe


def write_lines(file: Path, texts: Sequence[str]) -> None:
    file.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")


def open_job(recipe_file: Path, sets: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """A pretraining job as the stage opens it, and its model with random weights on this process' device.

    `sets`: keys of the recipe, dotted. `name`: the folder of this job's run.
    """
    import torch
    from accelerate import PartialState

    from azrecipe.data.inputs import Inputs
    from azrecipe.distributed import backend as backends
    from azrecipe.distributed import process_group
    from azrecipe.modeling import loading
    from azrecipe.modeling.vocabulary_swap import pad_vocabulary
    from azrecipe.recipe.overrides import parse_overrides
    from azrecipe.recipe.pipeline_steps import open_recipe
    from azrecipe.runs import run_dir
    from azrecipe.stages import pretrain
    from azrecipe.tokenization.tokenizer import count_embedding_rows, load_tokenizer
    from azrecipe.training.pretraining import PhaseRecord, PretrainJob

    backend = backends.set_up_backend()
    overrides = [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in sets.items()]
    recipe = open_recipe(recipe_file, parse_overrides(overrides))[0]
    config, runs = recipe.config, recipe_file.parent / "runs"
    schedule = pretrain.prepare(recipe, runs).build_schedule()
    place = run_dir.RunDir(runs / name, backend.main, runs)
    place.path.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(str(recipe_file.parent / "tokenizer"))
    held_out = Inputs(recipe, runs).read_validation(config.data.validation)
    device = process_group.start_process_group().device
    job = PretrainJob(config, place, backend, tokenizer, held_out, schedule, PhaseRecord(place), [])
    with torch.device(PartialState().device):
        asked = config.model
        net = loading.build_model(asked.config, tokenizer, config.training.precision, asked.attn_implementation, config.seed)
        pad_vocabulary(net, count_embedding_rows(tokenizer), ROWS[len(tokenizer) < 1000])
    return job, net.to(device)


def quiet() -> None:
    """Leave the output to the benchmark."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
