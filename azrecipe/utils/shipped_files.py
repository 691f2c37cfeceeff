"""Paths of the recipes, schemas and configs that come with azrecipe.

They lie in the checkout or inside the installed wheel.
"""

from __future__ import annotations

from pathlib import Path

import azrecipe

SHIPPED_FOLDERS = ("recipes", "schema", "accelerate_configs", "hardware", "sagemaker")
# What a run reads. They are listed by name: other files may lie beside them in a checkout.
RUNTIME_FILES = (
    *(f"schema/{name}.json" for name in (
        "common", "evaluate", "hardware", "merge", "pipeline", "plan", "pretrain", "result", "sagemaker", "sft", "tokenizer",
    )),
    *(f"accelerate_configs/{name}.yaml" for name in ("context", "cpu", "ddp", "fsdp", "hsdp", "zero2", "zero3")),
    *(f"hardware/{name}.yaml" for name in ("calibration", "efficiencies", "hardware", "models")),
)  # fmt: skip
_PACKAGE = Path(azrecipe.__file__).resolve().parent


def locate_root() -> Path:
    """Return the folder that contains the shipped folders."""
    packaged = _PACKAGE / "_shipped"
    return packaged if packaged.is_dir() else _PACKAGE.parent


def resolve_shipped_path(path: str) -> Path:
    """Return the file or folder that a command line names.

    A path that exists is returned unchanged. Otherwise a relative path is looked up among the shipped files, so that
    `azrecipe run recipes/quickstart/pipeline.yaml` works from any folder. A path that is in neither is returned unchanged.
    """
    local = Path(path)
    if local.exists() or local.is_absolute():
        return local
    shipped = locate_root() / local
    return shipped if shipped.exists() and local.parts[:1] in {("recipes",), ("accelerate_configs",), ("sagemaker",)} else local


def copy_shipped_files(folder: Path) -> tuple[int, int]:
    """Copy all shipped files into a folder.

    Files that exist there are not changed. Returns the numbers of files that were written and skipped.
    """
    num_written = num_skipped = 0
    for top in SHIPPED_FOLDERS:
        for source in sorted((locate_root() / top).rglob("*")):
            target = folder / source.relative_to(locate_root())
            if not source.is_file():
                continue
            if target.exists():
                num_skipped += 1
                continue
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
            num_written += 1
    return num_written, num_skipped
