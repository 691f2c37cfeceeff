"""Watch one process of a run: its parent, its signals, its steps.

A process inside a collective operation of NCCL does not return to Python, so no handler of a signal runs. This watch is a thread that is
told of each signal all the same. It ends the process where nothing else does, and writes down first what all threads were doing.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from azrecipe.errors import EXIT_SIGINT, EXIT_SIGTERM
from azrecipe.utils.environment_variables import STOP_TIMEOUT
from azrecipe.utils.parent_watch import POLL_SECONDS, ParentProbe

STACKS_FOLDER = "stacks"  # in a run directory
REPEAT_SECONDS = 5.0  # a terminal, a scheduler and a launcher each send a signal on: within this time it is one
PARENT_GRACE_SECONDS = 120.0  # for work outside a step, once the parent has died
STEP_FACTOR = 3.0  # a step may take so many times the longest one before, whatever STOP_TIMEOUT says


def list_stop_signals() -> list[signal.Signals]:
    """List the signals that end a run with a checkpoint.

    SIGHUP is one, unless it is ignored: so nohup asks.
    """
    hangup = [] if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else [signal.SIGHUP]
    return [signal.SIGTERM, signal.SIGINT, *hangup]


def is_stop_signal(number: int) -> bool:
    """Whether a signal asks a run to stop."""
    return number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def get_signal_exit_code(number: int) -> int:
    """Return the exit code of a run that a signal stopped.

    SIGHUP counts as SIGTERM.
    """
    return EXIT_SIGINT if number == signal.SIGINT else EXIT_SIGTERM


class ProcessWatch:
    """Watches this process within a `with` block, which the main thread enters."""

    def __init__(self, parent: ParentProbe | None, on_forced_end: Callable[[int, str], None]) -> None:
        """Set what is watched.

        Args:
            parent: Asks for the parent; None where this process may outlive it.
            on_forced_end: Called with the exit code and a message before the watch ends the process.

        Raises:
            CommandError: AZRECIPE_STOP_TIMEOUT is no number of seconds.
        """
        self.parent, self.on_forced_end, self.stop_timeout = parent, on_forced_end, STOP_TIMEOUT.read_seconds()
        self.parent_died = False
        self.stacks: IO[str] | None = None
        self.stacks_file: Path | None = None
        self.first_signal = 0
        self.signal_time = self.progress_time = 0.0
        self.longest_progress = 0.0
        self.in_step = self.is_stopping = False
        self.dump_after = 0.0
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._run, name="process watch", daemon=True)

    def __enter__(self) -> ProcessWatch:
        global _current
        self.previous_descriptor = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)
        self.process = os.getpid()
        self.thread.start()
        _current = self
        return self

    def __exit__(self, *_: object) -> None:
        global _current
        _current = None
        if os.getpid() != self.process:  # a forked child that leaves the block
            return
        signal.set_wakeup_fd(self.previous_descriptor)
        self.closed.set()
        os.write(self.writer, b"\0")
        self.thread.join()
        os.close(self.reader)
        os.close(self.writer)
        self._close_stacks()

    def open_stacks(self, run_path: Path, rank: int, dump_after: float) -> None:
        """Choose the file for stacks, in a run directory.

        A crash of this process writes there, too.

        Args:
            run_path: The run directory.
            rank: This process' rank.
            dump_after: Seconds without progress in a step after which the stacks are written; 0: never.
        """
        self._close_stacks()
        self.dump_after = dump_after
        self.stacks_file = run_path / STACKS_FOLDER / f"rank-{rank}.txt"
        with contextlib.suppress(OSError):
            self.stacks_file.parent.mkdir(exist_ok=True)
            self.stacks = self.stacks_file.open("a", encoding="utf-8")
            faulthandler.enable(self.stacks)

    def _close_stacks(self) -> None:
        if self.stacks is None or self.stacks_file is None:
            return
        faulthandler.cancel_dump_traceback_later()
        faulthandler.disable()
        self.stacks.close()
        self.stacks = None
        with contextlib.suppress(OSError):
            if self.stacks_file.stat().st_size == 0:
                self.stacks_file.unlink()
            self.stacks_file.parent.rmdir()  # where nothing was written

    def leave_loop(self) -> None:
        """Note that the training loop has ended, in whatever way."""
        self.in_step = False
        self._close_stacks()

    def begin_step(self) -> None:
        """Note that a training step begins."""
        self.in_step, self.progress_time = True, time.monotonic()
        self._arm_dump()

    def record_progress(self) -> None:
        """Note that a part of a step has ended."""
        now = time.monotonic()
        self.longest_progress = max(self.longest_progress, now - self.progress_time)
        self.progress_time = now
        self._arm_dump()

    def end_step(self) -> None:
        """Note that a training step has ended."""
        self.record_progress()
        self.in_step = False
        if self.dump_after:
            faulthandler.cancel_dump_traceback_later()

    def acknowledge_stop(self) -> None:
        """Note that the process saves and ends.

        A repeated SIGTERM is then no reason to hurry."""
        self.is_stopping = True

    def has_lost_parent(self) -> bool:
        """Whether what started this process has died."""
        return self.parent_died or (self.parent is not None and self.parent.is_parent_dead())

    def _arm_dump(self) -> None:
        if self.dump_after and self.stacks is not None:
            faulthandler.dump_traceback_later(self.dump_after, file=self.stacks)

    def _run(self) -> None:
        while not self.closed.is_set():
            select.select([self.reader], [], [], POLL_SECONDS)
            with contextlib.suppress(BlockingIOError):
                for number in os.read(self.reader, 4096):
                    self._note_signal(number)
            self._check_parent()
            self._check_step()

    def _note_signal(self, number: int) -> None:
        if not is_stop_signal(number):
            return
        now = time.monotonic()
        if not self.first_signal:
            self.first_signal, self.signal_time = number, now
        elif now - self.signal_time >= REPEAT_SECONDS and (number == signal.SIGINT or not self.is_stopping):
            self._end_process(f"{signal.Signals(number).name} came again")

    def _check_parent(self) -> None:
        if self.parent is None:
            return
        if not self.parent_died and self.parent.is_parent_dead():
            self.parent_died = True
            os.kill(os.getpid(), signal.SIGTERM)
        is_busy = self.first_signal and not self.in_step and not self.is_stopping
        if self.parent_died and is_busy and time.monotonic() - self.signal_time > PARENT_GRACE_SECONDS:
            self._end_process("what started this process has ended")

    def _check_step(self) -> None:
        if not self.first_signal or not self.in_step:
            return
        limit = max(self.stop_timeout, STEP_FACTOR * self.longest_progress)
        if time.monotonic() - max(self.signal_time, self.progress_time) > limit:
            self._end_process(f"the training step did not end within {limit:.0f} s of {signal.Signals(self.first_signal).name}")

    def _end_process(self, reason: str) -> None:
        """Write the stacks, report, and end the process at once."""
        code = get_signal_exit_code(self.first_signal or signal.SIGTERM)
        where = ""
        if self.stacks is not None:
            with contextlib.suppress(OSError):
                self.stacks.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {reason}\n")
                self.stacks.flush()
                faulthandler.dump_traceback(self.stacks, all_threads=True)
                where = f"; what it was doing is in {self.stacks_file}"
        try:
            self.on_forced_end(code, f"{reason}: ended at once, without a checkpoint. The last complete one is kept{where}")
        finally:
            os._exit(code)


_current: ProcessWatch | None = None


def get_process_watch() -> ProcessWatch | None:
    """Return the watch of this process, if there is one."""
    return _current


def _forget_watch() -> None:
    """Let a forked child tell no signals to its parent's watch."""
    global _current
    if _current is not None:
        _current = None
        with contextlib.suppress(ValueError):  # not the main thread
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_watch)
