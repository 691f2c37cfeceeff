"""Knows what a training job's container is to azrecipe: which folder is the run directory, who hears a stop, what is left where.

This is process 1 of the container (`exec python sagemaker_entry.py`), on each machine. It starts the run's processes, hands SIGTERM to
those that train and to nobody else (a launcher that hears it would kill them before they have saved), repeats the metrics in the log, and
leaves the model and, of a failure, one readable line where SageMaker looks for them.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.errors import CANNOT, DONE, SIGTERM, WRONG, AzrecipeError, CannotRun
from azrecipe.pipeline import worker
from azrecipe.sagemaker import cloudwatch_metrics, cluster
from azrecipe.utils.atomic_files import read_json

ML = Path("/opt/ml")
CHECKPOINTS, TENSORBOARD = ML / "checkpoints", ML / "output" / "tensorboard"
MODEL = Path(os.environ.get("SM_MODEL_DIR", ML / "model"))
FAILURE = Path(os.environ.get("SM_OUTPUT_FAILURE", ML / "output" / "failure"))
RUNS = Path("/tmp/azrecipe/runs")  # what a run reads and writes; the run itself is CHECKPOINTS, which SageMaker keeps in S3
CACHE = Path("/tmp/azrecipe/cache")
FAILURE_LENGTH = 1024  # characters of FailureReason that SageMaker keeps


@dataclass(frozen=True)
class Task:
    """job.json: what this container is to run, as `bundle` left it."""

    recipe: str
    run: str
    runs: Mapping[str, str]
    accelerate_config: str | None
    hub_token_secret: str | None


def main(arguments: Sequence[str]) -> int:
    """Run this machine's part of the job and return the exit code of the container."""
    try:
        here, task = cluster.here(), _task()
        _lay_out(task)
        with tempfile.TemporaryDirectory() as folder:
            code = _run(here, task, list(arguments), Path(folder))
            reason = _reason(Path(folder))
    except AzrecipeError as error:
        return _failed(str(error), error.exit_code)
    except OSError as error:
        return _failed(f"{error.filename or ''}: {error.strerror or error}", CANNOT)
    if code == DONE:
        if here.rank == 0:
            _leave_model(task)
        return DONE
    if code == SIGTERM:
        print("azrecipe: stopped; the checkpoint is saved, and a job with the same run goes on from it", file=sys.stderr, flush=True)
        return code
    return _failed(
        reason or f"the processes on {here.host} ended with exit code {code}; the log of this machine or of another says why", code
    )


def _task() -> Task:
    file = Path(__file__).resolve().parents[2] / "job.json"
    said = read_json(file)
    if said is None:
        raise CannotRun(f"there is no {file}: the source folder is one that `azrecipe sagemaker submit` or `pack` makes")
    return Task(**said)


def _failed(message: str, code: int) -> int:
    line = " ".join(f"azrecipe: {message}".removeprefix("azrecipe: azrecipe: ").split())[:FAILURE_LENGTH]
    print(line, file=sys.stderr, flush=True)
    if not FAILURE.exists():  # what came first is the reason
        FAILURE.parent.mkdir(parents=True, exist_ok=True)
        FAILURE.write_text(line, encoding="utf-8")
    return code


def _lay_out(task: Task) -> None:
    """A runs directory whose run is what SageMaker keeps in S3, with the runs that come in through channels beside it."""
    CHECKPOINTS.mkdir(parents=True, exist_ok=True)
    _link(RUNS / task.run, CHECKPOINTS)
    for channel, run in task.runs.items():
        folder = ML / "input" / "data" / channel
        if not folder.is_dir():
            raise CannotRun(f"the channel {channel} is missing, which brings in the run {run}")
        _link(RUNS / run, folder)


