"""Build launch commands, and run them as child processes.

Signals are passed on, and the exit code is that of the worker that failed.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from azrecipe.errors import EXIT_FAILED, EXIT_SUCCESS, CommandError, suggest_choices
from azrecipe.pipeline.worker import REASON_SUFFIX
from azrecipe.utils import shipped_files
from azrecipe.utils.environment_variables import EXIT_CODES


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
    command = [
        sys.executable,
        "-m",
        "azrecipe.pipeline.accelerate_launcher",
        "--config_file",
        str(resolve_accelerate_config(accelerate_config or "ddp")),
    ]
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
    return 128 + _stop_signals[0] if _stop_signals else EXIT_SUCCESS


@dataclass(frozen=True)
class ChildResult:
    """How a child process ended, and its error message, if it is known."""

    exit_code: int
    message: str = ""


def run_child(command: Sequence[str]) -> ChildResult:
    """Run a command, pass SIGTERM on, and wait for its end.

    Ctrl-C reaches the child by itself; this process waits until the child has saved and ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        grace = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
        child = subprocess.Popen(command, env=os.environ | {EXIT_CODES.name: folder, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace})

        def handle_signal(number: int, _frame: Any) -> None:
            _stop_signals.append(number)
            if number == signal.SIGTERM:
                child.send_signal(number)

        old_handlers = {number: signal.signal(number, handle_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
        exit_codes = {
            int(file.name): int(file.read_text(encoding="utf-8") or EXIT_FAILED)
            for file in Path(folder).iterdir()
            if file.suffix != REASON_SUFFIX
        }
        reasons = sorted(Path(folder).glob(f"*{REASON_SUFFIX}"), key=lambda file: int(file.stem))
        message = reasons[0].read_text(encoding="utf-8").removeprefix("azrecipe: ") if reasons else ""
    return ChildResult(_choose_exit_code(code, exit_codes), message)


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
    if launcher_code in (-signal.SIGTERM, -signal.SIGINT):
        return 128 - launcher_code  # it had nothing to save yet
    specific = [code for _, code in sorted(exit_codes.items()) if code not in (EXIT_SUCCESS, EXIT_FAILED)]
    if specific and (main == EXIT_FAILED or launcher_code != 0):
        return specific[0]
    return main if main is not None else launcher_code if 0 <= launcher_code < 256 else EXIT_FAILED
