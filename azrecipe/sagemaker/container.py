"""Process 1 of a training job's container, on each machine.

It starts the run's processes and sends SIGTERM to those that train, and to no other (a launcher that gets it kills them before they have
saved). It repeats the metrics in the log, and writes the model and the reason of a failure where SageMaker looks for them.
"""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from azrecipe.errors import EXIT_CANNOT_RUN, EXIT_SIGTERM, EXIT_SUCCESS, EXIT_WRONG_INPUT, AzrecipeError, CannotRun
from azrecipe.pipeline.exit_folder import ExitFolder
from azrecipe.sagemaker import cloudwatch_metrics, cluster
from azrecipe.utils import environment_variables
from azrecipe.utils.atomic_files import read_json
from azrecipe.utils.console import print_line, print_progress
from azrecipe.utils.python_command import build_python_environment

ML_DIR = Path("/opt/ml")
CHECKPOINT_DIR, TENSORBOARD_DIR = ML_DIR / "checkpoints", ML_DIR / "output" / "tensorboard"
MODEL_DIR = Path(os.environ.get("SM_MODEL_DIR", ML_DIR / "model"))
FAILURE_FILE = Path(os.environ.get("SM_OUTPUT_FAILURE", ML_DIR / "output" / "failure"))
RUNS_DIR = Path("/tmp/azrecipe/runs")  # the run directory in it is a link to CHECKPOINT_DIR, which SageMaker copies to S3
CACHE_DIR = Path("/tmp/azrecipe/cache")
SOURCE_DIR = Path(__file__).resolve().parents[2]  # what `bundle` wrote
MAX_FAILURE_LENGTH = 1024  # characters of FailureReason that SageMaker keeps


@dataclass(frozen=True)
class JobFile:
    """job.json: what this container runs. `bundle` writes it."""

    recipe: str
    run: str
    runs: Mapping[str, str]
    accelerate_config: str | None
    hub_token_secret: str | None
    allow_code: bool = False


def main(arguments: Sequence[str]) -> int:
    """Run this machine's part, and return the exit code."""
    try:
        machines, job = cluster.read_cluster(), _read_job_file()
        _check_torch(SOURCE_DIR / "constraints.txt")
        _link_run_dirs(job)
        with tempfile.TemporaryDirectory() as folder:
            code = _run_processes(machines, job, list(arguments), Path(folder))
            reason = ExitFolder(Path(folder)).read_message()
    except AzrecipeError as error:
        return _report_failure(str(error), error.exit_code)
    except OSError as error:
        return _report_failure(f"{error.filename or ''}: {error.strerror or error}", EXIT_CANNOT_RUN)
    if code == EXIT_SUCCESS:
        if machines.rank == 0:
            _copy_model(job)
        return EXIT_SUCCESS
    if code == EXIT_SIGTERM:
        print_progress("azrecipe: stopped; the checkpoint is saved, and a job with the same run continues from it")
        return code
    return _report_failure(
        reason or f"the processes on {machines.host} ended with exit code {code}; the log of this machine or of another says why", code
    )


def _check_torch(constraints: Path) -> None:
    """Check that torch is still the image's, whose CUDA fits the machine.

    Raises CannotRun where a requirement replaced it, or the image has another one than the settings say.
    """
    if not constraints.is_file():
        return
    pins = [line.split("==")[1] for line in constraints.read_text(encoding="utf-8").splitlines() if line.startswith("torch==")]
    installed = metadata.version("torch").partition("+")[0]
    if any(not fnmatch.fnmatchcase(installed, pin) for pin in pins):
        raise CannotRun(
            f"this container has torch {installed}, and the job was made for {', '.join(pins)} (pytorch_version in the settings): either the image "
            "is another one, or a requirement replaced its torch. Nothing was trained"
        )


def _read_job_file() -> JobFile:
    file = SOURCE_DIR / "job.json"
    content = read_json(file)
    if content is None:
        raise CannotRun(f"there is no {file}: `azrecipe sagemaker submit` or `pack` creates the source folder")
    return JobFile(**content)


def _report_failure(message: str, code: int) -> int:
    line = " ".join(f"azrecipe: {message}".removeprefix("azrecipe: azrecipe: ").split())[:MAX_FAILURE_LENGTH]
    print_progress(line)
    if not FAILURE_FILE.exists():  # the first failure is the reason
        FAILURE_FILE.parent.mkdir(parents=True, exist_ok=True)
        FAILURE_FILE.write_text(line, encoding="utf-8")
    return code


def _link_run_dirs(job: JobFile) -> None:
    """Link the run and its input runs into RUNS_DIR."""
    CHECKPOINT_DIR.mkdir(parents=True, exist_ok=True)
    _link(RUNS_DIR / job.run, CHECKPOINT_DIR)
    for channel, run in job.runs.items():
        folder = ML_DIR / "input" / "data" / channel
        if not folder.is_dir():
            raise CannotRun(f"the channel {channel} is missing, which has the run {run}")
        _link(RUNS_DIR / run, folder)


def _link(link: Path, target: Path) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(target)


