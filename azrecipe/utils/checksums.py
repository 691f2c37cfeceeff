"""Checksums of files, to notice damage before a file is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import xxhash

READ_BYTES = 8 << 20


def compute_checksum(file: Path) -> str:
    """Compute the XXH3 checksum (128 bits) of a file, in hexadecimal.

    It notices damage, not forgery.
    """
    digest = xxhash.xxh3_128()
    with file.open("rb") as content:
        while block := content.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def find_damaged_file(folder: Path, checksums: Mapping[str, str]) -> str | None:
    """Find the first file whose content differs from its checksum.

    Raises OSError where a file cannot be read.
    """
    return next((name for name, checksum in checksums.items() if compute_checksum(folder / name) != checksum), None)
