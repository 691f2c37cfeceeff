"""Knows how a file or a folder comes to be whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Replace a file's content; a reader, or a crash, sees the old content or the new and nothing between."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with aside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, data: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON in a file, or None where there is no such file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder last through a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def file_sizes(folder: Path) -> dict[str, int]:
    """The sizes in bytes of the files below a folder, by relative path; empty where there is no folder."""
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def sync_tree(folder: Path) -> dict[str, int]:
    """Sync every file below a folder to disk; returns `file_sizes`."""
    sizes = file_sizes(folder)
    for name in sizes:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    return sizes


@contextmanager
def whole_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """A folder to fill that takes its name only when the block ends well. What dead processes left aside is removed.

    An existing folder of that name is replaced or, without `replace`, wins (for content that has one name whoever
    makes it). A link of that name is refused with OSError: the folder behind it is not ours.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link is in the place of a folder that is to be written", str(path))
    _sweep(path)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    aside.mkdir(parents=True)
    try:
        yield aside
        sync_tree(aside)
        if path.exists() and replace:
            old = aside.with_suffix(".old")
            path.replace(old)
            aside.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            with contextlib.suppress(OSError) if path.exists() else contextlib.nullcontext():
                aside.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """`whole_folder` for one file that another program writes: the path that is yielded does not exist yet."""
    _sweep(path)
    aside = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _sweep(path: Path) -> None:
    """Remove what processes of this machine were filling when they died."""
    for left in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.*"):
        pid = left.name.rsplit(".", 2)[1]
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def locked(path: Path, told: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an advisory lock on a file; processes of this machine wait for each other. A dead process holds nothing.

    `told` is called before a wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if told is not None:
                told()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def sha256(path: Path) -> str:
    """Hash of a file's content, as hexadecimal text; read once by a process as long as the file does not change."""
    state = path.stat()
    return _sha256(path, state.st_size, state.st_mtime_ns)


@cache
def _sha256(path: Path, _size: int, _changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_lines(path: Path, rows: Iterable[Any]) -> None:
    """Add rows as lines of JSON, synced to disk before this returns. The last ones may be missing or torn after a crash."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    fresh = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if fresh:
        sync_folder(path.parent)


def whole_lines(path: Path) -> list[Any]:
    """The rows that `append_lines` wrote; what a crash left of a last line is cut off the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        with path.open("r+b") as file:
            file.truncate(whole)
            os.fsync(file.fileno())
    return [json.loads(line) for line in data[:whole].splitlines()]
