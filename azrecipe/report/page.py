"""Knows which page is written where: one HTML file for a run, or for several, that opens from disk with no network."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from azrecipe.errors import CannotRun, CommandError
from azrecipe.report import comparison_page, history_section, pipeline_page, sections
from azrecipe.report.html import Html, joined, page, parts
from azrecipe.runs.reader import Run, opened
from azrecipe.utils.atomic_files import write_text

NAME = "report.html"
COMPARISON = "comparison.html"


def write(path: Path, output: Path | None = None) -> Path:
    """Make the page of a run, finished or not, from what it left: RUN/report.html, or `output`. Returns where it stands.

    Raises CommandError for a folder that holds no run or a damaged one. A page that says the same already is not touched.
    """
    run, file = opened(path), output or path / NAME
    try:
        if run.stage == "pipeline":
            return _written(file, f"Pipeline: {run.name}", parts(pipeline_page.parts(run, file)))
        found = [*sections.of_run(run), history_section.environment([run])]
        return _written(file, f"{sections.title(run)}: {run.name}", joined([sections.summary(run), parts(found)]))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from None


def compare(paths: Sequence[Path], output: Path | None = None) -> Path:
    """Make one page that shows several runs in the same plots: `output`, or comparison.html in the folder that holds them all.

    A pipeline stands for the runs of its steps. Raises CommandError as `write` does.
    """
    folder = Path(os.path.commonpath([path.resolve() for path in paths]))
    file, runs = output or folder / COMPARISON, []
    for path in paths:
        run = opened(path, os.path.relpath(path.resolve(), folder))
        steps = [Run(each.path, os.path.relpath(each.path.resolve(), folder)) for _, _, each in run.steps if each.recipe]
        runs += steps if run.stage == "pipeline" else [run]
    runs = list({run.path.resolve(): run for run in runs}.values())
    try:
        return _written(file, f"Comparison of {len(runs)} runs", parts(comparison_page.parts(runs, file)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged(folder, error) from None


def fresh(path: Path) -> bool:
    """Whether a run has a page that is newer than what it shows."""
    file = path / NAME
    return file.exists() and file.stat().st_mtime >= opened(path).touched


def _damaged(path: Path, error: Exception) -> CommandError:
    return CommandError(f"{path}: damaged, or written by another version of azrecipe: {error!r}")


def _written(file: Path, title: str, body: Html) -> Path:
    whole = page(title, body)
    try:
        if not file.exists() or file.read_text(encoding="utf-8") != whole:
            write_text(file, whole)
        else:
            os.utime(file)  # what it shows has been looked at again
    except OSError as error:
        raise CannotRun(f"{file}: cannot be written: {error.strerror}") from None
    return file
