"""Files of text, here or on S3: which ones a path names, how each is opened whatever its compression, and what names its content."""

from __future__ import annotations

import fnmatch
import gzip
import io
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import IO, Any

from azrecipe.errors import AzrecipeError, CannotRun, Problem, RecipeError
from azrecipe.errors import Place as Where
from azrecipe.utils.atomic_files import sha256
from azrecipe.utils.paths import DATA_SUFFIXES, is_s3

BUFFER = 1 << 20
WILD = "*?["
_MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "INVALID_BUCKET_NAME", "does not exist", "not found")
_DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE", "UNRECOGNIZED_CLIENT", "403", "TOKEN")


@dataclass(frozen=True)
class File:
    """A file: its path, or s3://bucket/key; of one on S3 also its size in bytes and when it changed, in ns."""

    path: str
    size: int = 0
    changed: int = 0

    def __str__(self) -> str:
        return self.path

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def kind(self) -> str:
        """jsonl, txt or parquet."""
        return PurePosixPath(self.name.removesuffix(".gz").removesuffix(".zst")).suffix[1:]

    @property
    def version(self) -> str:
        """A name for the content: its hash, or on S3, where reading it all is dear, the key, size and time of change."""
        return f"{self.path} {self.size} {self.changed}" if is_s3(self.path) else sha256(Path(self.path))

    def raw(self) -> Any:
        """The file as pyarrow reads it, in any order. Raises OSError."""
        import pyarrow

        key = self.path.removeprefix("s3://")
        return _s3(key.partition("/")[0]).open_input_file(key) if is_s3(self.path) else pyarrow.OSFile(self.path)

    def open(self) -> IO[bytes]:
        """What is in the file, decompressed, to be read from the start. Raises OSError, EOFError or zlib.error, also later."""
        if self.name.endswith(".zst"):
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(self.raw(), "zstd"), BUFFER)
        plain = io.BufferedReader(self.raw() if is_s3(self.path) else io.FileIO(self.path), BUFFER)
        return gzip.GzipFile(fileobj=plain) if self.name.endswith(".gz") else plain  # type: ignore[return-value]

    def cannot_be_read(self, error: Exception, place: Where) -> AzrecipeError:
        """The error that tells a user why the file could not be read; `place` is the source's in the recipe."""
        if is_s3(self.path) and isinstance(error, OSError) and "AWS Error" in str(error):
            return _explained(self.path, error, place)
        return RecipeError([Problem(place, f"{self.path}: cannot be read: {getattr(error, 'strerror', None) or error}")])


def on_s3(path: str, place: Where) -> list[File]:
    """The files on S3 that a path (a key, a folder or a glob) names, sorted.

    Raises RecipeError where there are none, CannotRun where S3 does not let us see.
    """
    try:
        found = list(_listed(path))
    except OSError as error:
        raise _explained(path, error, place) from None
    if not found:
        raise RecipeError([Problem(place, f"{path}: no file there ends in {', '.join(DATA_SUFFIXES)}")])
    return found


@lru_cache
def _listed(path: str) -> tuple[File, ...]:
    """One look for a process: the files do not change under a run."""
    from pyarrow import fs

    key = path.removeprefix("s3://").strip("/")
    parts = key.split("/")
    wild = next((i for i, part in enumerate(parts) if any(c in part for c in WILD)), None)
    if wild == 0 or not parts[0]:
        raise FileNotFoundError("the name of a bucket stands before the first /, and is no glob")
    if wild is None:
        info = _s3(parts[0]).get_file_info(key)
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(f"the key does not exist: {path}")
        if info.type == fs.FileType.File:
            return (File(f"s3://{key}", info.size, info.mtime_ns),)
        found = _s3(parts[0]).get_file_info(fs.FileSelector(key, recursive=True))
    else:
        recursive = wild + 1 < len(parts)
        chosen = _s3(parts[0]).get_file_info(fs.FileSelector("/".join(parts[:wild]), recursive=recursive))
        found = [info for info in chosen if _matches(info.path.split("/"), parts)]
    files = [File(f"s3://{info.path}", info.size, info.mtime_ns) for info in found if info.type == fs.FileType.File]
    return tuple(sorted((file for file in files if file.name.endswith(DATA_SUFFIXES)), key=lambda file: file.path))


def _matches(key: list[str], pattern: list[str]) -> bool:
    """Whether a key fits a glob, both cut at their slashes; ** stands for any number of folders."""
    if not pattern or not key:
        return pattern == key
    if pattern[0] == "**":
        return _matches(key, pattern[1:]) or _matches(key[1:], pattern)
    return fnmatch.fnmatchcase(key[0], pattern[0]) and _matches(key[1:], pattern[1:])


@lru_cache
def _s3(bucket: str) -> Any:
    """S3 as AWS's tools see it: their credentials and AWS_ENDPOINT_URL (which pyarrow does not look at); the bucket's own region."""
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = None
    if endpoint is None:
        with suppress(OSError):  # told when the bucket is opened
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(endpoint_override=endpoint, region=region, connect_timeout=10, request_timeout=60)


def _explained(path: str, error: OSError, place: Where) -> AzrecipeError:
    text = str(error)
    said = text.rpartition("AWS Error ")[2].strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, FileNotFoundError) or any(word in text for word in _MISSING):
        return RecipeError([Problem(place, f"no such file on S3: {path} ({said})")])
    if isinstance(error, PermissionError) or any(word in text for word in _DENIED):
        return CannotRun(
            f"{place}: S3 does not give {path}: {said}\n"
            "  Credentials are looked for where AWS's tools do (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
            "~/.aws, the machine's role); they must allow s3:ListBucket and s3:GetObject"
        )
    return CannotRun(f"{place}: S3 cannot be reached for {path}: {said}\n  It needs the network, or AWS_ENDPOINT_URL of another S3 service")
