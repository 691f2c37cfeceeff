"""Find, open and identify files of text, local or on S3."""

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

from azrecipe.errors import AzrecipeError, CannotRun, Problem, RecipeError, SourceLocation
from azrecipe.utils.paths import DATA_SUFFIXES, is_s3
from azrecipe.utils.shared_digests import hash_large_file

BUFFER_BYTES = 1 << 20
GLOB_CHARACTERS = "*?["
_MISSING = ("NO_SUCH_BUCKET", "NO_SUCH_KEY", "RESOURCE_NOT_FOUND", "INVALID_BUCKET_NAME", "does not exist", "not found")
_DENIED = ("ACCESS_DENIED", "INVALID_ACCESS_KEY_ID", "SIGNATURE_DOES_NOT_MATCH", "INVALID_SIGNATURE", "UNRECOGNIZED_CLIENT", "403", "TOKEN")


@dataclass(frozen=True)
class DataFile:
    """A file of text, local or on S3.

    Attributes:
        path: The path, or s3://bucket/key.
        size: The bytes of a file on S3.
        modified_ns: When a file on S3 was modified, in nanoseconds.
    """

    path: str
    size: int = 0
    modified_ns: int = 0

    def __str__(self) -> str:
        return self.path

    @property
    def base_name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def format(self) -> str:
        """The format: jsonl, txt or parquet."""
        return PurePosixPath(self.base_name.removesuffix(".gz").removesuffix(".zst")).suffix[1:]

    @property
    def content_id(self) -> str:
        """A name for the content.

        It is the hash of a local file. On S3, where it is expensive to read everything, it is the path, size and time of
        modification.
        """
        return f"{self.path} {self.size} {self.modified_ns}" if is_s3(self.path) else hash_large_file(Path(self.path))

    def open_raw(self) -> Any:
        """Open the file for pyarrow, with random access; raises OSError."""
        import pyarrow

        key = self.path.removeprefix("s3://")
        return _s3(key.partition("/")[0]).open_input_file(key) if is_s3(self.path) else pyarrow.OSFile(self.path)

    def open(self) -> IO[bytes]:
        """Open the decompressed content to be read from the start.

        Raises:
            OSError, EOFError or zlib.error: The file cannot be read. Reading may raise them too.
        """
        if self.base_name.endswith(".zst"):
            import pyarrow

            return io.BufferedReader(pyarrow.CompressedInputStream(self.open_raw(), "zstd"), BUFFER_BYTES)
        plain = io.BufferedReader(self.open_raw() if is_s3(self.path) else io.FileIO(self.path), BUFFER_BYTES)
        return gzip.GzipFile(fileobj=plain) if self.base_name.endswith(".gz") else plain  # type: ignore[return-value]

    def explain_read_error(self, error: Exception, location: SourceLocation) -> AzrecipeError:
        """Build the error for a file that cannot be read.

        Args:
            error: The error of the library.
            location: Where the recipe names the file.
        """
        if is_s3(self.path) and isinstance(error, OSError) and "AWS Error" in str(error):
            return _explain_s3_error(self.path, error, location)
        return RecipeError([Problem(location, f"{self.path}: cannot be read: {getattr(error, 'strerror', None) or error}")])


def list_s3_files(path: str, location: SourceLocation) -> list[DataFile]:
    """List the files of a key, folder or glob on S3, sorted.

    Raises:
        RecipeError: There are no such files.
        CannotRun: S3 denies access or cannot be reached.
    """
    try:
        files = list(_list_s3(path))
    except OSError as error:
        raise _explain_s3_error(path, error, location) from None
    if not files:
        raise RecipeError([Problem(location, f"{path}: no file there ends in {', '.join(DATA_SUFFIXES)}")])
    return files


@lru_cache
def _list_s3(path: str) -> tuple[DataFile, ...]:
    """List the files once; they do not change during a run."""
    from pyarrow import fs

    key = path.removeprefix("s3://").rstrip("/")
    parts = key.split("/")
    first_glob = next((i for i, part in enumerate(parts) if any(c in part for c in GLOB_CHARACTERS)), None)
    if first_glob == 0 or not parts[0]:
        raise FileNotFoundError("the name of the bucket comes before the first /, and cannot be a glob")
    if first_glob is None:
        info = _s3(parts[0]).get_file_info(key)
        if info.type == fs.FileType.NotFound:
            raise FileNotFoundError(f"the key does not exist: {path}")
        if info.type == fs.FileType.File:
            return (DataFile(f"s3://{key}", info.size, info.mtime_ns),)
        infos = _s3(parts[0]).get_file_info(fs.FileSelector(key, recursive=True))
    else:
        recursive = first_glob + 1 < len(parts)
        entries = _s3(parts[0]).get_file_info(fs.FileSelector("/".join(parts[:first_glob]), recursive=recursive))
        infos = [info for info in entries if _matches(info.path.split("/"), parts)]
    files = [DataFile(f"s3://{info.path}", info.size, info.mtime_ns) for info in infos if info.type == fs.FileType.File]
    return tuple(sorted((file for file in files if file.base_name.endswith(DATA_SUFFIXES)), key=lambda file: file.path))


def _matches(key: list[str], pattern: list[str]) -> bool:
    """Whether a key matches a glob, both split at slashes.

    ** matches any number of folders.
    """
    if not pattern or not key:
        return pattern == key
    if pattern[0] == "**":
        return _matches(key, pattern[1:]) or _matches(key[1:], pattern)
    return fnmatch.fnmatchcase(key[0], pattern[0]) and _matches(key[1:], pattern[1:])


@lru_cache
def _s3(bucket: str) -> Any:
    """Open S3 with the credentials and endpoint of AWS's tools.

    pyarrow does not read AWS_ENDPOINT_URL by itself.
    """
    from pyarrow import fs

    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = None
    if endpoint is None:
        with suppress(OSError):  # the error comes again when the bucket is opened
            region = fs.resolve_s3_region(bucket)
    return fs.S3FileSystem(endpoint_override=endpoint, region=region, connect_timeout=10, request_timeout=60)


def _explain_s3_error(path: str, error: OSError, location: SourceLocation) -> AzrecipeError:
    text = str(error)
    reason = text.rpartition("AWS Error ")[2].strip().splitlines()[0] if text.strip() else type(error).__name__
    if isinstance(error, FileNotFoundError) or any(word in text for word in _MISSING):
        return RecipeError([Problem(location, f"no such file on S3: {path} ({reason})")])
    if isinstance(error, PermissionError) or any(word in text for word in _DENIED):
        return CannotRun(
            f"{location}: S3 denies access to {path}: {reason}\n"
            "  Credentials come from where AWS's tools look (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, "
            "~/.aws, the machine's role); they must allow s3:ListBucket and s3:GetObject"
        )
    return CannotRun(
        f"{location}: S3 cannot be reached for {path}: {reason}\n  This needs the network, or AWS_ENDPOINT_URL for another S3 service"
    )
