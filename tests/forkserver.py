"""Runs `azrecipe …` in forks of a process that has imported everything: real processes to kill, without seconds of imports for each.

The server (`python -m tests.forkserver`) reads a request a line (JSON: argv, cwd, env, out) from stdin and answers with lines of JSON:
{"started": pid} at once, {"ended": pid, "code": exit code, negative for a signal} later. A fork leads a session of its own, as a command
started with start_new_session=True does, and starts no thread before it is the command.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn


def preload() -> None:
    """Import what a run imports, and start no thread: forks of a process with threads can hang."""
    import torch

    torch.set_num_threads(1)
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers  # noqa: F401
    import trl  # noqa: F401

    import azrecipe.launch.worker
    import azrecipe.stages.evaluate
    import azrecipe.stages.pretrain
    import azrecipe.stages.sft
    import azrecipe.stages.tokenizer  # noqa: F401


def _serve() -> None:
    running: set[int] = set()
    pending = b""
    while True:
        if select.select([0], [], [], 0.005)[0]:
            read = os.read(0, 65536)
            if not read:
                return
            *requests, pending = (pending + read).split(b"\n")
            for request in requests:
                running.add(child := _started(json.loads(request)))
                _answer(started=child)
        for child in list(running):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                running.discard(child)
                _answer(ended=child, code=os.waitstatus_to_exitcode(status))


def _answer(**what: int) -> None:
    os.write(1, json.dumps(what).encode() + b"\n")


def _started(request: dict[str, Any]) -> int:
    child = os.fork()
    if child == 0:
        _run(request)
    return child


def _run(request: dict[str, Any]) -> NoReturn:
    code = 70
    try:
        os.setsid()
        os.chdir(request["cwd"])
        os.environ.clear()
        os.environ.update(request["env"])
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for here, there in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(here, there)
        from azrecipe import cli

        code = cli.main(request["argv"])
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Server:
    """The test's side: one server for a test process."""

    def __init__(self, env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.forkserver"]
        root = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=root)
        self.ended: dict[int, int] = {}

    def start(self, argv: list[str], cwd: Path, env: dict[str, str], out: Path) -> int:
        """Begin a command; returns its process id."""
        assert self.process.stdin is not None
        request = {"argv": argv, "cwd": str(cwd), "env": env, "out": str(out)}
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        while "started" not in (answer := self._read()):
            self.ended[answer["ended"]] = answer["code"]
        return answer["started"]

    def poll(self, pid: int) -> int | None:
        """The exit code of a command that has ended, else None."""
        assert self.process.stdout is not None
        while pid not in self.ended and select.select([self.process.stdout], [], [], 0)[0]:
            self._note()
        return self.ended.get(pid)

    def wait(self, pid: int, timeout: float) -> int:
        """The exit code of a command, waited for. Raises TimeoutError."""
        assert self.process.stdout is not None
        while pid not in self.ended:
            if not select.select([self.process.stdout], [], [], timeout)[0]:
                raise TimeoutError(f"process {pid} has not ended in {timeout:.0f} s")
            self._note()
        return self.ended[pid]

    def _note(self) -> None:
        answer = self._read()
        self.ended[answer["ended"]] = answer["code"]

    def _read(self) -> dict[str, int]:
        assert self.process.stdout is not None
        line = b""
        while not line.endswith(b"\n"):  # unbuffered, so that select and this see the same
            one = os.read(self.process.stdout.fileno(), 1)
            if not one:
                raise RuntimeError("the fork server has ended")
            line += one
        found: dict[str, int] = json.loads(line)
        return found


if __name__ == "__main__":
    preload()
    _serve()
