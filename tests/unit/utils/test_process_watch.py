"""The watch of a process: signals that come to a step which never ends, stacks, and a parent that dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from azrecipe.errors import CommandError
from azrecipe.utils.parent_watch import LockProbe, ProcessLock
from azrecipe.utils.process_watch import ProcessWatch
from tests.conftest import ROOT

REPEAT = "import azrecipe.utils.process_watch as watch; watch.REPEAT_SECONDS = 0.2; "


def start(kind: str, folder: Path, *, parent: str = "", timeout: str = "30") -> subprocess.Popen[str]:
    code = (
        REPEAT + f"from pathlib import Path; from tests.unit.utils.watched import main; main({kind!r}, Path({str(folder)!r}), {parent!r})"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "AZRECIPE_STOP_TIMEOUT": timeout}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if kind == "stuck":
        time.sleep(0.5)  # it says that it is ready before it blocks
    return process


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, err = process.communicate(timeout=60)
    assert not err
    return process.returncode, out


def test_a_step_that_never_ends_is_ended_with_its_stacks(tmp_path: Path) -> None:
    process = start("stuck", tmp_path, timeout="0.3")
    process.send_signal(signal.SIGTERM)
    code, out = end(process)
    assert code == 143
    assert out.startswith("143 the training step did not end within 0 s of SIGTERM: ended at once, without a checkpoint")
    stacks = (tmp_path / "stacks" / "rank-0.txt").read_text()
    assert "block_in_compiled_code" in stacks and "process_watch.py" in stacks  # all threads


@pytest.mark.parametrize(("kind", "number", "code"), [("stuck", signal.SIGHUP, 143), ("saving", signal.SIGINT, 130)])
def test_a_second_signal_ends_it_at_once(tmp_path: Path, kind: str, number: int, code: int) -> None:
    process = start(kind, tmp_path)
    process.send_signal(number)
    time.sleep(0.5)
    process.send_signal(number)
    ended, out = end(process)
    assert (ended, out.split(":")[0]) == (code, f"{code} {signal.Signals(number).name} came again")


def test_a_repeated_sigterm_does_not_disturb_one_that_saves(tmp_path: Path) -> None:
    process = start("saving", tmp_path)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert process.poll() is None
    process.kill()
    process.communicate()


def test_a_step_without_progress_writes_its_stacks_and_goes_on(tmp_path: Path) -> None:
    process = start("slow", tmp_path)
    file = tmp_path / "stacks" / "rank-0.txt"
    while not file.stat().st_size:
        time.sleep(0.02)
    assert process.poll() is None
    process.kill()
    process.communicate()
    assert "block_in_compiled_code" in file.read_text()


def test_a_crash_writes_its_stacks(tmp_path: Path) -> None:
    process = start("stuck", tmp_path)
    process.send_signal(signal.SIGSEGV)
    assert end(process)[0] == -signal.SIGSEGV
    assert "block_in_compiled_code" in (tmp_path / "stacks" / "rank-0.txt").read_text()


def test_a_forked_childs_signal_is_not_its_parents_and_nothing_is_left(tmp_path: Path) -> None:
    code, out = end(start("fork", tmp_path))
    assert (code, out.splitlines()[-1]) == (0, "signal seen: 0")
    assert not (tmp_path / "stacks").exists()


def test_a_process_ends_when_its_parent_has_died_before_it_began(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    code, out = end(start("run", tmp_path, parent=str(dead.pid)))
    assert (code, out) == (0, f"stopped by {int(signal.SIGTERM)}\n")


def test_nohup_keeps_the_process(tmp_path: Path) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the child inherits it
    try:
        process = start("run", tmp_path)
    finally:
        signal.signal(signal.SIGHUP, old)
    process.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert end(process)[1] == f"stopped by {int(signal.SIGTERM)}\n"


def test_a_lock_is_held_as_long_as_its_process_lives(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from azrecipe.utils.parent_watch import ProcessLock\nlock = ProcessLock(Path('lock')); print(1, flush=True); sys.stdin.read()"
    child = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert child.stdout is not None
    child.stdout.readline()
    probe = LockProbe(tmp_path / "lock")
    assert probe.is_held()
    child.kill()
    child.communicate()
    assert not probe.is_held()
    probe.close()
    ProcessLock(tmp_path / "lock").close()  # free again


def test_a_wrong_timeout_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for value in ("soon", "-1", "nan", "inf", "0"):
        monkeypatch.setenv("AZRECIPE_STOP_TIMEOUT", value)
        with pytest.raises(CommandError, match=f"AZRECIPE_STOP_TIMEOUT={value}: give a number of seconds above 0, such as 20"):
            ProcessWatch(None, lambda *_: None)
