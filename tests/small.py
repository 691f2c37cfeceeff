"""A project small enough to train in seconds: a base model, Azerbaijani text, recipes for every stage."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import QUESTIONS, ROOT, TALES, Done, jsonl, write
from tests.forkserver import Server
from tests.result_schemas import check_written_files

BASE = """
stage: pretrain
project: small
model:
  config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 128, tie_word_embeddings: true}
tokenizer: {family: llama3, vocab_size: 340}
data:
  max_length: 32
  datasets: [{path: english.jsonl}]
  validation: {target: {path: held.jsonl}, english: {path: held_english.jsonl}}
phases: [{name: english, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 20}]
training: &training {global_batch_size: 8, per_device_train_batch_size: 8, warmup_ratio: 0.1, weight_decay: 0.1, precision: float32, logging_steps: 1, save_steps: 4}
"""
TOKENIZER = """
stage: tokenizer
project: small
tokenizer: {output_of: base.yaml}
data:
  datasets: [{path: azerbaijani.jsonl, weight: 3}, {path: english.jsonl}]
  validation: {target: {path: held.jsonl}, english: {path: held_english.jsonl}}
candidates: {baseline: {kind: baseline}, custom: {kind: custom, vocab_size: 400}}
"""
CPT = """
stage: pretrain
project: small
model: {output_of: base.yaml}
tokenizer: {output_of: tokenizer.yaml}
data:
  max_length: 32
  datasets: [{path: azerbaijani.jsonl, weight: 3}, {path: english.jsonl}]
  validation: {target: {path: held.jsonl}, english: {path: held_english.jsonl}}
phases:
  - {name: embeddings, trainable_parameters: [embeddings], learning_rate: 1e-2, max_steps: 8}
  - {name: full, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 16}
training: {global_batch_size: 8, per_device_train_batch_size: 4, warmup_ratio: 0.1, weight_decay: 0.1, precision: float32, logging_steps: 1, save_steps: 4}
"""
PHASE1 = """
stage: pretrain
extends: cpt.yaml
phases: [{name: embeddings, trainable_parameters: [embeddings], learning_rate: 1e-2, max_steps: 8}]
"""
PHASE2 = """
stage: pretrain
extends: cpt.yaml
model: {output_of: phase1.yaml}
tokenizer: null
data: {continue_from: phase1.yaml}
phases: [{name: full, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 16}]
"""
SFT = """
stage: sft
project: small
model: {output_of: cpt.yaml}
chat_template: llama3
data:
  max_length: 96
  datasets: [{path: questions.jsonl}]
  validation: {held_out: {fraction: 0.2}}
lora: {r: 8, lora_alpha: 16, lora_dropout: 0.1}
training: {learning_rate: 1e-2, max_steps: 12, global_batch_size: 4, per_device_train_batch_size: 2, precision: float32, logging_steps: 1, save_steps: 3}
"""
EVALUATE = """
stage: evaluate
project: small
models: {base: {output_of: base.yaml}, adapted: {output_of: cpt.yaml}, assistant: {output_of: sft.yaml}}
data:
  max_length: 64
  validation: {target: {path: held.jsonl}, english: {path: held_english.jsonl}}
prompts: [Kənddə bir, {messages: [{role: user, content: "Bu neçədir: 2 + 2?"}]}]
generation: {max_new_tokens: 12}
"""
PIPELINE = """
stage: pipeline
project: small
description: The small job.
steps: [base.yaml, tokenizer.yaml, cpt.yaml, sft.yaml, evaluate.yaml]
"""
RECIPES = {
    "base": BASE,
    "tokenizer": TOKENIZER,
    "cpt": CPT,
    "phase1": PHASE1,
    "phase2": PHASE2,
    "sft": SFT,
    "evaluate": EVALUATE,
    "pipeline": PIPELINE,
}


def environment(**changes: str) -> dict[str, str]:
    """This process's environment for a child that imports azrecipe from any folder; it draws no pages, which take seconds, unless told to."""
    return {"AZRECIPE_PAGE": "0", **os.environ, "PYTHONPATH": str(ROOT), **changes}