def _link(place: Path, target: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


def _reason(folder: Path) -> str:
    """What the first of this machine's processes that failed has told."""
    told = sorted(folder.glob(f"*{worker.REASON}"), key=lambda file: int(file.stem))
    return told[0].read_text(encoding="utf-8") if told else ""


def _run(here: cluster.Cluster, task: Task, arguments: list[str], codes: Path) -> int:
    """Start this machine's processes and wait for them; `codes`: a folder where they leave exit codes and reasons."""
    own = arguments and arguments[0].endswith((".yaml", ".yml"))
    line = cluster.command(here, task.accelerate_config, [*(arguments if own else [task.recipe, *arguments]), "--runs-dir", str(RUNS)])
    print(
        f"azrecipe: {here.host} ({here.rank + 1} of {len(here.hosts)}), {here.processes} processes: {' '.join(line)}",
        file=sys.stderr,
        flush=True,
    )
    child = subprocess.Popen(line, env={**_environment(here, task), worker.EXIT_FILE: str(codes)}, cwd=Path(__file__).resolve().parents[2])
    heard: list[int] = []

    def forward(number: int, _frame: object) -> None:
        heard.append(number)
        reached = list(_workers(child.pid)) or [child.pid]
        print(f"azrecipe: {signal.Signals(number).name}: {len(reached)} processes save and stop", file=sys.stderr, flush=True)
        for process in reached:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    follower = _Follower(RUNS / task.run / "metrics.jsonl") if here.rank == 0 else None
    code = _waited(child)
    if follower is not None:
        follower.stop()
    return SIGTERM if heard and code not in (DONE, WRONG, CANNOT) else code


def _waited(child: subprocess.Popen[bytes]) -> int:
    """The child's exit code. Process 1 also takes in what others leave behind."""
    while True:
        try:
            process, status = os.wait()
        except ChildProcessError:
            return child.wait()
        if process == child.pid:
            code = os.waitstatus_to_exitcode(status)
            child.returncode = code
            return code if code >= 0 else 128 - code


def _environment(here: cluster.Cluster, task: Task) -> dict[str, str]:
    found = {
        **cluster.environment(here),
        "AZRECIPE_STORAGE": "local",  # and files reach S3 one by one, in any order
        "AZRECIPE_CACHE": str(CACHE),
        "AZRECIPE_TENSORBOARD": str(TENSORBOARD),
    }
    if task.hub_token_secret is not None and "HF_TOKEN" not in found:
        found["HF_TOKEN"] = _secret(task.hub_token_secret)
    return found


def _secret(name: str) -> str:
    """The token that Secrets Manager keeps: as plain text, or as the only value, or HF_TOKEN, of a JSON object. It is never printed."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    region = name.split(":")[3] if name.startswith("arn:") else os.environ.get("AWS_REGION")  # which boto3 does not read
    try:
        text = str(boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=name)["SecretString"]).strip()
    except (BotoCoreError, ClientError) as error:
        raise CannotRun(
            f"hub_token_secret: {name} cannot be read: {error}. It must be there, and the job's role must allow secretsmanager:GetSecretValue on it"
        ) from None
    if not text.startswith("{"):
        return text
    held = json.loads(text)
    return str(held.get("HF_TOKEN") or (next(iter(held.values())) if len(held) == 1 else ""))


def _workers(root: int) -> Iterator[int]:
    """The processes below `root` that train: those that a launcher gave a LOCAL_RANK, or the only one that there is."""
    children: dict[int, list[int]] = {}
    ranked: set[int] = set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            continue
        children.setdefault(parent, []).append(int(entry.name))
        if any(variable.startswith(b"LOCAL_RANK=") for variable in variables):
            ranked.add(int(entry.name))
    todo = [root]
    while todo:
        for process in children.get(todo.pop(), []):
            if process in ranked:
                yield process  # what it has started for itself hears nothing
            else:
                todo.append(process)


class _Follower(threading.Thread):
    """Repeats each new line of metrics.jsonl on stdout, where CloudWatch's expressions look for them."""

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self.file, self.ended = file, threading.Event()
        self.read = file.stat().st_size if file.exists() else 0
        self.start()

    def run(self) -> None:
        while not self.ended.wait(1.0):
            self._tell()
        self._tell()

    def _tell(self) -> None:
        if not self.file.exists():
            return
        size = self.file.stat().st_size
        self.read = min(self.read, size)  # a run that goes on drops the lines behind its checkpoint: the rest was told before
        with self.file.open("rb") as file:
            file.seek(self.read)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self.read += whole
        for line in data[:whole].decode("utf-8", "replace").splitlines():
            told = cloudwatch_metrics.said(line)
            if told is not None:
                print(told, flush=True)

    def stop(self) -> None:
        """Tell what is left, and end."""
        self.ended.set()
        self.join()


def _leave_model(task: Task) -> None:
    """final/ becomes the job's model; what a report needs is the run directory, which SageMaker keeps already."""
    final = RUNS / task.run / "final"
    if final.is_dir():
        shutil.copytree(final, MODEL, dirs_exist_ok=True)
