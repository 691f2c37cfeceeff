"""What a path in a recipe names, and where the user's cache is."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

DATA_SUFFIXES = (".jsonl", ".txt", ".parquet", ".jsonl.gz", ".txt.gz", ".jsonl.zst", ".txt.zst")


def get_user_cache() -> Path:
    """Return $XDG_CACHE_HOME/azrecipe, by default ~/.cache/azrecipe."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "azrecipe"


def is_file(path: str | Path) -> bool:
    """Whether a path names a file; no path is too long to ask."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def is_folder(path: str | Path) -> bool:
    """Whether a path names a folder; no path is too long to ask."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_local_data(path: str) -> bool:
    """Whether a dataset's path names local files.

    Other paths name files on S3 or a dataset on the hub.
    """
    return path.startswith(("./", "../", "/", "~")) or (path.endswith(DATA_SUFFIXES) and not is_s3(path))


def is_s3(path: str) -> bool:
    """Whether a dataset's path names files on S3."""
    return path.startswith("s3://")


def is_local_model(path: str) -> bool:
    """Whether a model's name_or_path names a local folder, not a hub id."""
    return path.startswith(("./", "../", "/", "~")) or path in (".", "..")


def is_template_file(chat_template: str) -> bool:
    """Whether chat_template names a file, not a template of azrecipe."""
    return chat_template.endswith(".jinja")


def is_local_task(path: str) -> bool:
    """Whether a benchmark task is a local file.

    Other tasks come with lm-evaluation-harness.
    """
    return path.startswith(("./", "../", "/", "~")) or path.endswith((".yaml", ".yml"))


LOCAL_PATH_CHECKS: Mapping[str, Callable[[str], bool]] = {  # by a key's x-path: whether its value is a local path
    "recipe": lambda _: True,
    "data": is_local_data,
    "model": is_local_model,
    "template": is_template_file,
    "task": is_local_task,
}
