"""Digests of large files, computed by one process of a machine for all."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path

from azrecipe.utils.atomic_files import hold_lock, write_text
from azrecipe.utils.console import format_disk_size, print_progress
from azrecipe.utils.paths import get_user_cache

LARGE_BYTES = 64 << 20  # smaller files are read sooner than a digest is shared
READ_BYTES = 8 << 20
PROGRESS_SECONDS = 10.0
TICK_SECONDS = 1.0  # two changes of a file within it may have the same time
KEPT_SECONDS = 30 * 86_400.0


def get_digest_folder() -> Path:
    """Return $XDG_CACHE_HOME/azrecipe/digests, by default ~/.cache/azrecipe/digests."""
    return get_user_cache() / "digests"


def hash_large_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal.

    A large file is read once by one process; the others, and later runs, take its hash from the user's cache until the file changes.
    Progress is printed.
    """
    return _hash_once(path, *_describe_file(path))


@cache
def _hash_once(path: Path, *_description: object) -> str:
    return share_digest(path, "sha256", _hash_with_progress)


def share_digest(path: Path, kind: str, compute: Callable[[Path], str]) -> str:
    """Compute a digest, or take that which another process computed.

    A file counts as the same while path, inode, size and both of its times are.

    Args:
        path: The file.
        kind: What is computed. It has a name for the launch where other launches shall compute it again.
        compute: Computes the digest, in hexadecimal.
    """
    if path.stat().st_size < LARGE_BYTES:
        return compute(path)
    before = _describe_file(path)
    folder = get_digest_folder()
    record = folder / f"{hashlib.sha256(repr((kind, before)).encode()).hexdigest()[:40]}.txt"
    if digest := _read_record(record):
        return digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = hold_lock(record.with_suffix(".lock"), lambda: _print_waiting(path))
        lock.__enter__()
    except OSError:  # nothing can be written: each process computes it
        return compute(path)
    try:
        if digest := _read_record(record):
            return digest
        age = time.time() - max(path.stat().st_mtime, path.stat().st_ctime)
        time.sleep(TICK_SECONDS - age if 0 <= age < TICK_SECONDS else 0)  # a change from now on has another time
        digest = compute(path)
        if _describe_file(path) == before:
            with suppress(OSError):
                write_text(record, digest)
                _remove_old_records(folder)
        return digest
    finally:
        with suppress(OSError):
            record.with_suffix(".lock").unlink()
        lock.__exit__(None, None, None)


def name_launch() -> str:
    """Return a name of the launch that this process is part of."""
    parent = os.getppid()
    with suppress(OSError, IndexError):
        return f"{parent} {Path(f'/proc/{parent}/stat').read_text().rpartition(')')[2].split()[19]}"  # when the parent started
    return f"{parent} {os.getpid()}"


def _describe_file(path: Path) -> tuple[str, int, int, int, int, int]:
    stat = path.stat()
    return str(path.resolve()), stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _read_record(record: Path) -> str:
    with suppress(OSError, ValueError):
        text = record.read_text(encoding="ascii")
        return text if len(text) >= 32 and bytes.fromhex(text) else ""
    return ""


def _remove_old_records(folder: Path) -> None:
    oldest = time.time() - KEPT_SECONDS
    for file in folder.iterdir():
        if file.stat().st_mtime < oldest:
            file.unlink(missing_ok=True)


def _print_waiting(path: Path) -> None:
    print_progress(f"  waiting for another process that reads {path}", os.environ.get("RANK", "0") == "0")


def _hash_with_progress(path: Path) -> str:
    digest, done, size = hashlib.sha256(), 0, path.stat().st_size
    line_time = time.monotonic()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
            done += len(block)
            if time.monotonic() > line_time + PROGRESS_SECONDS:
                line_time = time.monotonic()
                print_progress(f"  reading {path} to know its content: {format_disk_size(done)} of {format_disk_size(size)}")
    return digest.hexdigest()