@contextmanager
def pages() -> Iterator[None]:
    """Runs started within make their pages."""
    before = os.environ.get("AZRECIPE_PAGE")
    os.environ["AZRECIPE_PAGE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["AZRECIPE_PAGE"]
        else:
            os.environ["AZRECIPE_PAGE"] = before


PREFORKED = hasattr(os, "fork") and sys.platform == "linux"


@cache
def server() -> Server:
    """This test process' fork server."""
    return Server(environment())


def called(command: Sequence[str], folder: Path, timeout: float = 300) -> Done:
    """Run a command to its end; `python …` is a fork where that can be."""
    if not PREFORKED or command[0] != sys.executable:
        done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=timeout, check=False)
        return Done(done.returncode, done.stdout, done.stderr)
    with tempfile.TemporaryDirectory() as name:
        files = {"out": Path(name, "out"), "err": Path(name, "err")}
        process = Started(command, folder, **files)
        try:
            ended = process.wait(timeout)
        except TimeoutError:
            process.send(signal.SIGTERM)
            raise
        return Done(ended, *(file.read_text(encoding="utf-8", errors="replace") for file in files.values()))


class Started:
    """A command that has begun and is not waited for: a fork where that can be, as `called` has it."""

    def __init__(self, command: Sequence[str], folder: Path, **files: Path) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        if PREFORKED:
            self.pid = server().start(command, folder, environment(), **files)
            return
        ends = {name: files.get(name, Path(os.devnull)).open(mode) for name, mode in (("in", "rb"), ("out", "ab"), ("err", "ab"))}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment(), stdin=ends["in"], stdout=ends["out"], stderr=ends["err"], start_new_session=True
        )
        self.pid = self.process.pid

    def poll(self) -> int | None:
        """Its exit code, once it has ended."""
        return self.process.poll() if self.process else server().poll(self.pid)

    def wait(self, timeout: float = 120) -> int:
        """Its exit code. Raises TimeoutError or TimeoutExpired."""
        return self.process.wait(timeout) if self.process else server().wait(self.pid, timeout)

    def send(self, number: int) -> None:
        """A signal to it; SIGKILL also to what it has started."""
        if self.poll() is None:
            (os.killpg if number == signal.SIGKILL else os.kill)(self.pid, number)


SMALL_DISK = """
import ctypes, os, shutil, subprocess, sys
from pathlib import Path
disk, size, beside, *words = sys.argv[1:]
ids, libc = {"uid": os.getuid(), "gid": os.getgid()}, ctypes.CDLL(None)
if libc.unshare(0x10000000 | 0x20000):  # CLONE_NEWUSER | CLONE_NEWNS
    sys.exit(77)
Path("/proc/self/setgroups").write_text("deny")
for kind, number in ids.items():
    Path(f"/proc/self/{kind}_map").write_text(f"0 {number} 1")
os.makedirs(disk, exist_ok=True)
if libc.mount(b"tmpfs", disk.encode(), b"tmpfs", 0, f"size={size}".encode()):
    sys.exit(77)
if Path("seed").exists():
    shutil.copytree("seed", disk, dirs_exist_ok=True)
other = subprocess.Popen(["sh", "-c", beside], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
code = subprocess.call([sys.executable, *words])
other.kill()
shutil.copytree(disk, "kept", ignore=shutil.ignore_patterns("filler"))
sys.exit(code)
"""


def in_small_disk(command: Sequence[str], folder: Path, disk: str, size: int, beside: str = "") -> Done:
    """Run `python …` with a file system of `size` bytes mounted on folder/disk, in a mount namespace of its own.

    seed/, where it is there, is put on it first, and what is on it in the end is left in kept/; `beside` is a shell's line that runs meanwhile.
    """
    if not PREFORKED:
        pytest.skip("mount namespaces are Linux's")
    done = called([sys.executable, "-c", SMALL_DISK, disk, str(size), beside, *command[1:]], folder)
    if done.code == 77:
        pytest.skip("mounting a file system of its own is not permitted here")
    return done


