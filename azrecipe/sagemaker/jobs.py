"""Submitted training jobs: their state, log, end and run directory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from azrecipe.errors import CannotRun, CommandError, did_you_mean
from azrecipe.sagemaker.account import Account, check_packages_installed, open_account, translate_aws_errors
from azrecipe.sagemaker.s3 import Bucket
from azrecipe.utils.console import print_progress

LOG_GROUP = "/aws/sagemaker/TrainingJobs"
FINAL_STATES = ("Completed", "Failed", "Stopped")
POLL_SECONDS = (1.0, 15.0)  # between two requests for the state of a job: at first, and at most
RUNS_PREFIX = "/runs/"


@dataclass(frozen=True)
class TrainingJob:
    """A training job of SageMaker.

    Its state is read from AWS at each call.

    Attributes:
        name: The job's name.
        account: Its account and region.
        request: The request that created it; None where another process sent it.
    """

    name: str
    account: Account
    request: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def _sagemaker(self) -> Any:
        return self.account.session.client("sagemaker", region_name=self.account.region)

    def describe(self) -> dict[str, Any]:
        """Call DescribeTrainingJob. Raises CommandError for an unknown job."""
        from botocore.exceptions import ClientError

        with translate_aws_errors(f"sagemaker:DescribeTrainingJob {self.name}"):
            try:
                description: dict[str, Any] = self._sagemaker.describe_training_job(TrainingJobName=self.name)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("ValidationException", "ResourceNotFound"):
                    names = [job.name for job in list_jobs(self.account)]
                    hint = f". Jobs of azrecipe: {', '.join(names[:5])}" if names else ""
                    raise CommandError(
                        f"there is no job {self.name} in {self.account.region}{did_you_mean(self.name, names)}{hint}"
                    ) from None
                raise
        return description

    @property
    def run_path(self) -> str:
        """The path of its run, <project>/<name>. Raises CommandError."""
        uri = self.describe().get("CheckpointConfig", {}).get("S3Uri", "")
        if RUNS_PREFIX not in uri:
            raise CommandError(f"{self.name} is no job of azrecipe: it has no run directory")
        return str(uri).rpartition(RUNS_PREFIX)[2].strip("/")

    def open_bucket(self) -> Bucket:
        """Open the bucket of its run directory."""
        uri = urlparse(self.describe()["CheckpointConfig"]["S3Uri"])
        return Bucket(self.account, uri.netloc, uri.path.rpartition(RUNS_PREFIX)[0].strip("/"))

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Read the log lines of all machines.

        Each starts with the machine's name. With `follow`, continue until the job has ended.
        """
        client = self.account.session.client("logs", region_name=self.account.region)
        tokens: dict[str, str] = {}
        pause = POLL_SECONDS[0]
        while True:
            ended = self.describe()["TrainingJobStatus"] in FINAL_STATES
            yield from self._read_new_lines(client, tokens)
            if not follow or ended:
                return
            time.sleep(pause)
            pause = min(1.5 * pause, POLL_SECONDS[1])

    def _read_new_lines(self, client: Any, tokens: dict[str, str]) -> Iterator[str]:
        from botocore.exceptions import ClientError

        with translate_aws_errors(f"logs of {self.name}"):
            try:
                pages = client.get_paginator("describe_log_streams").paginate(logGroupName=LOG_GROUP, logStreamNamePrefix=f"{self.name}/")
                streams = [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
            except ClientError as error:
                if error.response["Error"]["Code"] == "ResourceNotFoundException":
                    return  # the job has not written anything yet
                raise
            lines: list[tuple[int, str]] = []  # time in milliseconds, text
            for stream in streams:
                host = stream.partition("/")[2].rpartition("-")[0]
                while True:
                    position = {"nextToken": tokens[stream]} if stream in tokens else {}
                    page = client.get_log_events(logGroupName=LOG_GROUP, logStreamName=stream, startFromHead=True, **position)
                    lines += [(event["timestamp"], f"[{host}] {event['message'].rstrip()}") for event in page["events"]]
                    last, tokens[stream] = tokens.get(stream), page["nextForwardToken"]
                    if not page["events"] or last == tokens[stream]:
                        break
        yield from (line for _, line in sorted(lines, key=lambda line: line[0]))

    def stop(self) -> str:
        """Stop the job, which saves a checkpoint first.

        Returns:
            Its state.
        """
        state: str = self.describe()["TrainingJobStatus"]
        if state in (*FINAL_STATES, "Stopping"):
            return state
        with translate_aws_errors(f"sagemaker:StopTrainingJob {self.name}"):
            self._sagemaker.stop_training_job(TrainingJobName=self.name)
        return "Stopping"

    def fetch(self, runs_dir: Path = Path("runs"), checkpoints: bool = False) -> Path:
        """Download the run directory, finished or not.

        Args:
            runs_dir: The local runs directory.
            checkpoints: Whether to download checkpoints too.

        Returns:
            The folder <runs_dir>/<project>/<name>.
        """
        run = self.run_path
        self.open_bucket().fetch_run(run, runs_dir / run, checkpoints)
        return runs_dir / run

    def wait(self, print_line: Callable[[str], None] = print_progress) -> dict[str, Any]:
        """Wait for the end, and print changes and metrics.

        Args:
            print_line: Prints a line.

        Returns:
            The last answer of DescribeTrainingJob.

        Raises:
            CannotRun: The job failed or was stopped.
        """
        last_state, tokens, pause = "", dict[str, str](), POLL_SECONDS[0]
        client = self.account.session.client("logs", region_name=self.account.region)
        while True:
            description = self.describe()
            state = f"{description['TrainingJobStatus']}: {description['SecondaryStatus']}"
            if state != last_state:
                print_line(f"{self.name}: {state}")
                last_state = state
            for line in self._read_new_lines(client, tokens):
                if "bits per byte" in line or "tokens/s" in line or "steps/s" in line or "azrecipe:" in line:
                    print_line(line)
            if description["TrainingJobStatus"] in FINAL_STATES:
                break
            time.sleep(pause)
            pause = min(1.5 * pause, POLL_SECONDS[1])
        if description["TrainingJobStatus"] != "Completed":
            raise CannotRun(
                f"{self.name}: {description['TrainingJobStatus']}: {description.get('FailureReason') or 'it was stopped; the same command continues from its checkpoint'}"
            )
        return description


def attach_job(name: str, region: str | None = None) -> TrainingJob:
    """Attach to a job by its name."""
    check_packages_installed()
    return TrainingJob(name, open_account(region))


def list_jobs(account: Account, contains: str = "azrecipe-", state: str | None = None) -> list[TrainingJob]:
    """List jobs of azrecipe, newest first.

    Args:
        account: The account and region.
        contains: What the names start with.
        state: List jobs of this state only.
    """
    client = account.session.client("sagemaker", region_name=account.region)
    state_filter = {"StatusEquals": state} if state else {}
    with translate_aws_errors("sagemaker:ListTrainingJobs"):
        response = client.list_training_jobs(
            NameContains=contains, SortBy="CreationTime", SortOrder="Descending", MaxResults=50, **state_filter
        )
    names = [summary["TrainingJobName"] for summary in response["TrainingJobSummaries"]]
    return [TrainingJob(name, account) for name in names if name.startswith(contains)]


def describe_jobs(name: str | None = None, region: str | None = None) -> list[dict[str, Any]]:
    """Describe a job, or the newest 20 jobs of azrecipe.

    Each has its name, state, run, machines, seconds trained and billed, and failure.
    """
    check_packages_installed()
    account = open_account(region)
    return [_describe_job(job) for job in ([TrainingJob(name, account)] if name else list_jobs(account)[:20])]


def _describe_job(job: TrainingJob) -> dict[str, Any]:
    description = job.describe()
    start, end = description.get("TrainingStartTime"), description.get("TrainingEndTime")
    seconds = description.get("TrainingTimeInSeconds")
    if seconds is None and start is not None:
        seconds = int(((end or datetime.now(UTC)) - start).total_seconds())
    machines = description.get("ResourceConfig", {})
    transitions = description.get("SecondaryStatusTransitions") or [{}]
    return {
        "name": job.name,
        "state": description["TrainingJobStatus"],
        "doing": description.get("SecondaryStatus"),
        "message": transitions[-1].get("StatusMessage") or "",
        "run": description.get("CheckpointConfig", {}).get("S3Uri", "").rpartition(RUNS_PREFIX)[2].strip("/") or None,
        "machines": f"{machines.get('InstanceCount')} × {machines.get('InstanceType')}",
        "spot": bool(description.get("EnableManagedSpotTraining")),
        "seconds": seconds,
        "billable_seconds": description.get("BillableTimeInSeconds"),
        "failure": description.get("FailureReason"),
        "metrics": {metric["MetricName"]: metric["Value"] for metric in description.get("FinalMetricDataList", [])},
    }


def read_logs(name: str, follow: bool = False, region: str | None = None) -> Iterator[str]:
    """Read the lines of a job's log."""
    return attach_job(name, region=region).logs(follow)


def stop_job(name: str, region: str | None = None) -> str:
    """Stop a job, which saves a checkpoint first."""
    return attach_job(name, region=region).stop()


def fetch_run(name: str, runs_dir: Path = Path("runs"), checkpoints: bool = False, region: str | None = None) -> Path:
    """Download a job's run directory.

    Args:
        name: The job's name.
        runs_dir: The local runs directory.
        checkpoints: Whether to download checkpoints too.
        region: The AWS region; None for that of the profile.

    Returns:
        The folder <runs_dir>/<project>/<name>.
    """
    return attach_job(name, region=region).fetch(runs_dir, checkpoints)
