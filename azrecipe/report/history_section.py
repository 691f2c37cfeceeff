"""Knows how a page tells what happened to any run: its state, its starts and interruptions, and the machine that it ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from azrecipe.report.html import Html, Part, joined, table, tag
from azrecipe.runs.reader import Run
from azrecipe.utils.console import duration


def facts(run: Run) -> dict[str, str]:
    """State and times."""
    status = run.status
    return {
        "state": run.state,
        "started": moment(status.get("started")),
        "finished": moment(status.get("finished")),
        "from first start to end": between(status.get("started"), status.get("finished")),
        "starts": f"{status['resumed'] + 1}" if isinstance(status.get("resumed"), int) else "",
    }


def message(run: Run) -> Html:
    """Why a run is not complete."""
    return tag("blockquote", run.status["message"]) if run.status.get("message") and run.state != "complete" else Html("")


def starts(run: Run) -> Part:
    """Each start: when, on how many processes, what it went on from, and how it ended."""
    rows: list[dict[str, str]] = []
    for line in run.history:
        event = line.get("event")
        if event == "started":
            rows.append({"time": line.get("time", ""), "where": f"{line.get('host')}, {line.get('world_size')}", "from": "", "end": ""})
        elif not rows:
            continue
        elif event == "training":
            if line.get("step"):
                rows[-1]["from"] = f"{line.get('phase')}, step {line['step']:,}"
        else:
            said = f": {line['message']}" if line.get("message") else ""
            rows[-1]["end"] = f"{event} {moment(line.get('time'))}{said}"
    for nth, row in enumerate(rows):
        if not row["end"]:
            last = nth + 1 == len(rows)
            row["end"] = "no end yet: it runs, or was killed" if last and run.state == "running" else "killed: it left no word"
    if len(rows) < 2:
        return Part(
            "Interruptions", tag("p", "None: it was started once and ran to its end.") if rows and run.state == "complete" else Html("")
        )
    cells = [
        [str(nth), moment(row["time"]), row["where"], row["from"] or "its beginning, or a phase's", row["end"]]
        for nth, row in enumerate(rows, 1)
    ]
    return Part("Interruptions", table("Every start of this run", ["start", "at", "machine, processes", "went on from", "ended"], cells))


def environment(runs: Sequence[Run]) -> Part:
    """The machines and versions; where runs differ, which had what."""
    found = {run.name: _flat(run.environment) for run in runs if run.environment}
    names = list(dict.fromkeys(key for each in found.values() for key in each))
    same = {key: next(iter(found.values())).get(key, "–") for key in names if len({each.get(key) for each in found.values()}) == 1}
    differing = [[key, *(each.get(key, "–") for each in found.values())] for key in names if key not in same]
    shared = "; ".join(f"{key} {value}" for key, value in same.items())
    return Part("Environment", joined([tag("p", shared) if shared else "", table("What differs", ["", *found], differing)]))


def _flat(found: Mapping[str, Any]) -> dict[str, str]:
    names = {"azrecipe": "azrecipe", "commit": "commit", "python": "Python", "platform": "platform", "cpus": "CPUs",
             "torch_threads": "threads", "world_size": "processes"}  # fmt: skip
    told = {name: str(found[key]) for key, name in names.items() if found.get(key) is not None}
    gpus = found.get("gpus") or []
    told["GPUs"] = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)) or "none"
    return told | {name: str(version) for name, version in found.get("versions", {}).items()}


def moment(when: str | None) -> str:
    """A time of status.json as a page shows it."""
    return when.replace("T", " ").replace("+0000", " UTC") if when else ""


def between(first: str | None, last: str | None) -> str:
    """How long it is from one time to another."""
    try:
        return duration((datetime.fromisoformat(str(last)) - datetime.fromisoformat(str(first))).total_seconds())
    except (TypeError, ValueError):
        return ""
