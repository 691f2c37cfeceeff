"""The command lines of launchers, run as children: signals passed on, and the worker's own exit code brought back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from azrecipe.errors import DONE, FAILED, CommandError, hint
from azrecipe.pipeline.worker import EXIT_FILE, REASON
from azrecipe.utils import shipped_files


def config_file(name: str) -> Path:
    """An accelerate config by its name in accelerate_configs/, or by path. Raises CommandError for an unknown one."""
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = shipped_files.find(name)
        if not path.is_file():
            raise CommandError(f"no such accelerate config: {name}")
        return path
    folder = shipped_files.root() / "accelerate_configs"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if name not in known:
        raise CommandError(f"there is no accelerate config '{name}'{hint(name, known, 'Known')}; or give a path")
    return folder / f"{name}.yaml"


def launched(worker_arguments: Sequence[str], accelerate_config: str | None, num_processes: int | None) -> list[str] | None:
    """The accelerate launch command for a worker, or None where one process needs no launcher."""
    if accelerate_config is None and num_processes in (None, 1):
        return None
    if (accelerate_config in ("ddp", None) and num_processes == 1) or (accelerate_config == "cpu" and num_processes in (None, 1)):
        return None
    if accelerate_config == "cpu":
        raise CommandError(f"accelerate_configs/cpu.yaml is one process: for {num_processes} say --accelerate-config ddp")
    command = [sys.executable, "-m", "azrecipe.pipeline.accelerate_launcher", "--config_file", str(config_file(accelerate_config or "ddp"))]
    if num_processes is not None:
        command += ["--num_processes", str(num_processes)]
    return [*command, "--main_process_port", str(_free_port()), "-m", "azrecipe", *worker_arguments]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


_stopped: list[int] = []


def stopped() -> int:
    """The exit code for a signal that came while a child ran (130 or 143), 0 for none: nothing more is to be started."""
    return 128 + _stopped[0] if _stopped else DONE


def run_child(command: Sequence[str]) -> int:
    """Run a command, pass SIGTERM on to it, and return the exit code that its processes left.

    Ctrl-C reaches the child by itself; this process waits for it to save and end.
    """
    with tempfile.TemporaryDirectory() as folder:
        grace = os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "120")
        child = subprocess.Popen(command, env=os.environ | {EXIT_FILE: folder, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": grace})

        def note(number: int, _frame: Any) -> None:
            _stopped.append(number)
            if number == signal.SIGTERM:
                child.send_signal(number)

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            code = child.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        left = {int(file.name): int(file.read_text(encoding="utf-8") or FAILED) for file in Path(folder).iterdir() if file.suffix != REASON}
    return _verdict(code, left)


def _verdict(code: int, left: Mapping[int, int]) -> int:
    """The exit code of a launch: the main process' own, unless another one knows better why it failed."""
    main = left.get(0)
    if main is not None and main != FAILED:
        return main
    if code in (-signal.SIGTERM, -signal.SIGINT):
        return 128 - code  # it had nothing to save yet
    told = [found for _, found in sorted(left.items()) if found not in (DONE, FAILED)]
    if told and (main == FAILED or code != 0):
        return told[0]
    return main if main is not None else code if 0 <= code < 256 else FAILED
