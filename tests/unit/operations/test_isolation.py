"""Unit tests of calls in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from azrecipe import errors
from azrecipe.errors import AzrecipeError, CannotRun, CommandError, Interrupted, Problem, RecipeError, RunFailed, SourceLocation
from azrecipe.operations.isolation import IsolatedCallError, run_isolated, run_isolated_silently
from tests.conftest import ROOT
from tests.unit.operations import isolated_functions as functions


@pytest.fixture(autouse=True)
def path_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child imports the functions below from tests/."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def test_a_result_comes_back_from_another_process() -> None:
    value = {"texts": ("ə", b"\0"), "number": 1.5}
    answer = run_isolated(functions.return_with_pid, value=value)
    assert answer.value == value
    assert answer.pid != os.getpid()


def test_a_large_request_and_result_pass_the_pipes() -> None:
    content = os.urandom(5_000_000)
    assert run_isolated(functions.return_with_pid, value=content).value == content


def test_torch_stays_out_of_this_process() -> None:
    code = (
        "import sys\nfrom azrecipe.operations.isolation import run_isolated\nfrom tests.unit.operations import isolated_functions\n"
        "print(run_isolated(isolated_functions.import_torch), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "True False\n"


def test_the_child_imports_this_azrecipe_and_no_module_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "azrecipe").mkdir()
    (tmp_path / "azrecipe" / "__init__.py").write_text("raise SystemExit(9)")
    (tmp_path / "json.py").write_text("raise SystemExit(9)")
    assert run_isolated(functions.get_folder) == str(tmp_path)


ERRORS: list[AzrecipeError] = [
    RecipeError([Problem(SourceLocation("r.yaml", 3, 4), "no such key"), Problem(SourceLocation("--set x"), "write key=value")]),
    CommandError("there is no step 'x'"),
    CannotRun("no GPU"),
    errors.DamagedFileError("status.json: damaged"),
    RunFailed("loss is nan"),
    Interrupted("interrupted", 143),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_is_raised_again_as_it_was(error: AzrecipeError) -> None:
    with pytest.raises(type(error)) as caught:
        run_isolated(functions.raise_error, error=error)
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)
    assert caught.value.exit_code == error.exit_code
    assert caught.value.__dict__ == error.__dict__


def test_every_class_of_errors_is_tried() -> None:
    classes = {value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, AzrecipeError)}
    assert classes - {AzrecipeError, errors.AllProcessesFailed} <= {type(error) for error in ERRORS}


def test_another_exception_comes_with_its_traceback() -> None:
    with pytest.raises(IsolatedCallError) as caught:
        run_isolated(functions.raise_error, error=ZeroDivisionError("a defect"))
    assert "ZeroDivisionError: a defect" in str(caught.value)
    assert "isolated_functions.py" in str(caught.value)


def test_a_result_that_cannot_be_pickled_is_a_defect() -> None:
    with pytest.raises(IsolatedCallError, match="pickle"):
        run_isolated(functions.return_function)


def test_output_appears_or_is_hidden(capfd: pytest.CaptureFixture[str]) -> None:
    run_isolated(functions.print_lines)
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("on stdout\n", "on stderr\n")
    run_isolated_silently(functions.print_lines)
    assert capfd.readouterr() == ("", "")


def test_hidden_output_is_part_of_a_defect() -> None:
    with pytest.raises(IsolatedCallError, match="on stderr"):
        run_isolated_silently(functions.print_and_exit, code=5)


def test_a_function_that_exits_is_a_defect() -> None:
    with pytest.raises(IsolatedCallError, match="SystemExit: 5"):
        run_isolated(functions.print_and_exit, code=5)


@pytest.mark.parametrize(
    ("number", "error", "text"),
    [
        (signal.SIGKILL, CannotRun, "lack of memory"),
        (signal.SIGTERM, Interrupted, "SIGTERM"),
        (signal.SIGSEGV, RunFailed, "SIGSEGV"),
    ],
)
def test_a_child_that_is_killed_is_explained(number: int, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        run_isolated(functions.kill_itself, number=number)


def test_a_process_that_a_killed_child_leaves_does_not_block() -> None:
    """A forked process holds the pipe to this one open."""
    start = time.monotonic()
    with pytest.raises(CannotRun):
        run_isolated(functions.fork_and_kill_itself, seconds=60)
    assert time.monotonic() - start < 50


def start_and_interrupt(tmp_path: Path, function: str, count: int) -> tuple[int, str]:
    """Interrupt a process and its isolated call, as Ctrl-C does, and return its exit code and output."""
    code = (
        "import signal\nfrom azrecipe.operations.isolation import run_isolated\nfrom tests.unit.operations import isolated_functions\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        f"try:\n    print(run_isolated(isolated_functions.{function}, marker={str(tmp_path / 'begun')!r}))\n"
        "except KeyboardInterrupt:\n    print('interrupted')"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    for number in range(count):
        while not (tmp_path / f"begun{number}").exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_an_interrupted_call_may_save_and_answer(tmp_path: Path) -> None:
    assert start_and_interrupt(tmp_path, "save_when_interrupted", 1) == (0, "saved\n")


def test_an_interrupt_that_the_call_does_not_handle_is_raised(tmp_path: Path) -> None:
    assert start_and_interrupt(tmp_path, "wait_for_ever", 1) == (0, "interrupted\n")


def test_a_second_interrupt_ends_a_call_that_ignores_the_first(tmp_path: Path) -> None:
    assert start_and_interrupt(tmp_path, "ignore_interrupts", 2) == (0, "interrupted\n")
    pid = int((tmp_path / "begun0").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_arguments_are_checked_by_type() -> None:
    untyped: Any = run_isolated
    with pytest.raises(IsolatedCallError, match="unexpected keyword"):
        untyped(functions.print_lines, colour="red")
