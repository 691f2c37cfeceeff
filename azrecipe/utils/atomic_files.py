"""Write files and folders atomically, hash and lock them.

Content is written under a temporary name, synced to disk and then renamed.
"""

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

from azrecipe.errors import DamagedFileError, name_written_path


def write_text(path: Path, text: str) -> None:
    """Replace a file's content atomically.

    A reader sees the old or the new content, also after a crash.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with name_written_path(path), tmp.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        tmp.replace(path)
    except BaseException:
        tmp.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, data: Any) -> None:
    """Replace a file's content by indented JSON, atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the JSON in a file; None without a file.

    Raises DamagedFileError, which is a ValueError too, where it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise DamagedFileError(f"{path}: damaged: not JSON ({error}). Restore the file, or remove the folder and run again") from None


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} without a file.

    Raises DamagedFileError where it holds anything else.
    """
    content = read_json(path)
    if content is not None and not isinstance(content, dict):
        raise DamagedFileError(f"{path}: damaged: not a JSON object. Restore the file, or remove the folder and run again")
    return content or {}


def sync_folder(folder: Path) -> None:
    """Sync a folder to disk, so that renames survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def list_file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of each file below a folder.

    The keys are relative paths. The mapping is empty if there is no folder.
    """
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def sync_tree(folder: Path) -> dict[str, int]:
    """Sync every file below a folder to disk; return their sizes."""
    sizes = list_file_sizes(folder)
    for name in sizes:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
    return sizes


@contextmanager
def atomic_folder(path: Path, replace: bool = True) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `path` at the end.

    It is renamed only if the block ends without an exception. Temporary folders of dead processes are removed first.
    With `replace`, an existing folder at `path` is replaced. Without it the existing folder stays, which is right where
    the name determines the content.

    Raises:
        OSError: `path` is a link. The folder behind it may belong to somebody else.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link is in the place of a folder that is to be written", str(path))
    _remove_abandoned(path)
    tmp = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    tmp.mkdir(parents=True)
    try:
        with name_written_path(path):
            yield tmp
            sync_tree(tmp)
        if path.exists() and replace:
            old = tmp.with_suffix(".old")
            path.replace(old)
            tmp.replace(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            with contextlib.suppress(OSError) if path.exists() else contextlib.nullcontext():
                tmp.replace(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` at the end.

    The caller, or another program, creates the file at the temporary path.
    """
    _remove_abandoned(path)
    tmp = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with name_written_path(path):
            yield tmp
        with tmp.open("rb") as file:
            os.fsync(file.fileno())
        tmp.replace(path)
        sync_folder(path.parent)
    finally:
        tmp.unlink(missing_ok=True)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files that dead processes of this machine left."""
    for tmp in path.parent.glob(f".{path.name}.{socket.gethostname()}.*.*"):
        pid = tmp.name.rsplit(".", 2)[1]
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_alive(int(pid))):
            if tmp.is_dir():
                shutil.rmtree(tmp, ignore_errors=True)
            else:
                tmp.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def hold_lock(path: Path, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Hold an advisory lock on a file within the block.

    Processes of this machine wait for each other. The lock of a dead process is released. The callback runs before a
    wait.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if on_wait is not None:
                on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    The hash is cached in the process until the file's size or time of change differs.
    """
    stat = path.stat()
    return _hash_file(path, stat.st_size, stat.st_mtime_ns)


@cache
def _hash_file(path: Path, _size: int, _modified_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Append rows as lines of JSON and sync them to disk.

    After a crash the last lines may be missing or incomplete.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with name_written_path(path), path.open("a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path.parent)


def read_and_repair_lines(path: Path) -> list[Any]:
    """Return the rows of a file of JSON lines.

    An incomplete last line, which a crash leaves, is removed from the file.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    complete_size = data.rfind(b"\n") + 1
    if complete_size < len(data):
        with path.open("r+b") as file:
            file.truncate(complete_size)
            os.fsync(file.fileno())
    return [json.loads(line) for line in data[:complete_size].splitlines()]
