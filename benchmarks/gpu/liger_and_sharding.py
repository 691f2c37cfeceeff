"""Largest batch, peak memory and tokens a second of continued pretraining: DDP and FSDP, without Liger's kernels and with them.

    python benchmarks/gpu/liger_and_sharding.py [--processes N] [--batches 1 2 4 8 10 12 14 16 18 20 24 28 32] [--minutes 8]

Llama 3.2 1B's shape with the published vocabulary of 100,000 and sequences of 2,048, random weights, precision bf16_pure; one
process a GPU. Each row is one launch, which tries batch after batch until memory is out, or its share of the time or the list (then "≥"). On a machine without a
GPU a toy model runs instead (no Liger, float32), so that this file keeps working; its figures mean nothing.
Prints the table in markdown, and machine, versions and seed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SEED = 42
ROOT = Path(__file__).resolve().parents[2]
WARM, TIMED = 2, 4
LLAMA_1B = {
    "vocab_size": 100_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "max_position_embeddings": 131_072, "rope_theta": 500_000.0, "tie_word_embeddings": True,
}  # fmt: skip
TOY = {
    "vocab_size": 500, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
RECIPE = """
stage: pretrain
project: benchmark
model: {name_or_path: ./model}
data: {datasets: [{path: text.jsonl}], validation: {target: {path: text.jsonl}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-4, max_steps: 1}]
"""


def worker(asked: dict[str, Any]) -> None:
    """One process of one row: batch after batch; the main process prints a line of JSON for each."""
    from azrecipe.distributed import backend as backends

    backend = backends.set_up_backend()
    import torch
    from accelerate import PartialState
    from torch.utils.data import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

    from azrecipe.recipe.overrides import parse_overrides
    from azrecipe.recipe.pipeline_steps import open_recipe
    from azrecipe.training import trainer as training_trainer

    cuda = torch.cuda.is_available()

    class Random(Dataset):  # type: ignore[type-arg,misc]
        def __len__(self) -> int:
            return 10**6

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            ids = torch.randint(asked["config"]["vocab_size"], (asked["length"],), generator=torch.Generator().manual_seed(index))
            return {"input_ids": ids, "labels": ids, "position_ids": torch.arange(asked["length"])}

    class Clock(TrainerCallback):  # type: ignore[misc]
        seconds = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            now = time.monotonic()
            if state.global_step == WARM:
                self.started = now
            self.seconds = now - getattr(self, "started", now)

    file = Path(asked["folder"], f"row{backend.rank}.yaml")
    file.write_text(RECIPE, encoding="utf-8")
    until = time.monotonic() + asked["seconds"] * 0.6  # of the launch's time; imports have had some, the last batch needs some
    stopped = "list"
    for batch in asked["batches"]:
        if time.monotonic() > until:
            stopped = "time"
            break
        sets = [f"training.{key}={value}" for key, value in asked["training"].items()]
        sets += [f"training.global_batch_size={batch * backend.world_size}", f"training.per_device_train_batch_size={batch}"]
        config = open_recipe(file, parse_overrides(sets))[0].config.training
        loop = training_trainer.LoopConfig("all", Path(asked["folder"]), Path(asked["folder"], "out"), WARM + TIMED, 1e-4, SEED)
        given = training_trainer.build_training_arguments(config, loop, backend) | {
            "save_strategy": "no",
            "logging_steps": 1000,
            "logging_first_step": False,
        }
        clock = Clock()
        try:
            set_seed(SEED)
            with torch.device(PartialState().device):
                model = LlamaForCausalLM(LlamaConfig(**asked["config"])).to(torch.bfloat16 if cuda else torch.float32)
            model.config.use_cache = False
            if cuda:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            trainer = Trainer(model=model, args=TrainingArguments(**given), train_dataset=Random(), callbacks=[clock])
            trainer.train()
        except torch.OutOfMemoryError:
            stopped = "memory"
            break
        tokens = TIMED * batch * asked["length"] / clock.seconds
        memory = torch.cuda.max_memory_allocated() if cuda else 0
        if backend.main:
            print("ROW " + json.dumps({"batch": batch, "memory": memory, "tokens": tokens}), flush=True)
        trainer.accelerator.free_memory()
        del trainer, model
        gc.collect()  # trainer, callbacks and shards know each other: what is left would count for the next batch
    if backend.main:
        print(f"STOPPED {stopped}", flush=True)


def row(kind: str, asked: dict[str, Any], processes: int) -> tuple[list[dict[str, float]], bool]:
    """Launch one row and read what it printed: its batches, and whether it was memory that ended them. Memory may run out so that the launch fails, or so that some processes wait for one that is gone."""
    command = [sys.executable, __file__, "--worker", json.dumps(asked)]
    if processes > 1 or kind == "fsdp":
        by = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "accelerate_configs" / f"{kind}.yaml")]
        command = [sys.executable, *by, "--num_processes", str(processes), *command[1:]]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as told:
        changes = {"PYTHONPATH": paths} | ({"CUDA_VISIBLE_DEVICES": "0"} if processes == 1 else {})  # else nn.DataParallel takes all
        launch = subprocess.Popen(command, stdout=printed, stderr=told, env=os.environ | changes, start_new_session=True)
        try:
            launch.wait(timeout=asked["seconds"])
        except subprocess.TimeoutExpired:
            os.killpg(launch.pid, signal.SIGTERM)  # its workers lead sessions of their own: the launcher ends them
            launch.wait()
        printed.seek(0)
        told.seek(0)
        lines, errors = printed.read().splitlines(), told.read()
    rows = [json.loads(line[4:]) for line in lines if line.startswith("ROW ")]
    out_of_memory = "STOPPED memory" in lines or "OutOfMemoryError" in errors
    if not rows or (launch.returncode > 0 and not out_of_memory):
        raise SystemExit(f"{kind}: a launch failed after {len(rows)} batches\n{errors[-3000:]}")
    return rows, out_of_memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, help="processes, one a GPU (default: all GPUs; 2 without one)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8, 10, 12, 14, 16, 18, 20, 24, 28, 32])
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(json.loads(given.worker))
        return
    import torch

    cuda = torch.cuda.is_available()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = ("torch", "transformers", "accelerate", "liger-kernel")
    print(
        f"{platform.platform()}, {', '.join(gpus) or 'no GPU: a toy model, whose figures mean nothing'}, "
        + ", ".join(f"{n} {version(n)}" for n in names)
        + f", seed {SEED}"
    )
    kinds = [(kind, liger) for kind in ("ddp", "fsdp") for liger in ((False, True) if cuda else (False,))]
    processes = given.processes or len(gpus) or 2
    print(
        f"\n{processes} processes\n\n| backend | Liger | largest batch a GPU | its peak memory, GB | its tokens/s a GPU | best tokens/s a GPU (batch) |"
    )
    print("| --- | --- | --- | --- | --- | --- |")
    for kind, liger in kinds:
        with tempfile.TemporaryDirectory() as folder:
            asked = {
                "folder": folder, "config": LLAMA_1B if cuda else TOY, "length": 2048 if cuda else 64,
                "batches": given.batches if cuda else given.batches[:2], "seconds": given.minutes * 60 / len(kinds),
                "training": {"precision": "bf16_pure" if cuda else "float32", "use_liger_kernel": str(liger).lower()},
            }  # fmt: skip
            rows, out_of_memory = row(kind, asked, processes)
        largest, best = rows[-1], max(rows, key=lambda r: r["tokens"])
        print(
            f"| {kind} | {'yes' if liger else 'no'} | {'' if out_of_memory else '≥ '}{largest['batch']} | {largest['memory'] / 1e9:.1f} | {largest['tokens']:,.0f} | {best['tokens']:,.0f} ({best['batch']}) |",
            flush=True,
        )


if __name__ == "__main__":
    main()
