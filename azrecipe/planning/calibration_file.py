"""The user's calibration file, which `azrecipe plan --calibrate` writes.

It holds the share of its card's roofline that each run reached. No torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from azrecipe.errors import CannotRun, CommandError
from azrecipe.utils.atomic_files import hold_lock, read_json, write_json


def get_calibration_path() -> Path:
    """Return $XDG_CONFIG_HOME/azrecipe/calibration.json, by default ~/.config/azrecipe/calibration.json."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "azrecipe" / "calibration.json"


def read_calibrated_runs() -> list[dict[str, Any]]:
    """Read the calibrated runs. Raises CommandError for a damaged file.

    A run is {"run_id", "run", "card", "loops": [{"name", "efficiency", …}], …}.
    """
    try:
        content = read_json(get_calibration_path())
        calibrated: list[dict[str, Any]] = [] if content is None else content["runs"]
        for run in calibrated:
            str(run["run_id"]), str(run["card"]), [float(loop["efficiency"]) for loop in run["loops"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{get_calibration_path()} is not what azrecipe plan --calibrate writes ({type(error).__name__}: {error}): correct or remove it"
        ) from None
    return calibrated


def read_efficiencies() -> list[dict[str, Any]]:
    """Read the card and the efficiency of every calibrated loop."""
    return [{"card": run["card"], "efficiency": float(loop["efficiency"])} for run in read_calibrated_runs() for loop in run["loops"]]


def add_calibrated_run(entry: Mapping[str, Any]) -> None:
    """Add a run; it replaces an entry with the same run_id.

    Raises CannotRun where the file cannot be written.
    """
    try:
        with hold_lock(get_calibration_path().with_suffix(".lock")):
            others = [run for run in read_calibrated_runs() if run["run_id"] != entry["run_id"]]
            write_json(get_calibration_path(), {"runs": [*others, dict(entry)]})
    except OSError as error:
        raise CannotRun(f"{error.filename or get_calibration_path()}: cannot be written: {error.strerror}") from None
