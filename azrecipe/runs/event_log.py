"""Knows the log of a run's starts and ends, history.jsonl (one line each, added and never changed), and how times are written."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

NAME = "history.jsonl"


def now() -> str:
    """The time, to the second, with its zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def started(run: Path) -> None:
    """Note that a process begins to work in a run directory. One that is killed leaves no end behind its start."""
    note(run, "started", host=platform.node(), world_size=int(os.environ.get("WORLD_SIZE", "1")))


def note(run: Path, event: str, **more: Any) -> None:
    """Add a line {"time", "event", …}, synced to disk, behind one that a crash has torn. That it cannot be written fails no run."""
    file = run / NAME
    with contextlib.suppress(OSError):
        torn = file.exists() and not file.read_bytes().endswith(b"\n")
        with file.open("a", encoding="utf-8") as out:
            out.write(("\n" if torn else "") + json.dumps({"time": now(), "event": event, **more}, ensure_ascii=False) + "\n")
            out.flush()
            os.fsync(out.fileno())


def read(run: Path) -> list[dict[str, Any]]:
    """The lines in order, torn ones left out; none for a run that was made before there was a log."""
    return lines(run / NAME)


def lines(file: Path) -> list[dict[str, Any]]:
    """The mappings in a file of JSON lines, those that a crash has torn left out; none where there is no file."""
    found: list[dict[str, Any]] = []
    if not file.exists():
        return found
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            found.append(line)
    return found
