"""A step whose loss is no number, or a spike: the run ends or leaves it out, and says which documents were in it."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TALES, jsonl, write
from tests.small import Project, assert_same_weights

RECIPE = """
stage: pretrain
project: small
model: {name_or_path: ./broken}
data:
  max_length: 32
  datasets: [{path: text.jsonl}]
  validation: {target: {path: held.jsonl}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 24}]
training: {global_batch_size: 4, per_device_train_batch_size: 2, precision: float32, logging_steps: 1, save_steps: 2, save_total_limit: 20}
"""
POISON = "Ж"


@pytest.fixture
def poisoned(small: Project, finished: Project) -> Project:
    """A model without numbers for a byte of Ж, and a text in which one document has that letter.

    Its embedding is zero, and the model divides by its norm. Weights that are no numbers would be refused before training.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = finished.path("base") / "final"
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    with torch.no_grad():
        for token in tokenizer.encode(POISON, add_special_tokens=False):
            model.get_input_embeddings().weight[token] = 0.0
    model.config.rms_norm_eps = 0.0
    model.config.tie_word_embeddings = False
    model.save_pretrained(small.folder / "broken")
    tokenizer.save_pretrained(small.folder / "broken")
    rows = [{"text": tale * 2} for tale in TALES for _ in range(10)]
    rows.insert(7, {"text": f"{TALES[0]} {POISON} {TALES[2]}"})
    write(small.folder / "text.jsonl", jsonl(*rows))
    write(small.folder / "held.jsonl", jsonl({"text": TALES[1] + TALES[3]}))
    write(small.folder / "bad.yaml", RECIPE)
    return small


def run_folder(project: Project) -> Path:
    return project.path("bad")


def lines(project: Project) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_folder(project) / "bad_batches.jsonl").read_text().splitlines()]


def documents(line: dict[str, object], nth: int = 0) -> str:
    return json.dumps(line["batches"][nth], ensure_ascii=False)  # type: ignore[index]


def test_a_loss_that_is_no_number_stops_the_run_before_it_changes_a_weight(poisoned: Project) -> None:
    told = poisoned.run("bad", code=1)
    assert "the loss is nan at step" in told
    assert "bad_batches.jsonl" in told and "on_bad_loss=skip" in told
    assert "Traceback" not in told
    line = lines(poisoned)[0]
    assert '"document": 7,' in documents(line)
    assert "text.jsonl" in documents(line)
    assert not (run_folder(poisoned) / "final").exists()
    # going on with the step left out: as a run that left it out from the start
    printed = poisoned.run("bad", "--set", "training.on_bad_loss=skip")
    assert "The step is skipped" in printed
    result = json.loads((run_folder(poisoned) / "result.json").read_text())
    skipped = result["phases"]["all"]["skipped_steps"]
    assert skipped and skipped[0] == line["step"]
    poisoned.run("bad", "--set", "training.on_bad_loss=skip", runs="other")
    assert_same_weights(run_folder(poisoned) / "final", poisoned.path("bad", "other") / "final")
    weights = load_file(run_folder(poisoned) / "final" / "model.safetensors")
    assert all(torch.isfinite(w).all() for name, w in weights.items() if "embed_tokens" not in name)
    logged = [json.loads(text) for text in (run_folder(poisoned) / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(entry["loss"]) for entry in logged if "loss" in entry)


def test_two_processes_name_the_same_documents(poisoned: Project) -> None:
    told = poisoned.run("bad", "--num-processes", "2", code=1)
    assert told.count("the loss is nan at step") == 1
    line = lines(poisoned)[0]
    assert '"document": 7,' in documents(line)
    assert line["batches"][0]["loss"] == "nan" and any(isinstance(batch["loss"], float) for batch in line["batches"])  # type: ignore


def test_a_spike_is_left_out_and_killed_runs_judge_alike(small: Project, finished: Project) -> None:
    noise = "".join(chr(33 + (i * i * 7) % 90) for i in range(600))
    rows = [{"text": TALES[n % 2 * 2] * 2} for n in range(40)]
    rows.insert(30, {"text": noise})
    write(small.folder / "text.jsonl", jsonl(*rows))
    write(small.folder / "held.jsonl", jsonl({"text": TALES[1] + TALES[3]}))
    settings = "{on_bad_loss: skip, loss_spike_factor: 1.15, "
    model = f"{{name_or_path: {finished.path('base') / 'final'}}}"
    write(small.folder / "bad.yaml", RECIPE.replace("{name_or_path: ./broken}", model).replace("training: {", f"training: {settings}"))
    small.run("bad", runs="whole")
    whole = small.path("bad", "whole")
    skipped = json.loads((whole / "result.json").read_text())["phases"]["all"]["skipped_steps"]
    assert skipped
    told = json.loads((whole / "bad_batches.jsonl").read_text().splitlines()[0])
    assert "times the mean" in told["reason"]
    assert noise[:10] in documents(told)
    small.interrupt("bad", lambda run: (run / "checkpoints" / "all" / "checkpoint-14" / "COMPLETE.json").exists(), signal.SIGKILL)
    small.run("bad")
    assert_same_weights(run_folder(small) / "final", whole / "final")


def test_processes_that_share_sequences_name_each_once(poisoned: Project) -> None:
    told = poisoned.run("bad", "--accelerate-config", "context", "--num-processes", "2", "--set", "data.packing=false", code=1)
    assert told.count("the loss is nan at step") == 1
    line = lines(poisoned)[0]
    named = [sequence["sequence"] for batch in line["batches"] for sequence in batch["sequences"]]  # type: ignore[attr-defined]
    assert len(named) == len(set(named))
    assert '"document": 7,' in documents(line)
