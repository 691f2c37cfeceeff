"""The built wheel carries recipes, schemas and accelerate configs, and works from any other folder."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def call(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command from the installed wheel, in a folder that holds nothing of ours."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_the_wheel_carries_what_the_checkout_has(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for top in ("recipes", "schema", "accelerate_configs", "hardware"):
        for file in (ROOT / top).rglob("*"):
            if file.is_file():
                assert f"azrecipe/_shipped/{file.relative_to(ROOT)}" in names
    assert "azrecipe/py.typed" in names
    assert not [name for name in names if name.startswith("tests/")]


def test_the_same_commands_work_elsewhere(installed: Path, tmp_path: Path) -> None:
    where = call(installed, tmp_path, "-c", "import azrecipe; print(azrecipe.__file__)")
    assert where.stdout.startswith(str(installed))
    loaded = call(installed, tmp_path, "-c", "import azrecipe; print(azrecipe.load_recipe('recipes/quickstart/sft.yaml').stage)")
    assert loaded.stdout == "sft\n", loaded.stderr
    valid = call(installed, tmp_path, "-m", "azrecipe", "validate", "recipes")
    assert valid.returncode == 0, valid.stderr
    assert "recipes valid" in valid.stdout
    short = ("--set", "phases[0].max_steps=2", "--set", "tokenizer.vocab_size=300")
    ran = call(
        installed,
        tmp_path,
        "-m",
        "azrecipe",
        "run",
        "recipes/quickstart/pretrain.yaml",
        "--accelerate-config",
        "ddp",
        "--num-processes",
        "2",
        *short,
    )
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "runs" / "quickstart" / "pretrain" / "final" / "model.safetensors").exists()
    launched = call(installed, tmp_path, "-m", "accelerate.commands.launch", "-m", "azrecipe", "recipes/quickstart/pretrain.yaml", *short)
    assert "already complete" in launched.stderr


def test_copy_writes_recipes_to_edit_and_overwrites_nothing(installed: Path, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "sft.yaml").write_text("mine")
    copied = call(installed, tmp_path, "-m", "azrecipe", "copy", ".")
    assert copied.returncode == 0, copied.stderr
    assert "1 existing kept" in copied.stdout
    assert (tmp_path / "recipes" / "sft.yaml").read_text() == "mine"
    assert (tmp_path / "accelerate_configs" / "ddp.yaml").exists()
    (tmp_path / "recipes" / "sft.yaml").unlink()
    call(installed, tmp_path, "-m", "azrecipe", "copy", ".")
    assert call(installed, tmp_path, "-m", "azrecipe", "validate", "recipes").returncode == 0
