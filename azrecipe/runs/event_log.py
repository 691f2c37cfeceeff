"""Read and write history.jsonl, the log of a run's starts and ends.

It has one line for each event. Lines are added and never changed.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

EVENT_LOG_NAME = "history.jsonl"


def format_current_time() -> str:
    """Return the current time to the second, with its time zone."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def log_start(run: Path) -> None:
    """Log that a process begins to work in a run directory.

    A process that is killed logs no end.
    """
    log_event(run, "started", host=platform.node(), world_size=int(os.environ.get("WORLD_SIZE", "1")))


def log_event(run: Path, event: str, **details: Any) -> None:
    """Add a line {"time", "event", …details} and sync it to disk.

    The line begins after an incomplete line, which a crash may leave. An error of the disk is ignored, as it must not end
    the run.
    """
    file = run / EVENT_LOG_NAME
    with contextlib.suppress(OSError):
        is_incomplete = file.exists() and not file.read_bytes().endswith(b"\n")
        with file.open("a", encoding="utf-8") as out:
            out.write(
                ("\n" if is_incomplete else "")
                + json.dumps({"time": format_current_time(), "event": event, **details}, ensure_ascii=False)
                + "\n"
            )
            out.flush()
            os.fsync(out.fileno())


def read_events(run: Path) -> list[dict[str, Any]]:
    """Return the events in order, without incomplete lines.

    The list is empty for a run of an azrecipe that wrote no log.
    """
    return read_json_lines(run / EVENT_LOG_NAME)


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Return the mappings in a file of JSON lines.

    Lines that a crash left incomplete are skipped. The list is empty without a file.
    """
    rows: list[dict[str, Any]] = []
    if not file.exists():
        return rows
    for text in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(text)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