def _run_processes(machines: cluster.TrainingCluster, job: JobFile, arguments: list[str], exit_folder: Path) -> int:
    """Start this machine's processes and wait for them.

    Args:
        machines: The machines of the job.
        job: What to run.
        arguments: The arguments of the entry point: none, or a recipe and options.
        exit_folder: Where the processes write their exit codes and reasons.

    Returns:
        The exit code.
    """
    has_recipe = arguments and arguments[0].endswith((".yaml", ".yml"))
    line = cluster.build_launch_command(
        machines, job.accelerate_config, [*(arguments if has_recipe else [job.recipe, *arguments]), "--runs-dir", str(RUNS_DIR)]
    )
    print_progress(
        f"azrecipe: {machines.host} ({machines.rank + 1} of {len(machines.hosts)}), {machines.processes_per_host} processes: {' '.join(line)}"
    )
    child = subprocess.Popen(
        line,
        env={**_build_environment(machines, job), environment_variables.EXIT_CODES.name: str(exit_folder)},
        cwd=Path(__file__).resolve().parents[2],
    )
    signals: list[int] = []

    def forward(number: int, _frame: object) -> None:
        signals.append(number)
        processes = list(_find_workers(child.pid)) or [child.pid]
        print_progress(f"azrecipe: {signal.Signals(number).name}: {len(processes)} processes save and stop")
        for process in processes:
            try:
                os.kill(process, number)
            except ProcessLookupError:
                continue

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    printer = _MetricsPrinter(RUNS_DIR / job.run / "metrics.jsonl") if machines.rank == 0 else None
    code = _wait(child)
    if printer is not None:
        printer.stop()
    return EXIT_SIGTERM if signals and code not in (EXIT_SUCCESS, EXIT_WRONG_INPUT, EXIT_CANNOT_RUN) else code


def _wait(child: subprocess.Popen[bytes]) -> int:
    """Wait for the child's exit code. Process 1 also reaps orphans."""
    while True:
        try:
            process, status = os.wait()
        except ChildProcessError:
            return child.wait()
        if process == child.pid:
            code = os.waitstatus_to_exitcode(status)
            child.returncode = code
            return code if code >= 0 else 128 - code


def _build_environment(machines: cluster.TrainingCluster, job: JobFile) -> dict[str, str]:
    variables = {
        **cluster.build_environment(machines),
        **build_python_environment(),
        environment_variables.STORAGE.name: "local",  # SageMaker copies files to S3 one by one, in any order
        environment_variables.CACHE.name: str(CACHE_DIR),
        environment_variables.TENSORBOARD.name: str(TENSORBOARD_DIR),
        environment_variables.ALLOW_SECRETS.name: "1",  # the recipe was scanned where it was submitted, with the comments that it has there
    }
    if job.allow_code:
        variables[environment_variables.ALLOW_CODE.name] = "1"
    if job.hub_token_secret is not None and "HF_TOKEN" not in variables:
        variables["HF_TOKEN"] = _read_secret(job.hub_token_secret)
    return variables


def _read_secret(name: str) -> str:
    """Read the token from Secrets Manager. It is never printed.

    The secret is plain text, or a JSON object with the key HF_TOKEN or with one key.
    """
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    region = name.split(":")[3] if name.startswith("arn:") else os.environ.get("AWS_REGION")  # boto3 does not read this variable
    try:
        text = str(boto3.client("secretsmanager", region_name=region).get_secret_value(SecretId=name)["SecretString"]).strip()
    except (BotoCoreError, ClientError) as error:
        raise CannotRun(
            f"hub_token_secret: {name} cannot be read: {error}. It must exist, and the job's role must allow secretsmanager:GetSecretValue on it"
        ) from None
    if not text.startswith("{"):
        return text
    values = json.loads(text)
    return str(values.get("HF_TOKEN") or (next(iter(values.values())) if len(values) == 1 else ""))


def _find_workers(root: int) -> Iterator[int]:
    """Find the training processes below `root`: those with a LOCAL_RANK."""
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
                yield process  # its own children get no signal
            else:
                todo.append(process)


class _MetricsPrinter(threading.Thread):
    """Prints each new line of metrics.jsonl to stdout, for CloudWatch."""

    def __init__(self, file: Path) -> None:
        super().__init__(daemon=True)
        self.file, self.ended = file, threading.Event()
        self.position = file.stat().st_size if file.exists() else 0
        self.start()

    def run(self) -> None:
        while not self.ended.wait(1.0):
            self._print_new_lines()
        self._print_new_lines()

    def _print_new_lines(self) -> None:
        if not self.file.exists():
            return
        size = self.file.stat().st_size
        # A resumed run drops the lines after its checkpoint; those before it were printed already.
        self.position = min(self.position, size)
        with self.file.open("rb") as file:
            file.seek(self.position)
            data = file.read()
        complete = data.rfind(b"\n") + 1
        self.position += complete
        for line in data[:complete].decode("utf-8", "replace").splitlines():
            text = cloudwatch_metrics.format_metrics_line(line)
            if text is not None:
                print_line(text)

    def stop(self) -> None:
        """Print the remaining lines, and end the thread."""
        self.ended.set()
        self.join()


def _copy_model(job: JobFile) -> None:
    """Copy final/ to the folder of the job's model artifact."""
    final = RUNS_DIR / job.run / "final"
    if final.is_dir():
        shutil.copytree(final, MODEL_DIR, dirs_exist_ok=True)