@dataclass
class Project:
    """A folder with recipes and text, and the ways to run them."""

    folder: Path

    def path(self, recipe: str, runs: str = "runs") -> Path:
        """A recipe's run directory."""
        return self.folder / runs / "small" / recipe

    def result(self, recipe: str, runs: str = "runs") -> Any:
        return json.loads((self.path(recipe, runs) / "result.json").read_text())

    def status(self, recipe: str, runs: str = "runs") -> Any:
        return json.loads((self.path(recipe, runs) / "status.json").read_text())

    def losses(self, recipe: str, runs: str = "runs") -> list[float]:
        lines = map(json.loads, (self.path(recipe, runs) / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]

    def command(self, recipe: str, *arguments: str, runs: str = "runs", launcher: Sequence[str] = ()) -> list[str]:
        verb = [] if launcher else ["run"]
        return [sys.executable, *launcher, "-m", "azrecipe", *verb, f"{recipe}.yaml", "--runs-dir", runs, *arguments]

    def run(self, recipe: str, *arguments: str, runs: str = "runs", launcher: Sequence[str] = (), code: int = 0) -> str:
        """Run a recipe in a process of its own and return what it printed."""
        done = called(self.command(recipe, *arguments, runs=runs, launcher=launcher), self.folder)
        assert done.code == code, f"exit code {done.code}\n{done.text}"
        if code == 0:
            check_written_files(self.path(recipe, runs))
        return done.text

    def started(self, recipe: str, *arguments: str, runs: str = "runs", printed: Path | None = None) -> Started:
        """Begin to run a recipe."""
        files = {} if printed is None else {"out": printed, "err": printed}
        return Started(self.command(recipe, *arguments, runs=runs), self.folder, **files)

    def interrupt(self, recipe: str, when: Callable[[Path], bool], number: int, *arguments: str, runs: str = "runs") -> int:
        """Start a recipe, send a signal as soon as `when(run directory)` holds, and return the exit code."""
        process = self.started(recipe, *arguments, runs=runs)
        while process.poll() is None and not when(self.path(recipe, runs)):
            time.sleep(0.002)
        process.send(number)
        return process.wait()


def fill(folder: Path) -> Project:
    """Write the project's text and recipes into a folder."""
    english = [f"{TALES[0]}{TALES[2]} It was the year {n}, and the river had {n % 7} stones." for n in range(40)]
    azerbaijani = [f"{TALES[1]}{TALES[3]} Kənddə {n} ev, bağda {n % 9} ağac var idi." for n in range(40)]
    write(folder / "english.jsonl", jsonl(*({"text": text} for text in english)))
    write(folder / "azerbaijani.jsonl", jsonl(*({"text": text} for text in azerbaijani)))
    write(
        folder / "held.jsonl",
        jsonl({"text": "Qoca bağda ağaclara su verərdi. " * 3}, {"text": "Uşaqlar axşam çayın qırağından evə qayıdardılar."}),
    )
    write(folder / "held_english.jsonl", jsonl({"text": "The youngest went to the river and looked at the cat."}))
    write(
        folder / "questions.jsonl",
        jsonl(
            *QUESTIONS,
            *(
                {"messages": [{"role": "user", "content": f"Ev {n}?"}, {"role": "assistant", "content": f"Bəli, {n} ev var."}]}
                for n in range(30)
            ),
        ),
    )
    for name, text in RECIPES.items():
        write(folder / f"{name}.yaml", text)
    return Project(folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The whole small job, run once by `azrecipe run pipeline.yaml`; tests only read it."""
    project = fill(tmp_path_factory.mktemp("finished"))
    with pages():
        write(project.folder / "printed.txt", project.run("pipeline"))
    return project


def copied(finished: Project, folder: Path) -> Project:
    """The project in another folder, its base model and tokenizer already there."""
    project = fill(folder)
    for name in ("base", "tokenizer"):
        shutil.copytree(finished.path(name), project.path(name))
    return project


@pytest.fixture
def small(finished: Project, tmp_path: Path) -> Project:
    """The same project in a folder of the test's own, its base model and tokenizer already there."""
    return copied(finished, tmp_path)


def weights(folder: Path) -> dict[str, Any]:
    """The tensors of a saved model."""
    from safetensors.torch import load_file

    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def assert_same_weights(a: Path, b: Path) -> None:
    """Two saved models are equal bit for bit."""
    import torch

    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert left
    for key in left:
        assert torch.equal(left[key].nan_to_num(), right[key].nan_to_num()), key
