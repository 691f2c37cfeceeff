"""Runs `azrecipe …` in forks of a process that has imported everything: real processes to kill, without seconds of imports for each.

The server (`python -m tests.forkserver`) reads a request a line (JSON: argv, cwd, env, out) from stdin and answers with lines of JSON:
{"started": pid} at once, {"ended": pid, "code": exit code, negative for a signal} later. A fork leads a session of its own, as a command
started with start_new_session=True does, and starts no thread before it is the command. The processes that it starts in turn (a pipeline's
steps, the launcher, the launcher's workers) are forks of it likewise. Tests of the launchers themselves start what a user starts.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import logging
import os
import random
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np


def preload() -> None:
    """Import what a run imports, and start no thread: forks of a process with threads can hang."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # as parts.cpu sets it; DeepSpeed looks when it is imported
    import torch

    torch.set_num_threads(1)
    import accelerate.commands.launch
    import matplotlib.backends.backend_svg
    import matplotlib.figure
    import torch.distributed.checkpoint
    import torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler
    import torch.distributed.fsdp
    import torch.distributed.run
    import torch.profiler._cupti_monitor
    import torch.utils.serialization.config
    import transformers.models.llama.modeling_llama
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from trl import DPOTrainer, SFTTrainer  # noqa: F401

    import azrecipe.launch.launcher
    import azrecipe.launch.worker
    import azrecipe.pipeline
    import azrecipe.stages.evaluate
    import azrecipe.stages.pretrain
    import azrecipe.stages.sft
    import azrecipe.stages.tokenizer
    from azrecipe.recipe import resources
    from azrecipe.recipe.steps import open_recipe

    if importlib.util.find_spec("deepspeed"):
        import deepspeed  # noqa: F401  (Accelerate does, wherever it is installed)
    get_checkpoint_conversion_mapping("llama")  # it makes the table of all models at the first question
    for recipe in ("pipeline", "evaluate"):  # the schemas are read
        open_recipe(resources.find(f"recipes/quickstart/{recipe}.yaml"), [])
    gc.collect()
    gc.freeze()  # a run collects several times, and would walk and copy all of this each time


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
        out = os.open(request["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for here, there in ((nothing, 0), (out, 1), (out, 2)):
            os.dup2(here, there)
        _start_by_forks()
        code = _module("azrecipe", request["argv"], request["env"])
    finally:
        os._exit(code)


def _module(name: str, argv: list[str], env: Mapping[str, str]) -> int:
    """What `python -m name argv` does, in this process; returns its exit code."""
    from azrecipe import cli
    from azrecipe.launch import command, launcher

    try:
        os.environ.clear()
        os.environ.update(env)
        sys.argv = [name, *argv]
        logging.disable(logging.NOTSET)  # the launcher's own choice
        random.seed()  # a process of its own would not begin where the others do
        np.random.seed()
        command._stopped.clear()
        return int(launcher.main() if name == "azrecipe.launch.launcher" else cli.main(argv))
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Fork:
    """What this process starts as `python -m azrecipe…`, as a fork: as much of subprocess.Popen as is asked of it."""

    def __init__(self, args: Sequence[str], env: Mapping[str, str] | None, start_new_session: bool) -> None:
        self.args = args
        self.returncode: int | None = None
        at = list(args).index("-m")
        self.pid = os.fork()
        if self.pid:
            return
        code = 70
        try:
            if start_new_session:
                os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = _module(args[at + 1], list(args[at + 2 :]), dict(os.environ if env is None else env))
        finally:
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                done, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # a signal's handler has asked in the meantime
                return self.returncode
            if done:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if until is not None and time.monotonic() > until:
                raise subprocess.TimeoutExpired(list(self.args), timeout or 0)
            time.sleep(0.005)
        assert self.returncode is not None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _start_by_forks() -> None:
    """From now on this process starts azrecipe's modules as forks, and everything else as ever."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    real = subprocess.Popen

    class Popen(real):  # type: ignore[type-arg,misc]
        def __new__(cls, args: Any, *_: Any, env: Any = None, start_new_session: bool = False, **more: Any) -> Any:
            ours = isinstance(args, list | tuple) and args[0] == sys.executable and "-m" in args[1:3]
            if ours and args[list(args).index("-m") + 1].startswith("azrecipe") and not any(more.values()):
                return Fork(args, env, start_new_session)
            return super().__new__(cls)

    subprocess.Popen = Popen  # type: ignore[misc]
    subprocess_handler.Popen = Popen


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
