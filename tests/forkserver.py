"""Runs `python …` in forks of a process that has imported everything: real processes to kill, without seconds of imports for each.

The server (`python -m tests.forkserver`) reads a request a line (JSON: words, what follows `python` on the command line; cwd, env, and the
files in, out, err) from stdin and answers with lines of JSON: {"started": pid} at once, {"ended": pid, "code": exit code, negative for a
signal} later. A fork leads a session of its own, as a command started with start_new_session=True does, and starts no thread before it is
the command. What it starts in turn as `python …` (a pipeline's steps, the launcher, the launcher's workers) are forks of it likewise. What
a library reads of the environment when it is imported (HF_ENDPOINT, TRITON_INTERPRET, …) is the server's: tests of that start an interpreter.
"""

from __future__ import annotations

import gc
import importlib.util
import inspect
import json
import logging
import os
import random
import runpy
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

ENDS = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")  # of a child's pipes, in subprocess' words
THEIRS, OURS = ("p2cread", "c2pwrite", "errwrite"), ("p2cwrite", "c2pread", "errread")


LOADED = (
    "accelerate.commands.launch", "deepspeed", "matplotlib.backends.backend_svg", "matplotlib.figure", "torch.distributed.checkpoint",
    "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler", "torch.distributed.fsdp", "torch.distributed.run",
    "torch.profiler._cupti_monitor", "torch.utils.serialization.config", "transformers.models.llama.modeling_llama", "trl.trainer.dpo_trainer",
    "trl.trainer.sft_trainer", "azrecipe.pipeline.accelerate_launcher", "azrecipe.pipeline.worker", "azrecipe.pipeline.runner", "azrecipe.stages.evaluate",
    "azrecipe.stages.pretrain", "azrecipe.stages.sft", "azrecipe.stages.tokenizer",
)  # fmt: skip

OPTIONAL = ("deepspeed", "torch.profiler._cupti_monitor")  # an extra; newer than the oldest torch that runs


def preload() -> None:
    """Import what a run imports, and start no thread: forks of a process with threads can hang."""
    os.environ["DS_ACCELERATOR"] = (
        "cpu"  # as distributed.cpu_backend sets it; DeepSpeed looks when it is imported, and Accelerate imports it
    )
    import torch

    torch.set_num_threads(1)
    for name in LOADED:
        if name not in OPTIONAL or importlib.util.find_spec(name):
            importlib.import_module(name)
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    from azrecipe.recipe.pipeline_steps import open_recipe
    from azrecipe.utils import shipped_files

    get_checkpoint_conversion_mapping("llama")  # the first question makes the table of all models
    for recipe in ("pipeline", "evaluate"):  # the schemas are read
        open_recipe(shipped_files.resolve_shipped_path(f"recipes/quickstart/{recipe}.yaml"), [])
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
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
        os.chdir(request["cwd"])
        given = os.open(request["in"], os.O_RDONLY)
        out, err = (os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for name in ("out", "err"))
        for here, there in ((given, 0), (out, 1), (err, 2)):
            os.dup2(here, there)
        _start_by_forks()
        code = _python(request["words"], request["env"])
    finally:
        os._exit(code)


def _python(words: Sequence[str], env: Mapping[str, str]) -> int:
    """What `python words…` does, in this process; returns its exit code."""
    from azrecipe import cli
    from azrecipe.pipeline import accelerate_launcher, launch_command

    try:
        os.environ.clear()
        os.environ.update(env)
        logging.disable(logging.NOTSET)  # the launcher's own choice
        random.seed()  # a process of its own would not begin where the others do
        np.random.seed()
        launch_command._stop_signals.clear()
        while words[0] in ("-u", "-P", "-W"):
            words = words[2 if words[0] == "-W" else 1 :]
        sys.argv = [*words[1:]] if words[0] in ("-m", "-c") else [*words]
        if words[:2] == ["-m", "azrecipe"]:
            return int(cli.main([*words[2:]]))
        if words[:2] == ["-m", "azrecipe.pipeline.accelerate_launcher"]:
            return int(accelerate_launcher.main())
        if words[0] == "-m":
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        elif words[0] == "-c":
            exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.path.insert(0, str(Path(words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _start_by_forks() -> None:
    """From now on this process starts `python …` as forks, and everything else as ever."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    real = subprocess.Popen
    names = list(inspect.signature(real._execute_child).parameters)[1:]  # type: ignore[attr-defined]

    class Popen(real):  # type: ignore[type-arg,misc]
        def _execute_child(self, *given: Any) -> None:
            asked = dict(zip(names, given, strict=True))
            args = asked["args"]
            if asked["shell"] or isinstance(args, str | bytes) or args[0] != sys.executable or asked["pass_fds"]:
                super()._execute_child(*given)
                return
            sys.stdout.flush()
            sys.stderr.flush()
            self.pid = os.fork()
            if self.pid:
                self._child_created = True
                self._close_pipe_fds(*(asked[name] for name in ENDS))
                return
            code = 70
            try:
                if asked["start_new_session"]:
                    os.setsid()
                for name in (name for name in OURS if asked[name] != -1):
                    os.close(asked[name])
                for there, name in enumerate(THEIRS):
                    if asked[name] != -1:
                        os.dup2(asked[name], there)
                os.chdir(asked["cwd"] or ".")
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                code = _python(args[1:], dict(os.environ if asked["env"] is None else asked["env"]))
            finally:
                os._exit(code)

    subprocess.Popen = Popen  # type: ignore[misc]
    subprocess_handler.Popen = Popen


class Server:
    """The test's side: one server for a test process."""

    def __init__(self, env: dict[str, str]) -> None:
        command = [sys.executable, "-m", "tests.forkserver"]
        root = Path(__file__).resolve().parents[1]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=root)
        self.ended: dict[int, int] = {}

    def start(self, command: Sequence[str], cwd: Path, env: Mapping[str, str], **files: Path) -> int:
        """Begin `python …`; returns its process id. `files`: its "in", "out" and "err", which stand at os.devnull else."""
        assert list(command[:1]) == [sys.executable]
        assert self.process.stdin is not None
        request = {"words": [*command[1:]], "cwd": str(cwd), "env": dict(env)}
        request |= {name: str(files.get(name, os.devnull)) for name in ("in", "out", "err")}
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
