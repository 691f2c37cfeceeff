"""Knows where the files that ship with azrecipe stand: in the checkout, or inside the installed wheel."""

from __future__ import annotations

from pathlib import Path

import azrecipe

SHIPPED = ("recipes", "schema", "accelerate_configs", "hardware", "sagemaker")
_PACKAGE = Path(azrecipe.__file__).resolve().parent


def root() -> Path:
    """The folder that holds recipes/, schema/, accelerate_configs/, hardware/ and sagemaker/."""
    packaged = _PACKAGE / "_shipped"
    return packaged if packaged.is_dir() else _PACKAGE.parent


def find(path: str) -> Path:
    """The file or folder that a command line names.

    One that exists is taken as it is. Otherwise a relative path is looked up among the shipped files, so that
    `azrecipe run recipes/quickstart/pipeline.yaml` works from any folder. Falls back to the path as given.
    """
    given = Path(path)
    if given.exists() or given.is_absolute():
        return given
    shipped = root() / given
    return shipped if shipped.exists() and given.parts[:1] in {("recipes",), ("accelerate_configs",), ("sagemaker",)} else given


def copy(folder: Path) -> tuple[int, int]:
    """Write all that ships below a folder; returns (written, left alone)."""
    written = kept = 0
    for top in SHIPPED:
        for source in sorted((root() / top).rglob("*")):
            target = folder / source.relative_to(root())
            if not source.is_file():
                continue
            if target.exists():
                kept += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            written += 1
    return written, kept
