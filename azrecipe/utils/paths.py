"""Which paths in a recipe name local files."""

from __future__ import annotations

from collections.abc import Callable, Mapping

DATA_SUFFIXES = (".jsonl", ".txt", ".parquet", ".jsonl.gz", ".txt.gz", ".jsonl.zst", ".txt.zst")


def is_local_data(path: str) -> bool:
    """Whether a dataset's path names files here rather than files on S3 or a dataset on the hub."""
    return path.startswith(("./", "../", "/", "~")) or (path.endswith(DATA_SUFFIXES) and not is_s3(path))


def is_s3(path: str) -> bool:
    """Whether a dataset's path names files on S3."""
    return path.startswith("s3://")


def is_local_model(path: str) -> bool:
    """Whether a model's name_or_path names a folder here rather than a model on the hub."""
    return path.startswith(("./", "../", "/", "~")) or path in (".", "..")


def is_template_file(chat_template: str) -> bool:
    """Whether chat_template names a file rather than a template that ships."""
    return chat_template.endswith(".jinja")


def is_local_task(path: str) -> bool:
    """Whether a benchmark task is a file here rather than one of lm-evaluation-harness' own."""
    return path.startswith(("./", "../", "/", "~")) or path.endswith((".yaml", ".yml"))


LOCAL: Mapping[str, Callable[[str], bool]] = {  # by a key's x-path: whether its value is a path here
    "recipe": lambda _: True,
    "data": is_local_data,
    "model": is_local_model,
    "template": is_template_file,
    "task": is_local_task,
}
