"""Checksums of what a run leaves, to notice damage before it is used.

A complete run's result.json has those of the files in final/, adapter/ and candidates/.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from azrecipe.errors import CannotRun
from azrecipe.utils.atomic_files import list_file_sizes, read_json_object
from azrecipe.utils.checksums import compute_checksum

OUTPUT_FOLDERS = ("final", "adapter", "candidates")  # in a run directory
RESULT_FILE = "result.json"
RESULT_KEY = "checksums"
WEIGHTS_SUFFIX = ".safetensors"


def compute_folder_checksums(folder: Path) -> dict[str, str]:
    """Compute the checksum of each file below a folder, by relative path."""
    return {name: compute_checksum(folder / name) for name in list_file_sizes(folder)}


def compute_output_checksums(run_path: Path) -> dict[str, str]:
    """Compute the checksums of what a run leaves for other runs."""
    return {f"{name}/{file}": value for name in OUTPUT_FOLDERS for file, value in compute_folder_checksums(run_path / name).items()}


def find_changed_file(folder: Path, checksums: Mapping[str, str]) -> str | None:
    """Find the first file that is missing or differs from its checksum."""
    return next((name for name, checksum in checksums.items() if _compute_cached_checksum(folder / name) != checksum), None)


def check_output_files(folder: str | Path, *, with_weights: bool = True) -> None:
    """Refuse a complete run's folder whose files are not what it wrote.

    Any other folder passes: nobody knows what it should hold. Files that the run did not write are not looked at.

    Args:
        folder: The final/ or adapter/ of a run, or one of its candidates; or any other folder, or a name on the hub.
        with_weights: Whether weights are read, too.

    Raises:
        CannotRun: A file is missing or differs.
    """
    path = Path(folder)
    if not path.is_dir():
        return
    path = path.resolve()
    run_path = path.parents[1] if path.parent.name == "candidates" else path.parent
    if path.relative_to(run_path).parts[0] not in OUTPUT_FOLDERS:
        return
    checksums = read_json_object(run_path / RESULT_FILE).get(RESULT_KEY)
    prefix = f"{path.relative_to(run_path)}/"
    expected = {
        name.removeprefix(prefix): checksum
        for name, checksum in (checksums if isinstance(checksums, dict) else {}).items()
        if name.startswith(prefix) and (with_weights or not name.endswith(WEIGHTS_SUFFIX))
    }
    changed = find_changed_file(path, expected)
    if changed is not None:
        state = "is not what that run wrote (its checksum differs)" if (path / changed).exists() else "is missing"
        raise CannotRun(
            f"{Path(folder) / changed} {state}. Restore it from a copy, or remove {Path(folder).parents[len(path.relative_to(run_path).parts) - 1]} and run that recipe again.\n"
            "  If you changed the folder yourself, copy it out of the run directory and name the copy"
        )


def _compute_cached_checksum(file: Path) -> str:
    """Compute a file's checksum; "" without a file.

    It is cached in the process until the file's size or time of change differs.
    """
    try:
        stat = file.stat()
    except FileNotFoundError:
        return ""
    return _compute_checksum(file, stat.st_size, stat.st_mtime_ns)


@cache
def _compute_checksum(file: Path, _size: int, _modified_ns: int) -> str:
    return compute_checksum(file)
