"""Start Python modules without the working folder on the module path.

`python -m` searches the working folder first: a file such as random.py beside a recipe would be imported in place of the standard
library's, run, and break what needs the real one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
PRINT_ORIGIN = "import importlib.util; spec = importlib.util.find_spec('azrecipe'); print(spec.origin if spec else '')"


def build_python_command(module: str, *arguments: str) -> list[str]:
    """Build the command that runs a module as a script."""
    return [sys.executable, "-P", "-m", module, *arguments]


def build_python_environment() -> dict[str, str]:
    """Build the environment for Python processes that others start in turn.

    A launcher starts `python -m` itself. The option -P does not reach those processes, and the variable does.
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if not _is_found_by_children():
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(PACKAGE_ROOT), environment.get("PYTHONPATH"))))
    return environment


@cache
def _is_found_by_children() -> bool:
    """Whether a Python process without the working folder finds this azrecipe.

    It does not in a checkout that is not installed. This process' own path does not answer: a script may have changed it.
    """
    done = subprocess.run([sys.executable, "-P", "-c", PRINT_ORIGIN], stdout=subprocess.PIPE, text=True, check=False)
    return _is_this_package(done.stdout.strip())


def ensure_importable() -> None:
    """Append this package's folder to a module path that lacks it.

    That is so in a checkout that is not installed, once the working folder has been dropped.
    """
    spec = PathFinder.find_spec("azrecipe", sys.path)
    if spec is None or not _is_this_package(spec.origin or ""):
        sys.path.append(str(PACKAGE_ROOT))


def _is_this_package(origin: str) -> bool:
    return bool(origin) and Path(origin).resolve().parents[1] == PACKAGE_ROOT
