"""What a training step, a start and a checkpoint cost, beside the ways that others go.

    python benchmarks/training.py [--only step start checkpoint] [--ways azrecipe run_clm trl] [--rounds 5] [--steps 30] [--batch 4] [--hidden-size 256] [--megabytes 4]

step: tokens a second of a run, of transformers.Trainer fed as its run_clm example does (datasets.map, group_texts), of TRL's
SFTTrainer in language-modelling mode, each beside a bare PyTorch loop that makes a step after each of theirs, in one process. start:
seconds from the command to the end of the first step, the tokenised text in the cache of each, `azrecipe run` beside `trl sft`.
checkpoint: share of the time that training stands still at a save every 50 steps.

All train the same model of random weights on the same text, made from a seed; each in a process of its own, in turn, so many
rounds; medians. Prints machine, versions and seed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizer import SEED, make_text

WARM = 5  # steps before the clock starts
RECIPE = """
stage: pretrain
project: benchmark
seed: 42
model: {{name_or_path: ./model}}
data:
  max_length: {length}
  datasets: [{{path: text.jsonl}}]
  validation: {{target: {{path: held.jsonl}}}}
phases: [{{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: {steps}}}]
training: {{global_batch_size: {batch}, per_device_train_batch_size: {batch}, precision: float32, logging_steps: {log}, save_steps: {save}}}
"""


def project(folder: Path, asked: argparse.Namespace) -> None:
    """text.jsonl, held.jsonl and ./model, a Llama of random weights with a tokenizer of this text."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    from azrecipe.tokenization.bpe_training import train_llama3
    from azrecipe.tokenization.tokenizer import save_tokenizer

    make_text(folder / "text.jsonl", asked.megabytes)
    lines = (folder / "text.jsonl").read_text(encoding="utf-8").splitlines()
    (folder / "held.jsonl").write_text(lines[0] + "\n", encoding="utf-8")
    tokenizer = train_llama3((json.loads(line)["text"] for line in lines[:2000]), asked.vocab_size)
    set_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=asked.hidden_size, intermediate_size=4 * asked.hidden_size, num_hidden_layers=asked.layers,
        num_attention_heads=asked.hidden_size // 64, num_key_value_heads=asked.hidden_size // 64, max_position_embeddings=asked.length,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    save_tokenizer(tokenizer, folder / "model")


def recipe(folder: Path, asked: argparse.Namespace, name: str, **changes: Any) -> Path:
    values = {"length": asked.length, "batch": asked.batch, "steps": asked.steps, "log": 10, "save": 10**6, **changes}
    file = folder / f"{name}.yaml"
    file.write_text(RECIPE.format(**values), encoding="utf-8")
    return file


def arguments(folder: Path, asked: argparse.Namespace) -> dict[str, Any]:
    """What the two trainers of others are given, so that the work is the same."""
    return {
        "output_dir": str(folder / "others"), "max_steps": asked.steps, "per_device_train_batch_size": asked.batch, "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "report_to": "none", "save_strategy": "no", "logging_steps": 10, "disable_tqdm": True, "use_cpu": True,
        "dataloader_pin_memory": False, "seed": SEED,
    }  # fmt: skip


def bare(folder: Path, asked: argparse.Namespace) -> Iterator[None]:
    """A loop as short as it can be written, on the very batches that azrecipe trains on; yields after each step."""
    import torch
    from torch.utils.data import DataLoader
    from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

    from azrecipe.data.mixture import Mixture
    from azrecipe.data.packing import PackedText, Packing, build_collator, build_layout, get_delimiters
    from azrecipe.data.readers import DataSource
    from azrecipe.data.tokenized_cache import TokenizeSpec, load_or_tokenize
    from azrecipe.errors import SourceLocation
    from azrecipe.recipe.types import TextSource

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    located = DataSource(TextSource(str(folder / "text.jsonl"), "train"), SourceLocation("benchmark"))
    stored = load_or_tokenize(located, TokenizeSpec(tokenizer, frozenset()), folder / "bare")
    how = Packing("wrapped", asked.length, get_delimiters(tokenizer))
    data = PackedText(build_layout(Mixture([stored], [1.0], SEED, how.delimiters.count), how), how, 0, asked.steps * asked.batch)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    model.config.use_cache = False
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, 0, asked.steps)
    for batch in DataLoader(data, asked.batch, collate_fn=build_collator(how, "sdpa")):
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield


