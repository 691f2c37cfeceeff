"""Kills a run with SIGKILL again and again, lets it go on each time, and compares what comes out with a run left alone.

    python -m tests.fault.kill_and_resume [--kills 20] [--accelerate-config fsdp --num-processes 2] [--seed 0]

The recipe is the small project's two-phase one, from a base model that is trained first. Everything heavy is imported once here and each
attempt is a fork (as many as there are processes), so that a kill costs a second and not ten; what is killed is a run as `azrecipe run`
or `accelerate launch` starts it. Moments: at random over the whole run, while a checkpoint is written, while the text is being
tokenised. Prints a line a kill, and at the end both hashes; exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.forkserver import preload
from tests.small import ROOT, fill

RECIPE = "cpt.yaml"
RUN = Path("small") / "cpt"


def environments(config: str | None, processes: int) -> list[dict[str, str]]:
    """What each process of a launch finds in its environment, from accelerate's own launcher."""
    if config is None:
        return [{}]
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    file = ROOT / "accelerate_configs" / f"{config}.yaml"
    given = ["--config_file", str(file), "--num_processes", str(processes), "--main_process_port", port, "script.py"]
    arguments = _validate_launch_command(launch_command_parser().parse_args(given))[0]
    common = {key: str(value) for key, value in prepare_multi_gpu_env(arguments).items()}
    return [
        common | {"RANK": str(n), "LOCAL_RANK": str(n), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for n in range(processes)
    ]  # fmt: skip


def started(recipe: str, runs: Path, worlds: Sequence[Mapping[str, str]]) -> list[int]:
    """Fork a process for each environment; returns their ids."""
    children = []
    runs.mkdir(parents=True, exist_ok=True)
    for world in worlds:
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 70
        try:
            os.environ.clear()
            os.environ.update({**CLEAN, **world})
            log = os.open(runs.parent / f"log{world.get('RANK', '0')}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            from azrecipe.pipeline import worker

            code = worker.run_worker(recipe, [], runs).exit_code
        finally:
            os._exit(code)
    return children


def ended(children: Sequence[int], kill_when: Callable[[], bool] | None = None) -> bool:
    """Wait for the processes; kill them all at the moment asked for. Returns whether they were killed."""
    left = list(children)
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                if os.waitstatus_to_exitcode(status) != 0:
                    for other in left:
                        os.kill(other, signal.SIGKILL)
                    logs = "\n".join(log.read_text()[-3000:] for log in sorted(Path().glob("*/log*.txt")))
                    raise SystemExit(f"{logs}\na process ended with {os.waitstatus_to_exitcode(status)}")
        if left and kill_when is not None and kill_when():
            for child in left:
                os.kill(child, signal.SIGKILL)
            for child in left:
                os.waitpid(child, 0)
            return True
        time.sleep(0.002)
    return False


def digest(runs: Path) -> str:
    """A hash of the final weights."""
    with (runs / RUN / "final" / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def moment(runs: Path, choose: random.Random, whole: float) -> tuple[str, Callable[[], bool]]:
    """When to kill, and in words."""
    kind = choose.choice(["random", "random", "random", "checkpoint", "checkpoint", "checkpoint", "cache"])
    until = time.monotonic() + choose.uniform(0.05, 0.9) * whole
    if kind == "checkpoint":
        wait = choose.randrange(1, 4)
        seen: set[Path] = set()

        def writing() -> bool:
            with contextlib.suppress(FileNotFoundError):  # a finished phase's folder may vanish meanwhile
                for folder in (runs / RUN / "checkpoints").glob("*/checkpoint-*"):
                    if not (folder / "COMPLETE.json").exists():
                        seen.add(folder)
            return len(seen) >= wait or time.monotonic() > until + whole

        return f"while checkpoint number {wait} was being written", writing
    if kind == "cache" and not (runs / RUN / "checkpoints").exists():
        return "while text was being tokenised", lambda: any(runs.glob(".cache/.*")) or time.monotonic() > until
    return "at a random moment", lambda: time.monotonic() > until


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--accelerate-config", metavar="NAME")
    parser.add_argument("--num-processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(given)
    preload()
    choose = random.Random(asked.seed)

    def again() -> list[dict[str, str]]:
        return environments(asked.accelerate_config, asked.num_processes)  # a port of its own for each attempt

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fill(folder)
        os.chdir(folder)
        for recipe in ("base.yaml", "tokenizer.yaml"):
            ended(started(recipe, folder / "first" / "runs", [{}]))
        alone, killed = folder / "alone" / "runs", folder / "killed" / "runs"
        fresh(folder / "first" / "runs", alone)
        begun = time.monotonic()
        ended(started(RECIPE, alone, again()))
        whole = time.monotonic() - begun
        expected, kills, runs = digest(alone), 0, 0
        print(f"left alone: {whole:.1f} s, {expected}", flush=True)
        while kills < asked.kills or runs == 0:
            fresh(folder / "first" / "runs", killed)
            while True:
                words, when = moment(killed, choose, whole)
                if not ended(started(RECIPE, killed, again()), when if kills < asked.kills else None):
                    break
                kills += 1
                steps = len((killed / RUN / "metrics.jsonl").read_bytes().splitlines()) if (killed / RUN / "metrics.jsonl").exists() else 0
                print(f"kill {kills}: {words}, {steps} lines of metrics", flush=True)
            runs += 1
            found = digest(killed)
            print(f"run {runs} complete after {kills} kills in all: {found}", flush=True)
            if found != expected:
                return 1
    print(f"{kills} kills, {runs} runs, every hash equal")
    return 0


def fresh(source: Path, runs: Path) -> None:
    """A runs directory with the base model and the tokenizer, and no cache."""
    shutil.rmtree(runs, ignore_errors=True)
    for part in ("base", "tokenizer"):
        shutil.copytree(source / "small" / part, runs / "small" / part)


CLEAN = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")}

if __name__ == "__main__":
    sys.exit(main())
