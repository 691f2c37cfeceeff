"""Build launch commands, and run them as child processes.

Signals are passed on, and the exit code is that of the worker that failed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.errors import EXIT_FAILED, EXIT_SUCCESS, CommandError, suggest_choices
from azrecipe.pipeline.exit_folder import ExitFolder, describe_signal_death
from azrecipe.utils import shipped_files
from azrecipe.utils.console import print_progress
from azrecipe.utils.environment_variables import EXIT_CODES
from azrecipe.utils.parent_watch import ParentProbe, ParentWatch
from azrecipe.utils.process_watch import REPEAT_SECONDS, get_signal_exit_code, is_stop_signal, list_stop_signals
from azrecipe.utils.python_command import build_python_command, build_python_environment


def resolve_accelerate_config(name: str) -> Path:
    """Return the path of an accelerate config.

    `name` is a name in accelerate_configs/, or a path. Raises CommandError for an unknown one.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = shipped_files.resolve_shipped_path(name)
        if not path.is_file():
            raise CommandError(f"no such accelerate config: {name}")
        return path
    folder = shipped_files.locate_root() / "accelerate_configs"
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in names:
        raise CommandError(f"there is no accelerate config '{name}'{suggest_choices(name, names, 'Known')}; or give a path")
    return folder / f"{name}.yaml"


def build_launch_command(worker_arguments: Sequence[str], accelerate_config: str | None, num_processes: int | None) -> list[str] | None:
    """Build the accelerate launch command for a worker.

    Returns None where one process needs no launcher.
    """
    if accelerate_config is None and num_processes in (None, 1):
        return None
    if (accelerate_config in ("ddp", None) and num_processes == 1) or (accelerate_config == "cpu" and num_processes in (None, 1)):
        return None
    if accelerate_config == "cpu":
        raise CommandError(f"accelerate_configs/cpu.yaml is for one process. For {num_processes}: --accelerate-config ddp")
    config_file = resolve_accelerate_config(accelerate_config or "ddp")
    command = build_python_command("azrecipe.pipeline.accelerate_launcher", "--config_file", str(config_file))
    if num_processes is not None:
        command += ["--num_processes", str(num_processes)]
    return [*command, "--main_process_port", str(_find_free_port()), "-m", "azrecipe", *worker_arguments]


def _find_free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


_stop_signals: list[int] = []  # signals that came while a child ran


def get_stop_code() -> int:
    """Return the exit code for a signal during a child.

    It is 130, 143, or 0 for no signal. After a signal no further child may start.
    """
    return get_signal_exit_code(_stop_signals[0]) if _stop_signals else EXIT_SUCCESS


@dataclass(frozen=True)
class ChildResult:
    """How a child process ended.

    Attributes:
        exit_code: Its exit code; 128 + the signal that killed it or one of its processes.
        message: Its error message, if it is known.
        names_rank: Whether the message names a process of the run that a signal killed.
    """

    exit_code: int
    message: str = ""
    names_rank: bool = False


def run_child(command: Sequence[str], name: str) -> ChildResult:
    """Run a command, pass signals on, and wait for its end.

    Where this process dies, the child's processes end by themselves. Where the child dies and its processes live, they are waited for.

    Args:
        command: The command.
        name: What a message calls the child.
    """
    with tempfile.TemporaryDirectory() as path, _stop_with_parent():
        folder = ExitFolder(Path(path))
        lock = folder.hold_launcher_lock()
        grace = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
        environment = build_python_environment() | {EXIT_CODES.name: path, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace}
        child = subprocess.Popen(command, env=environment)
        last: dict[int, float] = {}

        def handle_signal(number: int, _frame: Any) -> None:
            _stop_signals.append(number)
            sent = signal.SIGTERM if number == signal.SIGHUP else number
            if time.monotonic() - last.get(sent, -REPEAT_SECONDS) >= REPEAT_SECONDS:
                last[sent] = time.monotonic()
                child.send_signal(sent)

        old_handlers = {number: signal.signal(number, handle_signal) for number in list_stop_signals()}
        try:
            code = child.wait()
            lock.close()
            folder.wait_for_processes()
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
        exit_codes = folder.read_codes()
        if (death := folder.read_death()) is not None:
            return ChildResult(death[0], folder.read_message(), names_rank=True)
        if code < 0 and not is_stop_signal(-code) and exit_codes.get(0) != EXIT_SUCCESS:
            message = describe_signal_death(name, -code)
            print_progress(f"azrecipe: {message}")
            return ChildResult(128 - code, message)
        code = _choose_exit_code(code, exit_codes)
        return ChildResult(get_stop_code() or code if code == EXIT_FAILED else code, folder.read_message())


@contextlib.contextmanager
def _stop_with_parent() -> Iterator[None]:
    """Send this process SIGTERM where another `azrecipe run` started it and has died."""
    lock_file = ExitFolder(Path(EXIT_CODES.read())).launcher_lock if EXIT_CODES.is_set else None
    if lock_file is None or not lock_file.exists():
        yield
        return
    with ParentWatch(ParentProbe(lock_file=lock_file), lambda: os.kill(os.getpid(), signal.SIGTERM)):
        yield


def _choose_exit_code(launcher_code: int, exit_codes: Mapping[int, int]) -> int:
    """Choose the exit code of a launch from those of its processes.

    It is the main process' code, unless another process has a more specific one.

    Args:
        launcher_code: The launcher's exit code; negative for a signal.
        exit_codes: The exit codes that processes wrote, by rank.
    """
    main = exit_codes.get(0)
    if main is not None and main != EXIT_FAILED:
        return main
    if is_stop_signal(-launcher_code):
        return get_signal_exit_code(-launcher_code)  # it had nothing to save yet
    specific = [code for _, code in sorted(exit_codes.items()) if code not in (EXIT_SUCCESS, EXIT_FAILED)]
    if specific and (main == EXIT_FAILED or launcher_code != 0):
        return specific[0]
    return main if main is not None else launcher_code if 0 <= launcher_code < 256 else EXIT_FAILED
