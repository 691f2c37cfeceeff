"""Notice that the process which started this one has died.

A process that dies by SIGKILL can tell nobody. Its children see that they have another parent, and that the lock which it held is free;
the lock also works for grandchildren, and where the parent died before the child asked. Linux' parent-death signal is not used: it comes
when the thread that forked ends, and it needs a call in the child, too.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable
from pathlib import Path

POLL_SECONDS = 0.5


class ProcessLock:
    """A file lock that shows whether this process lives.

    It is a POSIX record lock, which a forked child does not inherit. Where the file system has no locks, there is no file afterwards.
    """

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            file.unlink(missing_ok=True)

    def close(self) -> None:
        """Release the lock."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


class LockProbe:
    """Asks whether another process still holds a ProcessLock.

    It must not be used in the process that holds the lock.
    """

    def __init__(self, file: Path) -> None:
        self.descriptor = os.open(file, os.O_RDWR | os.O_CLOEXEC)

    def is_held(self) -> bool:
        """Whether the lock's process lives and has not released it."""
        try:
            fcntl.lockf(self.descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
        fcntl.lockf(self.descriptor, fcntl.LOCK_UN)
        return False

    def close(self) -> None:
        """Close the file."""
        os.close(self.descriptor)


class ParentProbe:
    """Asks whether the parent has died, or the process that holds a lock.

    `parent` is the parent's process id, by default that of now; `lock_file` may be missing.
    """

    def __init__(self, parent: int | None = None, lock_file: Path | None = None) -> None:
        self.parent = os.getppid() if parent is None else parent
        self.lock = LockProbe(lock_file) if lock_file is not None and lock_file.exists() else None

    def is_parent_dead(self) -> bool:
        """Whether one of the two has died."""
        return os.getppid() != self.parent or (self.lock is not None and not self.lock.is_held())


class ParentWatch:
    """A thread that calls a function once the parent has died.

    It ends with the `with` block, or with the process.
    """

    def __init__(self, probe: ParentProbe, on_death: Callable[[], object]) -> None:
        self.probe, self.on_death, self.closed = probe, on_death, threading.Event()
        self.thread = threading.Thread(target=self._watch, name="parent watch", daemon=True)
        self.thread.start()

    def __enter__(self) -> ParentWatch:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed.set()

    def _watch(self) -> None:
        while not self.closed.wait(POLL_SECONDS):
            if self.probe.is_parent_dead():
                self.on_death()
                return


def end_with_parent(parent: int) -> None:
    """End this process at once when its parent has died.

    For processes that have nothing to save. `parent` is the parent's process id, which this process gets from it: it may be dead already.
    """
    ParentWatch(ParentProbe(parent), lambda: os._exit(1))
