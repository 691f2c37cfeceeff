"""Find the model that a command line names.

It names a finished run, a folder with a model, or a model on the hub.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, did_you_mean
from azrecipe.runs.reader import RunRecord
from azrecipe.runs.run_dir import RunDir
from azrecipe.utils.atomic_files import read_json
from azrecipe.utils.hub_errors import translate_hub_errors
from azrecipe.utils.output_checksums import check_output_files

HUB_ID_PATTERN = re.compile(r"[\w.-]+(/[\w.-]+)?")
# The files to download from a hub repository, without other formats of the weights.
HUB_FILE_PATTERNS = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
STAGE_PRODUCTS = {"tokenizer": "tokenizers", "evaluate": "measurements", "pipeline": "a comparison of its cells"}


@dataclass(frozen=True)
class FinishedModel:
    """A finished model, and the run that trained it."""

    path: str  # for from_pretrained: a folder or a hub id
    run: RunDir | None = None  # None: the model comes from no run

    @property
    def is_local(self) -> bool:
        return Path(self.path).is_dir()

    @property
    def name(self) -> str:
        """The run's project and recipe, or the path's last part."""
        if self.run:
            return f"{self.run.path.parent.name}-{self.run.path.name}"
        return Path(self.path).resolve().name if self.is_local else self.path

    @property
    def adapter(self) -> Path | None:
        """The run's LoRA adapter, if it has one."""
        folder = self.run.path / "adapter" if self.run else None
        return folder if folder is not None and folder.is_dir() else None

    @property
    def output_dir(self) -> Path:
        """The folder for files that are derived from the model.

        It is the run directory, the parent of a model's folder, or the working folder.
        """
        return self.run.path if self.run else Path(self.path).resolve().parent if self.is_local else Path()


def resolve_model(argument: str) -> FinishedModel:
    """Return the model that a RUN argument names.

    Raises CommandError where the argument names no finished model. The message lists the models that are there. Raises CannotRun where a file of
    the run's was damaged.
    """
    folder = Path(os.path.expanduser(argument))
    if not folder.exists():
        if _must_be_local(argument):
            raise CommandError(f"there is no {argument}{_describe_alternatives(folder)}")
        return FinishedModel(argument)
    if not folder.is_dir():
        raise CommandError(f"{argument} is a file: give a run directory, a folder with a model, or a hub id")
    parent = folder.resolve().parent
    if folder.resolve().name == "final" and _is_run(parent):
        return _resolve_run(folder.parent if folder.name == "final" else parent)
    if _is_run(folder):
        return _resolve_run(folder)
    if (folder / "config.json").is_file():
        return FinishedModel(str(folder))
    if (folder / "adapter_config.json").is_file():
        advice = f" {folder.parent / 'final'} has it merged: give that" if (folder.parent / "final").is_dir() else ""
        raise CommandError(f"{argument} holds a LoRA adapter, which is no model by itself.{advice}")
    raise CommandError(f"{argument} is neither a run directory nor a folder with a model (config.json). {_list_models(folder)}")


def download_model(model: FinishedModel) -> FinishedModel:
    """Download a hub model into the hub's cache; return the local model.

    A local model is returned unchanged. Raises CannotRun where the download fails.
    """
    return model if model.is_local else FinishedModel(download_snapshot(model.path))


def download_snapshot(path: str, revision: str | None = None) -> str:
    """Download a model's repository into the hub's cache; return the folder.

    A local folder is returned unchanged.

    Args:
        path: A folder or a hub id.
        revision: Of the repository; None for main.

    Raises:
        CannotRun: The download fails.
    """
    if Path(path).is_dir():
        return path
    from huggingface_hub import snapshot_download

    with translate_hub_errors("model", path):
        return snapshot_download(path, revision=revision, allow_patterns=list(HUB_FILE_PATTERNS), ignore_patterns="*/*")


def _must_be_local(argument: str) -> bool:
    """Whether an argument can be no hub id, only a local path."""
    first = Path(argument).parts[:1]
    return (
        HUB_ID_PATTERN.fullmatch(argument) is None
        or argument.startswith(("./", "../", "/", "~"))
        or ("/" in argument and Path(*first).is_dir())
    )


def _describe_alternatives(folder: Path) -> str:
    if not folder.parent.is_dir():
        return f", nor {folder.parent}"
    return did_you_mean(folder.name, (path.name for path in folder.parent.iterdir())) or f". {_list_models(folder.parent)}"


def _is_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("status.json", "result.json"))


def _resolve_run(folder: Path) -> FinishedModel:
    run = RunDir(folder, False, folder.parent.parent)
    status, stage = run.status, RunRecord(folder, folder.name).result.get("stage")
    if not run.is_complete:
        message = f": {status['message'].splitlines()[0]}" if status.get("message") else ""
        raise CommandError(
            f"{folder} is not finished (state: {status.get('state', 'unknown')}{message}). There: {_list_content(folder)}\n"
            f"  Run it to its end first: azrecipe run {status.get('recipe', '<its recipe>')}"
        )
    if not (run.final_dir / "config.json").is_file():
        reason = (
            f"a run of stage {stage} makes {STAGE_PRODUCTS[stage]}, no model"
            if stage in STAGE_PRODUCTS
            else f"it has no model in {run.final_dir}"
        )
        raise CommandError(f"{folder}: {reason}. There: {_list_content(folder)}")
    for output in (run.final_dir, run.path / "adapter"):
        check_output_files(output)
    return FinishedModel(str(run.final_dir), run)


def _list_content(folder: Path) -> str:
    """Return the files and checkpoints of a run directory, for a message."""
    names = sorted(path.name + ("/" if path.is_dir() else "") for path in folder.iterdir() if not path.name.startswith("."))
    steps = sorted(str(path.relative_to(folder)) for path in (folder / "checkpoints").rglob("COMPLETE.json"))
    return ", ".join([*names, *(f"{Path(step).parent}" for step in steps)]) or "nothing"


def _list_models(folder: Path) -> str:
    """Return the finished models below a folder, for a message."""
    finals = sorted(path.parent.parent for pattern in ("*/final/config.json", "*/*/final/config.json") for path in folder.glob(pattern))
    models = sorted(path.parent for path in folder.glob("*/config.json"))
    paths = [str(path) for path in [*finals, *models]]
    return f"Models there: {', '.join(paths[:10])}" if paths else "There is no model below it"


def read_model_config(model: FinishedModel) -> dict[str, Any]:
    """Return the config.json of a local model."""
    config: dict[str, Any] = read_json(Path(model.path) / "config.json") or {}
    return config


def has_chat_template(model: FinishedModel) -> bool:
    """Whether a local model has a chat template."""
    folder = Path(model.path)
    return (folder / "chat_template.jinja").is_file() or bool((read_json(folder / "tokenizer_config.json") or {}).get("chat_template"))
