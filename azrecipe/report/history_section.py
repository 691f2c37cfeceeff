"""The report of a run's state, starts, interruptions and machines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from azrecipe.report.html import Html, Section, join_html, render_table, tag
from azrecipe.runs.reader import RunRecord
from azrecipe.utils.console import format_duration


def collect_state(run: RunRecord) -> dict[str, str]:
    """Collect state and times."""
    status = run.status
    return {
        "state": run.state,
        "started": format_time(status.get("started")),
        "finished": format_time(status.get("finished")),
        "from first start to end": format_time_between(status.get("started"), status.get("finished")),
        "starts": f"{status['resumed'] + 1}" if isinstance(status.get("resumed"), int) else "",
    }


def render_message(run: RunRecord) -> Html:
    """Render the reason why a run is not complete."""
    return tag("blockquote", run.status["message"]) if run.status.get("message") and run.state != "complete" else Html("")


def build_starts_section(run: RunRecord) -> Section:
    """Build the section of a run's starts and their ends."""
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
            message_text = f": {line['message']}" if line.get("message") else ""
            rows[-1]["end"] = f"{event} {format_time(line.get('time'))}{message_text}"
    for index, row in enumerate(rows):
        if not row["end"]:
            is_last = index + 1 == len(rows)
            row["end"] = "no end yet: it is running, or was killed" if is_last and run.state == "running" else "killed without a message"
    if len(rows) < 2:
        return Section(
            "Interruptions", tag("p", "None: it was started once and ran to its end.") if rows and run.state == "complete" else Html("")
        )
    cells = [
        [str(number), format_time(row["time"]), row["where"], row["from"] or "the start of the run or of a phase", row["end"]]
        for number, row in enumerate(rows, 1)
    ]
    return Section(
        "Interruptions", render_table("Every start of this run", ["start", "at", "machine, processes", "continued from", "ended"], cells)
    )


def build_environment_section(runs: Sequence[RunRecord]) -> Section:
    """Build the section of machines and versions, and their differences between runs."""
    environments = {run.name: _flatten(run.environment) for run in runs if run.environment}
    names = list(dict.fromkeys(key for each in environments.values() for key in each))
    same = {
        key: next(iter(environments.values())).get(key, "–") for key in names if len({each.get(key) for each in environments.values()}) == 1
    }
    differing = [[key, *(each.get(key, "–") for each in environments.values())] for key in names if key not in same]
    shared = "; ".join(f"{key} {value}" for key, value in same.items())
    return Section(
        "Environment", join_html([tag("p", shared) if shared else "", render_table("What differs", ["", *environments], differing)])
    )


def _flatten(environment: Mapping[str, Any]) -> dict[str, str]:
    names = {"azrecipe": "azrecipe", "commit": "commit", "python": "Python", "platform": "platform", "cpus": "CPUs",
             "torch_threads": "threads", "world_size": "processes"}  # fmt: skip
    texts = {name: str(environment[key]) for key, name in names.items() if environment.get(key) is not None}
    gpus = environment.get("gpus") or []
    texts["GPUs"] = ", ".join(f"{gpus.count(name)} × {name}" for name in dict.fromkeys(gpus)) or "none"
    return texts | {name: str(version) for name, version in environment.get("versions", {}).items()}


def format_time(time: str | None) -> str:
    """Format a time of status.json."""
    return time.replace("T", " ").replace("+0000", " UTC") if time else ""


def format_time_between(start: str | None, end: str | None) -> str:
    """Format the time between two times of status.json."""
    try:
        return format_duration((datetime.fromisoformat(str(end)) - datetime.fromisoformat(str(start))).total_seconds())
    except (TypeError, ValueError):
        return ""
