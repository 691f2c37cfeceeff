"""Knows the user's own file of how near to their cards' roofline their runs came: what `azrecipe plan --calibrate` adds to. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from azrecipe.errors import CannotRun, CommandError
from azrecipe.utils.atomic_files import locked, read_json, write_json


def file() -> Path:
    """$XDG_CONFIG_HOME/azrecipe/calibration.json, by default ~/.config/azrecipe/calibration.json."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "azrecipe" / "calibration.json"


def runs() -> list[dict[str, Any]]:
    """The runs in it: {"run_id", "run", "card", "loops": [{"name", "efficiency", …}], …}. Raises CommandError for a damaged file."""
    try:
        found = read_json(file())
        listed: list[dict[str, Any]] = [] if found is None else found["runs"]
        for run in listed:
            str(run["run_id"]), str(run["card"]), [float(loop["efficiency"]) for loop in run["loops"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(
            f"{file()} is not what azrecipe plan --calibrate writes ({type(error).__name__}: {error}): correct or remove it"
        ) from None
    return listed


def efficiencies() -> list[dict[str, Any]]:
    """The card and the share of its roofline of every training loop there."""
    return [{"card": run["card"], "efficiency": float(loop["efficiency"])} for run in runs() for loop in run["loops"]]


def keep(entry: Mapping[str, Any]) -> None:
    """Add a run, or put it in the place of what was known of the same run_id. Raises CannotRun where nothing can be written."""
    try:
        with locked(file().with_suffix(".lock")):
            others = [run for run in runs() if run["run_id"] != entry["run_id"]]
            write_json(file(), {"runs": [*others, dict(entry)]})
    except OSError as error:
        raise CannotRun(f"{error.filename or file()}: cannot be written: {error.strerror}") from None
