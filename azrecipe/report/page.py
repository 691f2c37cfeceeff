"""Report pages: one HTML file for one run or several.

A page opens from disk and needs no network.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from azrecipe.errors import CannotRun, CommandError
from azrecipe.report import comparison_page, history_section, pipeline_page, sections
from azrecipe.report.html import CONTENT_SECURITY_POLICY, GENERATOR_MARK, Html, join_html, render_page, render_sections
from azrecipe.runs.reader import RunRecord, read_run
from azrecipe.utils.atomic_files import write_text

PAGE_FILE = "report.html"
COMPARISON_FILE = "comparison.html"


def write_page(path: Path, output: Path | None = None, *, force: bool = False) -> Path:
    """Write the page of a run, finished or not.

    A page with the same content is not written again.

    Args:
        path: The run directory.
        output: The file of the page; None for report.html in the run directory.
        force: Whether a file is replaced that is no page of azrecipe.

    Returns:
        The file.

    Raises:
        CommandError: The folder has no run, or a damaged one; or the file is no page of azrecipe.
        CannotRun: The file cannot be written.
    """
    run, file = read_run(path), output or path / PAGE_FILE
    _check_replaceable(file, force)
    try:
        if run.stage == "pipeline":
            return _write_html(file, f"Pipeline: {run.name}", render_sections(pipeline_page.build_sections(run, file)))
        run_sections = [*sections.build_run_sections(run), history_section.build_environment_section([run])]
        return _write_html(
            file, f"{sections.stage_title(run)}: {run.name}", join_html([sections.render_summary(run), render_sections(run_sections)])
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged_run_error(path, error) from None


def write_comparison(paths: Sequence[Path], output: Path | None = None, *, force: bool = False) -> Path:
    """Write one page that compares several runs.

    Args:
        paths: The run directories. A pipeline stands for the runs of its steps.
        output: The file of the page; None for comparison.html in the folder that has all runs.
        force: Whether a file is replaced that is no page of azrecipe.

    Returns:
        The file.

    Raises:
        CommandError: A folder has no run, or a damaged one; or the file is no page of azrecipe.
        CannotRun: The file cannot be written.
    """
    folder = Path(os.path.commonpath([path.resolve() for path in paths]))
    file, runs = output or folder / COMPARISON_FILE, []
    _check_replaceable(file, force)
    for path in paths:
        run = read_run(path, os.path.relpath(path.resolve(), folder))
        steps = [RunRecord(step.path, os.path.relpath(step.path.resolve(), folder)) for _, _, step in run.steps if step.recipe]
        runs += steps if run.stage == "pipeline" else [run]
    runs = list({run.path.resolve(): run for run in runs}.values())
    try:
        return _write_html(file, f"Comparison of {len(runs)} runs", render_sections(comparison_page.build_sections(runs, file)))
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise _damaged_run_error(folder, error) from None


def _check_replaceable(file: Path, force: bool) -> None:
    """Raise CommandError for a file that azrecipe did not write."""
    try:
        with file.open("rb") as stream:
            start = stream.read(4096)
    except OSError:  # it is not there, or writing it will fail
        return
    # pages of earlier versions have the policy and no mark
    is_page = any(mark.encode() in start for mark in (GENERATOR_MARK, f'"Content-Security-Policy" content="{CONTENT_SECURITY_POLICY}"'))
    if start and not is_page and not force:
        raise CommandError(f"{file}: this file is no page of azrecipe and is not replaced. Remove it, give another --output, or --force")


def is_page_fresh(path: Path) -> bool:
    """Return whether a run's page is newer than its files."""
    file = path / PAGE_FILE
    return file.exists() and file.stat().st_mtime >= read_run(path).modified_time


def _damaged_run_error(path: Path, error: Exception) -> CommandError:
    return CommandError(f"{path}: damaged, or written by another version of azrecipe: {error!r}")


def _write_html(file: Path, title: str, body: Html) -> Path:
    content = render_page(title, body)
    try:
        if not file.exists() or file.read_text(encoding="utf-8") != content:
            write_text(file, content)
        else:
            os.utime(file)  # its content is current
    except OSError as error:
        raise CannotRun(f"{file}: cannot be written: {error.strerror}") from None
    return file
