"""A process under a ProcessWatch that test_process_watch starts: it prints what it does, and what the watch says."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

from azrecipe.utils.parent_watch import ParentProbe
from azrecipe.utils.process_watch import ProcessWatch, list_stop_signals


def block_in_compiled_code() -> None:
    """Never return to Python: a lock that this thread has is taken again."""
    library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def main(kind: str, folder: Path, parent: str) -> None:
    probe = ParentProbe(int(parent)) if parent else None
    received: list[int] = []
    with ProcessWatch(probe, lambda code, message: print(f"{code} {message}", flush=True)) as watch:
        for number in list_stop_signals():
            signal.signal(number, lambda number, _: received.append(number))
        watch.open_stacks(folder, 0, 0.3 if kind == "slow" else 0.0)
        print("ready", flush=True)
        if kind == "saving":
            watch.acknowledge_stop()
        if kind == "fork" and not os.fork():
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.2)
            os._exit(0)
        while not received or kind == "saving":
            watch.begin_step()
            if kind in ("stuck", "slow"):
                block_in_compiled_code()
            time.sleep(0.01)
            watch.end_step()
            if kind == "fork" and time.monotonic() - watch.progress_time < 0.1 and os.waitpid(-1, os.WNOHANG)[0]:
                print(f"signal seen: {watch.first_signal}", flush=True)
                return
        print(f"stopped by {received[0]}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3])
