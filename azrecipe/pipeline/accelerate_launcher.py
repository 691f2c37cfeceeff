"""`accelerate launch` that sends signals on once and names a killed process.

Takes the arguments of accelerate launch. `azrecipe run` uses it; a user's `accelerate launch` works the same, with a traceback where a
process failed. torch's agent would raise an exception for a signal and kill the processes a while later, whatever they still save. So
this process blocks signals, and a thread sends each on.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from azrecipe.errors import EXIT_FAILED, PEER_ENDED
from azrecipe.pipeline.exit_folder import ExitFolder, describe_signal_death
from azrecipe.utils.console import print_progress
from azrecipe.utils.environment_variables import EXIT_CODES
from azrecipe.utils.process_watch import REPEAT_SECONDS, get_signal_exit_code, is_stop_signal, list_stop_signals

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

AGENT_KILL_SECONDS = 20  # the agent kills what has not ended 30 s after SIGTERM


def main() -> int:
    """Launch, wait, and return the first failing worker's exit code.

    A signal gives 128 + its number.
    """
    logging.disable(logging.ERROR)  # the elastic agent repeats the failure of a worker that has printed its reason
    _forward_signals()
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    arguments = launch_command_parser().parse_args()
    try:
        launch_command(arguments)
    except ChildFailedError as error:
        return _explain_exit(*_find_cause(error.failures))
    except subprocess.CalledProcessError as error:
        return _explain_exit(0, error.returncode)
    return 0


def _find_cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, int]:
    """Return rank and exit code of the process that failed first.

    One that only saw another go may have ended before the dying one: then that one counts. Later the agent itself kills processes.
    """
    first = min(failures, key=lambda rank: failures[rank].timestamp)
    reason = ExitFolder(Path(EXIT_CODES.read())).read_reason(first) if EXIT_CODES.is_set else ""
    if failures[first].exitcode == EXIT_FAILED and PEER_ENDED in reason:
        for rank, failure in failures.items():
            is_killed = failure.exitcode < 0 and not is_stop_signal(-failure.exitcode)
            if is_killed and failure.timestamp - failures[first].timestamp < AGENT_KILL_SECONDS:
                return rank, int(failure.exitcode)
    return first, int(failures[first].exitcode)


def _explain_exit(rank: int, code: int) -> int:
    """Return a worker's exit code as the launcher's; report a signal's kill."""
    if code > 0:
        return code
    if is_stop_signal(-code):
        return get_signal_exit_code(-code)
    if code == 0:
        return EXIT_FAILED
    if EXIT_CODES.is_set:
        message = ExitFolder(Path(EXIT_CODES.read())).write_death(rank, -code)
    else:
        message = describe_signal_death(f"rank {rank}", -code)
    print_progress(f"azrecipe: {message}")
    return 128 - code


def _forward_signals() -> None:
    """Block the signals that stop a run; start the thread for them.

    The workers inherit the blocked signals, and unblock them when they can handle one. The agent's handlers never run.
    """
    watched = list_stop_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, {*watched, signal.SIGHUP})  # under nohup the agent must not handle SIGHUP either
    threading.Thread(target=_wait_for_signals, args=(watched,), name="signals", daemon=True).start()


def _wait_for_signals(watched: list[signal.Signals]) -> None:
    import psutil

    last: dict[int, float] = {}
    while True:
        number = signal.sigwait(watched)
        if time.monotonic() - last.get(number, -REPEAT_SECONDS) < REPEAT_SECONDS:
            continue
        last[number] = time.monotonic()
        workers = psutil.Process().children()
        if not workers:  # one that starts just now ends by itself, when it sees that this process is gone
            os._exit(get_signal_exit_code(number))
        for process in workers:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


if __name__ == "__main__":
    sys.exit(main())
