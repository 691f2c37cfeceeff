"""What the tests share: a small project in a folder of its own, a very small model, and the command line."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network, and none may wait for it

import azrecipe
from azrecipe import cli as command_line

pytest_plugins = ["tests.small"]

ROOT = Path(azrecipe.__file__).resolve().parent.parent

TALES = (
    "A fox lived near the river. Every morning it went to the water and looked at the stones. ",
    "Kənddə bir qoca yaşayırdı. O, hər səhər bağa gedər, ağaclara su verərdi. ",
    "The miller had three sons and one mill. The eldest took the mill, the youngest took the cat. ",
    "Yay gələndə uşaqlar çayın qırağında oynayar, axşam evə qayıdardılar. ",
)
TOKENIZER = """\
stage: tokenizer
project: p
tokenizer: {name_or_path: ./llama}
data: {datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}}
candidates: {baseline: {kind: baseline}, custom: {kind: custom, vocab_size: 300}}
"""
QUESTIONS = [
    {"messages": [{"role": "user", "content": f"Bu neçədir: {n} + {n}?"}, {"role": "assistant", "content": f"Cavab {n + n} edir."}]}
    for n in range(12)
]


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return self.out + self.err


def _stop_ignoring_hangups() -> None:
    """Let processes that tests start take SIGHUP as users' processes do.

    It stays ignored where it is at their start, as under nohup, and tests may run under nohup.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


_stop_ignoring_hangups()


def write(path: str | Path, text: str | bytes) -> Path:
    """Write a file, its folders made; a relative path is relative to the test's folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(*rows: object) -> str:
    """Rows as lines of JSON."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: text.txt, heldout.txt, text.jsonl, questions.jsonl."""
    monkeypatch.chdir(tmp_path)
    write("text.txt", "\n".join(tale * 20 for tale in TALES))
    write("heldout.txt", "The shepherd counted his sheep. Çoban qoyunlarını saydı. " * 4)
    write("text.jsonl", jsonl(*({"text": tale * 3, "site": f"site{n}"} for n, tale in enumerate(TALES))))
    write("questions.jsonl", jsonl(*QUESTIONS))
    return tmp_path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """azrecipe's command line in this process: fast, for what ends before it trains."""

    def call(*arguments: object) -> Done:
        capfd.readouterr()
        try:
            code = command_line.main([str(a) for a in arguments])
        except SystemExit as end:  # argparse
            code = end.code if isinstance(end.code, int) else 1
        out, err = capfd.readouterr()
        return Done(code, out, err)

    return call


def run_command(*arguments: object, cwd: Path, env: Mapping[str, str] | None = None, timeout: int = 300) -> Done:
    """azrecipe's command line in a process of its own: a fork, or an interpreter of its own for an `env` that is read by imports."""
    from tests.small import called

    command = [sys.executable, "-m", "azrecipe", *map(str, arguments)]
    if env is None:
        return called(command, cwd, timeout)
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    done = subprocess.run(command, cwd=cwd, env=whole, capture_output=True, text=True, timeout=timeout, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def run_cli(tmp_path: Path) -> Callable[..., Done]:
    """`run_command` in the test's folder."""
    return partial(run_command, cwd=tmp_path)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a very small Llama and its tokenizer, as a base model has it: no chat template."""
    from azrecipe.modeling.loading import build_model, save_model
    from azrecipe.tokenization.bpe_training import train_llama3

    folder = tmp_path_factory.mktemp("model") / "llama"
    tokenizer = train_llama3([tale * 20 for tale in TALES], 320)
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    save_model(build_model(config, tokenizer, "float32", "sdpa", seed=1), tokenizer, folder)
    return folder


def pytest_configure() -> None:
    """One core for each test process and what it starts: threads of several small trainings on the same cores only wait for each other."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker.isdigit() and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


def pytest_collection_finish() -> None:
    """What was imported to collect the tests stays: it need not be walked at each collection of garbage."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """At its end a process takes all of it apart, or the bindings below say what they leak."""
    gc.unfreeze()