def pair(folder: Path, asked: argparse.Namespace) -> Any:
    """A transformers callback that makes a step of the bare loop after each step of a trainer, and times both.

    Machines drift by more than what is to be seen here within a minute; neighbours in time are measured alike.
    """
    from transformers import TrainerCallback

    class Pair(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.loop, self.mine, self.theirs = bare(folder, asked), [0.0], [0.0]
            next(self.loop)
            self.since = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            begun = time.perf_counter()
            self.mine.append(begun - self.since)
            if next(self.loop, self) is self:
                return
            self.since = time.perf_counter()
            self.theirs.append(self.since - begun)

        def speeds(self) -> list[float]:
            """Tokens a second of the trainer and of the bare loop, by their median steps."""
            return [asked.batch * asked.length / statistics.median(times[1 + WARM :]) for times in (self.mine, self.theirs)]

    return Pair()


def run_clm(folder: Path, asked: argparse.Namespace) -> list[float]:
    """transformers' example: texts tokenised and joined by datasets.map, blocks of one length, plain Trainer."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, default_data_collator

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    table = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=str(folder / "hf"))

    def joined(rows: dict[str, Any]) -> dict[str, Any]:
        ids = [token for row in rows["input_ids"] for token in row]
        blocks = [ids[i : i + asked.length] for i in range(0, len(ids) - asked.length + 1, asked.length)]
        return {"input_ids": blocks, "labels": [list(block) for block in blocks]}

    tokenised = table.map(lambda rows: {"input_ids": tokenizer(rows["text"])["input_ids"]}, batched=True, remove_columns=["text"])
    blocks = tokenised.map(joined, batched=True, remove_columns=tokenised.column_names)
    clock = pair(folder, asked)
    Trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "model"), args=TrainingArguments(**arguments(folder, asked)),
        train_dataset=blocks, data_collator=default_data_collator, callbacks=[clock],
    ).train()  # fmt: skip
    return clock.speeds()


def trl(folder: Path, asked: argparse.Namespace) -> list[float]:
    """TRL's SFTTrainer on a text column, packed."""
    import datasets
    from trl import SFTConfig, SFTTrainer

    table = datasets.load_dataset("json", data_files=str(folder / "text.jsonl"), split="train", cache_dir=str(folder / "hf"))
    clock = pair(folder, asked)
    SFTTrainer(
        model=str(folder / "model"), train_dataset=table, callbacks=[clock],
        args=SFTConfig(**arguments(folder, asked), packing=True, packing_strategy="wrapped", max_length=asked.length, bf16=False,
                       gradient_checkpointing=False, model_init_kwargs={"dtype": "float32"}),
    ).train()  # fmt: skip
    return clock.speeds()


def azrecipe(folder: Path, asked: argparse.Namespace) -> list[float]:
    """A run as `azrecipe run` makes it, the clock its trainer's last callback."""
    from azrecipe.distributed import backend
    from azrecipe.pipeline import worker

    backend.set_up_backend()
    from azrecipe.training import pretraining

    clocks = []

    class Clocked(pretraining.TextTrainer):
        def train(self, *given: Any, **more: Any) -> Any:
            clocks.append(pair(folder, asked))
            self.add_callback(clocks[0])
            return super().train(*given, **more)

    pretraining.TextTrainer = Clocked  # type: ignore[misc]
    os.chdir(folder)
    code = worker.run_worker(recipe(folder, asked, f"step{time.monotonic_ns()}").name, [], Path("runs"))
    if code:
        raise SystemExit(code)
    return clocks[0].speeds()


def alone(function: str, folder: Path, asked: argparse.Namespace) -> list[float]:
    """One function in a process of its own."""
    command = [sys.executable, __file__, "--run", json.dumps([function, str(folder), vars(asked)])]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    return [float(part) for part in done.stdout.split()[-2:]]


def step(folder: Path, asked: argparse.Namespace) -> None:
    ways = asked.ways
    found: dict[str, list[list[float]]] = {way: [] for way in ways}
    for _ in range(asked.rounds):
        for way in ways:
            found[way].append(alone(way, folder, asked))
    ratios = {way: [mine / theirs for mine, theirs in speeds] for way, speeds in found.items()}
    for way, pairs in found.items():
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        middle = statistics.median(ratios[way])
        print(
            f"step, {way}: {mine:,.0f} tokens/s, the bare loop in turn with it {theirs:,.0f}; "
            f"{way} / bare {middle:.3f} ({min(ratios[way]):.3f} to {max(ratios[way]):.3f})",
            flush=True,
        )
    for way in ways[1:] if ways[0] == "azrecipe" else ():
        print(f"step, azrecipe / {way} {statistics.median(ratios['azrecipe']) / statistics.median(ratios[way]):.3f}", flush=True)


def first_step(command: list[str], folder: Path, sign: Any) -> float:
    """Seconds from a command to what `sign` takes for the end of its first step."""
    started = time.monotonic()
    with (folder / "printed.txt").open("w") as out:
        unbuffered = os.environ | {"PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(command, cwd=folder, env=unbuffered, stdout=out, stderr=subprocess.STDOUT)
        while not sign():
            if process.poll() is not None:
                raise SystemExit((folder / "printed.txt").read_text()[-3000:])
            time.sleep(0.01)
        seconds = time.monotonic() - started
        process.wait()
    return seconds


def start(folder: Path, asked: argparse.Namespace) -> None:
    printed = folder / "printed.txt"
    others = ["sft", "--model_name_or_path", "./model", "--dataset_name", str(folder / "table"), "--packing", "true", "--packing_strategy", "wrapped",
              "--max_length", str(asked.length), "--output_dir", "trl", "--max_steps", "2", "--per_device_train_batch_size", str(asked.batch),
              "--logging_steps", "1", "--save_strategy", "no", "--report_to", "none", "--use_cpu", "true", "--bf16", "false", "--dtype", "float32",
              "--gradient_checkpointing", "false"]  # fmt: skip
    (folder / "table").mkdir(exist_ok=True)
    (folder / "table" / "train.jsonl").write_bytes((folder / "text.jsonl").read_bytes())
    found: dict[str, list[float]] = {"azrecipe": [], "trl sft": []}
    for nth in range(asked.rounds + 1):  # the first fills the caches
        file = recipe(folder, asked, f"start{nth}", steps=2, log=1)
        lines = folder / "runs" / "benchmark" / file.stem / "metrics.jsonl"
        command = [sys.executable, "-m", "azrecipe", "run", file.name, "--quiet"]
        ours = first_step(command, folder, lambda lines=lines: lines.exists() and '"loss"' in lines.read_text())
        launcher = "import sys; from trl.cli import main; sys.argv[0] = 'trl'; main()"
        theirs = first_step([sys.executable, "-c", launcher, *others], folder, lambda: "'loss'" in printed.read_text(errors="replace"))
        if nth:
            found["azrecipe"].append(ours)
            found["trl sft"].append(theirs)
    middle = {way: statistics.median(seconds) for way, seconds in found.items()}
    for way, seconds in found.items():
        print(f"start, {way}: {middle[way]:.2f} s to the end of the first step ({min(seconds):.2f} to {max(seconds):.2f})")
    ratios = [ours / theirs for ours, theirs in zip(found["azrecipe"], found["trl sft"], strict=True)]
    print(f"start, azrecipe / trl sft {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})", flush=True)


def checkpoint(folder: Path, asked: argparse.Namespace) -> None:
    steps = 150
    found: dict[str, list[float]] = {"blocked": [], "seconds": [], "without": []}
    for nth in range(asked.rounds):
        for save in (50, 10**6):
            file = recipe(folder, asked, f"save{save}_{nth}", steps=steps, save=save)
            command = [sys.executable, "-m", "azrecipe", "run", file.name, "--quiet"]
            subprocess.run(command, cwd=folder, check=True, stderr=subprocess.DEVNULL)
            phase = json.loads((folder / "runs" / "benchmark" / file.stem / "result.json").read_text())["phases"]["all"]
            if save == 50:
                found["blocked"].append(phase["seconds_blocked"] / phase["seconds"])
            found["seconds" if save == 50 else "without"].append(phase["seconds"])
    blocked, seconds, without = (statistics.median(values) for values in found.values())
    print(f"checkpoint: {steps} steps with a save every 50: {seconds:.1f} s, with the last one only {without:.1f} s; "
          f"training stood still for {blocked:.2%} of the time", flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=["step", "start", "checkpoint"], choices=["step", "start", "checkpoint"])
    parser.add_argument("--ways", nargs="+", default=["azrecipe", "run_clm", "trl"], choices=["azrecipe", "run_clm", "trl"])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    for name, default in (
        ("rounds", 5),
        ("steps", 30),
        ("hidden-size", 256),
        ("layers", 4),
        ("vocab-size", 12500),
        ("length", 256),
        ("batch", 4),
        ("megabytes", 4),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    asked = parser.parse_args()
    if asked.run:
        function, folder, given = json.loads(asked.run)
        print(*globals()[function](Path(folder), argparse.Namespace(**given)))
        return
    names = ("torch", "transformers", "trl", "datasets", "accelerate")
    print(
        f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}, "
        + ", ".join(f"{n} {version(n)}" for n in names)
        + f", seed {SEED}"
    )
    print(
        f"Llama of {asked.layers} layers, {asked.hidden_size} wide, {asked.vocab_size:,} tokens; {asked.batch} sequences of {asked.length} a step; float32",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        project(folder, asked)
        for part in asked.only:
            globals()[part](folder, asked)


if __name__ == "__main__":
    main()
