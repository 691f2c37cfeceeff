"""The folder in which the processes of a launch leave how they ended.

Launchers turn every failure into exit code 1. For each rank there is its exit code, `<rank>.reason` with its error message, `<rank>.lock`,
which the process holds while it lives, and `<rank>.killed`, which the launcher writes for a process that a signal killed.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path

from azrecipe.errors import EXIT_FAILED
from azrecipe.utils.parent_watch import LockProbe, ProcessLock

LAUNCHER_LOCK = "launcher.lock"  # held by `azrecipe run`
POLL_SECONDS = 0.1
SIGNAL_MEANINGS = {
    "SIGKILL": "often the kernel's out-of-memory killer; the kernel's log tells (dmesg)",
    "SIGSEGV": "a fault in the compiled code of a library",
    "SIGBUS": "memory that is not there: a full /dev/shm, or a file that became shorter while it was read",
    "SIGABRT": "a library ended it; what it printed last says why",
    "SIGILL": "a library has instructions that this processor lacks",
}


def describe_signal_death(name: str, number: int) -> str:
    """Say that a process was killed, and what that often means."""
    signal_name = signal.Signals(number).name if number in set(signal.Signals) else "unknown"
    meaning = f"; {SIGNAL_MEANINGS[signal_name]}" if signal_name in SIGNAL_MEANINGS else ""
    return f"{name} was killed by signal {number} ({signal_name}{meaning}). The last complete checkpoint is kept"


class ExitFolder:
    """Reads and writes that folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def hold_launcher_lock(self) -> ProcessLock:
        """Hold the lock that shows the processes that their launch goes on."""
        return ProcessLock(self.path / LAUNCHER_LOCK)

    @property
    def launcher_lock(self) -> Path:
        return self.path / LAUNCHER_LOCK

    def hold_rank_lock(self, rank: int) -> ProcessLock:
        """Hold the lock that shows that this process lives."""
        return ProcessLock(self.path / f"{rank}.lock")

    def write_code(self, rank: int, code: int) -> None:
        """Record a process' exit code."""
        (self.path / str(rank)).write_text(str(code), encoding="utf-8")

    def write_reason(self, rank: int, message: str) -> None:
        """Record a process' error message."""
        (self.path / f"{rank}.reason").write_text(message, encoding="utf-8")

    def write_death(self, rank: int, number: int) -> str:
        """Record that a signal killed a process; return the message."""
        message = describe_signal_death(f"rank {rank}", number)
        self.write_code(rank, 128 + number)
        (self.path / f"{rank}.killed").write_text(message, encoding="utf-8")
        return message

    def read_codes(self) -> dict[int, int]:
        """Return the exit codes by rank."""
        files = [file for file in self.path.iterdir() if file.name.isdigit()]
        return {int(file.name): int(file.read_text(encoding="utf-8") or EXIT_FAILED) for file in files}

    def read_death(self) -> tuple[int, str] | None:
        """Return exit code and message of a process that a signal killed."""
        for file in self._list_files("killed"):
            return self.read_codes()[int(file.stem)], file.read_text(encoding="utf-8")
        return None

    def read_reason(self, rank: int) -> str:
        """Return a process' error message; "" if it wrote none."""
        file = self.path / f"{rank}.reason"
        return file.read_text(encoding="utf-8") if file.exists() else ""

    def read_message(self) -> str:
        """Return the message of the process that knows best why it ended.

        That is a process that was killed, else the first rank that wrote one; "" if there is none.
        """
        files = [*self._list_files("killed"), *self._list_files("reason")]
        return files[0].read_text(encoding="utf-8").removeprefix("azrecipe: ") if files else ""

    def _list_files(self, suffix: str) -> list[Path]:
        return sorted((file for file in self.path.glob(f"*.{suffix}") if file.stem.isdigit()), key=lambda file: int(file.stem))

    def has_living_process(self) -> bool:
        """Whether a process of the launch still lives."""
        for file in self._list_files("lock"):
            with contextlib.suppress(FileNotFoundError):
                probe = LockProbe(file)
                try:
                    if probe.is_held():
                        return True
                finally:
                    probe.close()
        return False

    def wait_for_processes(self) -> None:
        """Wait until all processes of the launch have ended."""
        while self.has_living_process():
            time.sleep(POLL_SECONDS)
