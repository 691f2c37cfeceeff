"""Checksums of files, to notice damage before a file is used."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import xxhash

from azrecipe.utils.shared_digests import share_digest

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


def find_damaged_file(folder: Path, checksums: Mapping[str, str], launch: str | None = None) -> str | None:
    """Find the first file whose content differs from its checksum.

    Args:
        folder: The folder of the files.
        checksums: The checksum of each file, by its path in the folder.
        launch: The name of a launch whose processes on this machine all ask: one of them reads a large file. None: this process reads.

    Raises:
        OSError: A file cannot be read.
    """
    for name, checksum in checksums.items():
        file = folder / name
        if (compute_checksum(file) if launch is None else share_digest(file, f"xxh3 {launch}", compute_checksum)) != checksum:
            return name
    return None
