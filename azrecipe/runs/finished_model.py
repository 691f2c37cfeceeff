"""Knows which model a user means by RUN: that of a finished run, a folder of one, or a model on the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, did_you_mean
from azrecipe.runs.run_dir import RunDir
from azrecipe.utils.atomic_files import read_json
from azrecipe.utils.hub_errors import opening

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
PARTS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")  # of a repository on the hub: not other formats of its weights
MADE_OF = {"tokenizer": "tokenizers", "evaluate": "measurements", "pipeline": "a comparison of its cells"}


@dataclass(frozen=True)
class Finished:
    """A model to use. `path` is what from_pretrained takes: a folder, or a hub id; `run` is the run that made it, if one did."""

    path: str
    run: RunDir | None = None

    @property
    def local(self) -> bool:
        return Path(self.path).is_dir()

    @property
    def name(self) -> str:
        """What to call it: project and recipe of a run, else the last part of its path."""
        return (
            f"{self.run.path.parent.name}-{self.run.path.name}" if self.run else Path(self.path).resolve().name if self.local else self.path
        )

    @property
    def adapter(self) -> Path | None:
        """The adapter beside the model, where the run has one."""
        found = self.run.path / "adapter" if self.run else None
        return found if found is not None and found.is_dir() else None

    @property
    def beside(self) -> Path:
        """The folder for what is made of it: the run's own, the one that a model's folder stands in, or the current one."""
        return self.run.path if self.run else Path(self.path).resolve().parent if self.local else Path()


def find(asked: str) -> Finished:
    """The model behind a RUN argument. Raises CommandError, naming what is there, for what is no finished model."""
    folder = Path(os.path.expanduser(asked))
    if not folder.exists():
        if _local(asked):
            raise CommandError(f"there is no {asked}{_near(folder)}")
        return Finished(asked)
    if not folder.is_dir():
        raise CommandError(f"{asked} is a file: give a run directory, a folder with a model, or a hub id")
    parent = folder.resolve().parent
    if folder.resolve().name == "final" and _is_run(parent):
        return _of_run(folder.parent if folder.name == "final" else parent)
    if _is_run(folder):
        return _of_run(folder)
    if (folder / "config.json").is_file():
        return Finished(str(folder))
    if (folder / "adapter_config.json").is_file():
        beside = f" {folder.parent / 'final'} has it merged: give that" if (folder.parent / "final").is_dir() else ""
        raise CommandError(f"{asked} holds a LoRA adapter, which is no model by itself.{beside}")
    raise CommandError(f"{asked} is neither a run directory nor a folder with a model (config.json). {_below(folder)}")


def fetched(model: Finished) -> Finished:
    """The same with its files here: those of a hub id are downloaded into the hub's cache. Raises CannotRun where that fails."""
    if model.local:
        return model
    from huggingface_hub import snapshot_download

    with opening("model", model.path):
        return Finished(snapshot_download(model.path, allow_patterns=list(PARTS), ignore_patterns="*/*"))


def _local(asked: str) -> bool:
    """Whether an argument that names nothing here can only have meant something here."""
    first = Path(asked).parts[:1]
    return HUB_ID.fullmatch(asked) is None or asked.startswith(("./", "../", "/", "~")) or ("/" in asked and Path(*first).is_dir())


def _near(folder: Path) -> str:
    if not folder.parent.is_dir():
        return f", nor {folder.parent}"
    return did_you_mean(folder.name, (path.name for path in folder.parent.iterdir())) or f". {_below(folder.parent)}"


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("status.json", "result.json"))


def _of_run(folder: Path) -> Finished:
    run = RunDir(folder, False, folder.parent.parent)
    status, stage = run.status, (read_json(folder / "result.json") or {}).get("stage")
    if not run.complete:
        message = f": {status['message'].splitlines()[0]}" if status.get("message") else ""
        raise CommandError(
            f"{folder} is not finished (state: {status.get('state', 'unknown')}{message}). There: {_content(folder)}\n"
            f"  Run it to its end first: azrecipe run {status.get('recipe', '<its recipe>')}"
        )
    if not (run.final / "config.json").is_file():
        what = f"a run of stage {stage} makes {MADE_OF[stage]}, no model" if stage in MADE_OF else f"it has no model in {run.final}"
        raise CommandError(f"{folder}: {what}. There: {_content(folder)}")
    return Finished(str(run.final), run)


def _content(folder: Path) -> str:
    """What a run directory holds, for a message: checkpoints by name."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if not path.name.startswith("."))
    steps = sorted(str(path.relative_to(folder)) for path in (folder / "checkpoints").rglob("COMPLETE.json"))
    return ", ".join([*names, *(f"{Path(step).parent}" for step in steps)]) or "nothing"


def _below(folder: Path) -> str:
    """The finished models below a folder, for a message."""
    finals = sorted(path.parent.parent for pattern in ("*/final/config.json", "*/*/final/config.json") for path in folder.glob(pattern))
    models = sorted(path.parent for path in folder.glob("*/config.json"))
    found = [str(path) for path in [*finals, *models]]
    return f"Models there: {', '.join(found[:10])}" if found else "There is no model below it"


def settings(model: Finished) -> dict[str, Any]:
    """The config.json of a model that is here."""
    found: dict[str, Any] = read_json(Path(model.path) / "config.json") or {}
    return found


def has_template(model: Finished) -> bool:
    """Whether a model that is here has a chat template, by its files."""
    folder = Path(model.path)
    return (folder / "chat_template.jinja").is_file() or bool((read_json(folder / "tokenizer_config.json") or {}).get("chat_template"))
