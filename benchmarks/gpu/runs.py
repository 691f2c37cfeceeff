"""Stage 6: whole runs on this machine: a step without a finite loss is left out, and a run that is stopped goes on to the same losses."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import project
from results import Results

SMALL = {
    "model_type": "llama", "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8,
    "num_key_value_heads": 4, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip
STEPS, STOP_AT, BAD = 40, 12, 3


def run(results: Results, recipe: Path, toy: bool) -> None:
    for attention in ("sdpa", "varlen"):
        results.measure("runs", f"a bad step is left out, {attention}", lambda attention=attention: skip(recipe, attention))
        results.measure("runs", f"stopped and resumed, {attention}", lambda attention=attention: resume(recipe, toy, attention))


def skip(recipe: Path, attention: str) -> dict[str, Any]:
    """Make the loss of one step NaN, and look whether its weights stayed and the others learned."""
    import torch
    from transformers import TrainerCallback

    from azrecipe.training.pretraining import run_phase_loop

    sets = {
        "model.attn_implementation": attention,
        "training.on_bad_loss": "skip",
        "phases": phases(6),
        "model.config": json.dumps(project.TOY),
    }
    job, model = project.open_job(recipe, sets, f"skip-{attention}")

    class Fault(TrainerCallback):  # type: ignore[misc]
        weights: Any = None
        changed: list[bool] = []  # noqa: RUF012 - one object is made
        hook: Any = None

        def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
            self.weights = model.lm_head.weight.detach().clone()
            if state.global_step == BAD:
                self.hook = more["model"].model.norm.register_forward_hook(lambda _module, _given, out: out * float("nan"))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.changed.append(not torch.equal(self.weights, model.lm_head.weight))
            if self.hook is not None:
                self.hook.remove()

    fault = Fault()
    fault.changed = []
    trainer, _ = run_phase_loop(job, model, 0, [fault])
    right = trainer.guard.skipped_steps == [BAD] and fault.changed == [(step != BAD and step > 0) or step == 0 for step in range(6)]
    return {
        "right": right,
        "skipped": trainer.guard.skipped_steps,
        "weights_changed": fault.changed,
        "losses": list(trainer.guard.recent_losses),
    }


def phases(steps: int) -> str:
    return f"[{{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: {steps}, warmup_ratio: 0}}]"


def resume(recipe: Path, toy: bool, attention: str) -> dict[str, Any]:
    """The same run twice, once stopped by SIGTERM on its way; the losses of both, step by step."""
    sets = {
        "model.attn_implementation": attention, "model.config": json.dumps(project.TOY if toy else SMALL), "training.logging_steps": 1,
        "phases": phases(STEPS), "data.max_length": 64 if toy else 512, "training.save_steps": 1000,
    }  # fmt: skip
    whole, cut = recipe.parent / f"whole-{attention}", recipe.parent / f"cut-{attention}"
    processes = [start(recipe, sets, folder) for folder in (whole, cut)]
    log = cut / "benchmark" / "recipe" / "metrics.jsonl"
    while processes[1].poll() is None and len(lines(log)) < STOP_AT:
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    codes = [process.wait() for process in reversed(processes)]
    stopped_at = len(lines(log))
    again = start(recipe, sets, cut)
    codes.append(again.wait())
    losses = [
        [line["loss"] for line in lines(folder / "benchmark" / "recipe" / "metrics.jsonl") if "loss" in line] for folder in (whole, cut)
    ]
    difference = max((abs(a - b) for a, b in zip(*losses, strict=False)), default=None)
    return {
        "right": codes == [143, 0, 0] and len(losses[0]) == len(losses[1]) == STEPS and difference is not None and difference < 0.02,
        "exit_codes": codes, "stopped_at": stopped_at, "largest_difference_of_losses": difference, "last_losses": [one[-1:] for one in losses],
    }  # fmt: skip


def start(recipe: Path, sets: dict[str, Any], folder: Path) -> subprocess.Popen[bytes]:
    pairs = [part for key, value in sets.items() for part in ("--set", f"{key}={value}")]
    with (recipe.parent / f"{folder.name}.log").open("ab") as log:
        command = [sys.executable, "-m", "azrecipe", str(recipe), *pairs, "--runs-dir", str(folder)]
        return subprocess.Popen(command, stdout=log, stderr=log)


def lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")] if file.exists() else []
