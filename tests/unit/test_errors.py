"""A file that cannot grow: exit code 3, in words, with the file, whichever library writes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from azrecipe.errors import CannotRun, explain_error, name_written_path

WRITE = """
import resource, sys
from pathlib import Path
import pyarrow, pyarrow.parquet, safetensors.torch, torch
from azrecipe.errors import explain_error
from azrecipe.utils.atomic_files import append_json_lines, atomic_file, atomic_folder, write_text

numbers = torch.arange(100_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))


def write(kind, path):
    if kind == "text":
        write_text(path, "x" * 100_000)
    elif kind == "lines":
        append_json_lines(path, ["x" * 100_000])
    elif kind == "parquet":
        with atomic_file(path) as file:
            pyarrow.parquet.write_table(pyarrow.table({"a": numbers.numpy()}), file, compression="none", use_dictionary=False)
    else:
        with atomic_folder(path) as tmp:
            torch.save(numbers, tmp / "a") if kind == "torch" else safetensors.torch.save_file({"a": numbers}, tmp / "a")


for kind in sys.argv[2:]:
    try:
        write(kind, Path(sys.argv[1], kind))
    except Exception as error:
        known = explain_error(error)
        print(kind, known.exit_code if known else "defect", known or repr(error))
"""


def test_a_limit_on_the_size_of_files_is_told_with_the_file(tmp_path: Path) -> None:
    kinds = ["text", "lines", "parquet", "torch", "safetensors"]
    done = subprocess.run([sys.executable, "-c", WRITE, str(tmp_path), *kinds], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == len(kinds), done.stdout
    for kind, line in zip(kinds, lines, strict=True):
        assert line.startswith(f"{kind} 3 ") and f"({tmp_path / kind})" in line
        assert "larger than is allowed here (ulimit -f)" in line or (kind == "torch" and "the disk is full" in line)
    assert [path.name for path in tmp_path.iterdir()] == ["lines"]  # nothing else that is half-written stays


@pytest.mark.parametrize("number", [28, 122, 27])
def test_texts_of_libraries_in_rust_are_known(number: int) -> None:
    error = RuntimeError(f"I/O error: {os.strerror(number)} (os error {number})")
    with pytest.raises(RuntimeError), name_written_path("outer"), name_written_path("final/model.safetensors"):
        raise error
    known = explain_error(error)
    assert isinstance(known, CannotRun) and "(final/model.safetensors)" in str(known)
