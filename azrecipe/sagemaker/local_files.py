"""Local files that a job needs, without outward links and secrets."""

from __future__ import annotations

import fnmatch
import glob
import itertools
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO

from azrecipe.data.files import DataFile
from azrecipe.utils.environment_variables import ALLOW_SECRETS
from azrecipe.utils.paths import DATA_SUFFIXES
from azrecipe.utils.secret_scan import WAY_OUT, SecretMatch, find_secrets

MODEL_FILES = (  # what transformers, tokenizers and PEFT read of a model's folder
    "*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "*.model", "*.jinja", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "new_tokens.json",
    "adapter_config.json",
)  # fmt: skip
MAX_SCANNED_BYTES = 32 * 2**20  # of each file, decompressed: some 3 seconds
WINDOW_BYTES = 2**20
MAX_SECRETS_SHOWN = 3  # of each file
UNSCANNED_MODEL_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "*.safetensors", "*.bin", "*.model")


def list_data_files(value: str) -> dict[str, Path]:
    """List what is read as data of a path, folder or glob.

    Returns:
        Files by their path below the folder that all have in common.
    """
    path = Path(value).expanduser()
    files: Iterable[Path]
    if path.is_file():
        return {path.name: path} if path.name.endswith(DATA_SUFFIXES) else {}
    if path.is_dir():
        base, files = path, path.rglob("*")
    else:
        fixed = next((i for i, part in enumerate(path.parts) if any(c in part for c in "*?[")), len(path.parts))
        base, files = Path(*path.parts[:fixed]), map(Path, glob.iglob(str(path), recursive=True))
    return _select(base, files, DATA_SUFFIXES)


def list_model_files(value: str) -> dict[str, Path]:
    """List what is read of a model's folder, by file name."""
    folder = Path(value).expanduser()
    files = folder.iterdir() if folder.is_dir() else ()
    return {name: file for name, file in _select(folder, files).items() if _matches(name, MODEL_FILES)}


def _select(base: Path, files: Iterable[Path], suffixes: tuple[str, ...] = ("",)) -> dict[str, Path]:
    """Select files with a suffix, without hidden ones."""
    paths = {file.relative_to(base): file for file in files if file.name.endswith(suffixes) and file.is_file()}
    return {path.as_posix(): file for path, file in paths.items() if not any(part.startswith(".") for part in path.parts)}


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def describe_outward_links(files: Iterable[Path], named: Path, folders: Iterable[Path]) -> Iterator[str]:
    """Describe each file that a link takes out of its tree.

    The tree is the first of `folders` that the path is in, without following links; for a path in none of them, the folder that holds it.

    Args:
        files: The files.
        named: The path that names them in the recipe.
        folders: The working folder and the recipe's.
    """
    absolute = _normalize(named.expanduser())
    root = next((folder for folder in map(_normalize, folders) if absolute.is_relative_to(folder)), absolute.parent)
    real_root = Path(os.path.realpath(root))
    for file in files:
        target = Path(os.path.realpath(file))
        if not target.is_relative_to(real_root):
            yield f"{file} leads through a link to {target}, out of {root}, and is not uploaded: name {target} itself, or put a copy in its place"


def _normalize(path: Path) -> Path:
    """Return an absolute path without `..`; links are not followed."""
    return Path(os.path.normpath(path.absolute()))


def describe_secrets(file: Path, text: str, prose: bool = False) -> Iterator[str]:
    """Describe what looks like a secret in a file.

    Args:
        file: The file.
        text: Its content.
        prose: Whether it is text that a model is trained on.
    """
    yield from (_describe_secret(file, secret) for secret in find_secrets(text, prose)[:MAX_SECRETS_SHOWN])


def _describe_secret(file: Path, secret: SecretMatch, lines_before: int = 0) -> str:
    place = f"{file}:{lines_before + secret.line}:{secret.column}"
    return f"{place}: looks like a secret ({secret.kind}), which whoever may read the bucket would see: remove it; {WAY_OUT}"


def describe_data_secrets(files: Mapping[str, Path], unsearched: list[str]) -> Iterator[str]:
    """Describe what looks like a secret in data files or a model's files.

    Args:
        files: The files, by name.
        unsearched: Descriptions of files that are not searched, or only their beginning (decompressed), are added.
    """
    if ALLOW_SECRETS.is_set:
        return
    for name, file in files.items():
        is_data = name.endswith(DATA_SUFFIXES)
        if name.endswith(".parquet") or (not is_data and _matches(file.name, UNSCANNED_MODEL_FILES)):
            unsearched.append(str(file))
            continue
        try:
            with DataFile(str(file)).open() if is_data else file.open("rb") as stream:
                yield from itertools.islice(_describe_stream_secrets(file, stream, is_data), MAX_SECRETS_SHOWN)
                if stream.read(1):
                    unsearched.append(f"{file} behind its first {MAX_SCANNED_BYTES // 2**20} MiB")
        except (OSError, EOFError, zlib.error):
            continue  # the run says that the file is damaged


def _describe_stream_secrets(file: Path, stream: IO[bytes], is_data: bool) -> Iterator[str]:
    """Describe secrets in the beginning of a stream, window by window."""
    lines = size = 0
    while size < MAX_SCANNED_BYTES and (window := stream.read(WINDOW_BYTES) + stream.readline(WINDOW_BYTES)):
        yield from (_describe_secret(file, secret, lines) for secret in find_secrets(window.decode("utf-8", "replace"), is_data))
        lines, size = lines + window.count(b"\n"), size + len(window)
