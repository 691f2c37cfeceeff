"""Files beside a recipe that have the names of modules: they neither run nor break anything."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from azrecipe.pipeline.launch_command import run_child
from azrecipe.utils.python_command import PACKAGE_ROOT, build_python_command, build_python_environment
from tests.conftest import write

SHADOW = "from pathlib import Path\nPath(__file__).with_suffix('.imported').touch()\nraise ImportError('the file beside the recipe')\n"


@pytest.fixture
def shadowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with files named as modules of the standard library and of packages."""
    for name in ("random", "token", "argparse", "tempfile", "psutil", "accelerate"):
        write(tmp_path / f"{name}.py", SHADOW)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def assert_untouched(folder: Path) -> None:
    assert not [file.name for file in folder.glob("*.imported")]


def test_a_child_does_not_search_the_working_folder(shadowed: Path) -> None:
    assert run_child(build_python_command("azrecipe", "--version"), "the child").exit_code == 0
    assert_untouched(shadowed)


def test_what_a_launcher_starts_does_not_search_it_either(shadowed: Path) -> None:
    """torch's agent starts `python -u -m azrecipe`: the environment keeps the folder out."""
    command = [sys.executable, "-u", "-m", "azrecipe", "--version"]
    done = subprocess.run(command, env=build_python_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_untouched(shadowed)


def test_a_users_own_start_does_not_search_it(shadowed: Path) -> None:
    """`accelerate launch -m azrecipe` and `python -m azrecipe`, without a word in the environment."""
    environment = {name: value for name, value in build_python_environment().items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, "-m", "azrecipe", "--version"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_untouched(shadowed)


def test_a_checkout_that_is_not_installed_is_found_by_all_its_processes(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE_ROOT / "azrecipe", tmp_path / "azrecipe", ignore=shutil.ignore_patterns("__pycache__", "_shipped"))
    code = (
        "import runpy, subprocess, sys\n"
        "from azrecipe.utils.python_command import build_python_command, build_python_environment\n"
        "child = [sys.executable, '-c', 'import azrecipe; print(azrecipe.__file__)']\n"
        "print(subprocess.run(child, env=build_python_environment(), capture_output=True, text=True, cwd='/').stdout, end='')\n"
    )
    environment = {name: value for name, value in build_python_environment().items() if name not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(tmp_path / "azrecipe" / "__init__.py"), done.stderr
