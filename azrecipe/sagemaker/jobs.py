"""Knows a job that has been asked for: how far it is, what its log says, how it is stopped, and where its run directory comes back."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from azrecipe.errors import CannotRun, CommandError, did_you_mean
from azrecipe.sagemaker.account import Account, account, explained, needed
from azrecipe.sagemaker.s3 import Bucket

LOGS = "/aws/sagemaker/TrainingJobs"
ENDED = ("Completed", "Failed", "Stopped")
LOOKS = (1.0, 15.0)  # seconds between two looks at a job that is waited for: at first, and at last
RUNS = "/runs/"


@dataclass(frozen=True)
class Job:
    """A training job by its name. What it is now is asked each time. request: what was sent, where this process has sent it."""

    name: str
    where: Account
    request: Mapping[str, Any] | None = field(default=None, compare=False, repr=False)

    @property
    def _sagemaker(self) -> Any:
        return self.where.session.client("sagemaker", region_name=self.where.region)

    def describe(self) -> dict[str, Any]:
        """DescribeTrainingJob's answer. Raises CommandError for a job that there is not."""
        from botocore.exceptions import ClientError

        with explained(f"sagemaker:DescribeTrainingJob {self.name}"):
            try:
                found: dict[str, Any] = self._sagemaker.describe_training_job(TrainingJobName=self.name)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("ValidationException", "ResourceNotFound"):
                    known = [job.name for job in listed(self.where)]
                    more = f". Jobs of azrecipe: {', '.join(known[:5])}" if known else ""
                    raise CommandError(
                        f"there is no job {self.name} in {self.where.region}{did_you_mean(self.name, known)}{more}"
                    ) from None
                raise
        return found

    @property
    def run(self) -> str:
        """Its run, as <project>/<name>."""
        uri = self.describe().get("CheckpointConfig", {}).get("S3Uri", "")
        if RUNS not in uri:
            raise CommandError(f"{self.name} is no job of azrecipe: it keeps no run directory")
        return str(uri).rpartition(RUNS)[2].strip("/")

    def bucket(self) -> Bucket:
        """The bucket that its run directory is in."""
        there = urlparse(self.describe()["CheckpointConfig"]["S3Uri"])
        return Bucket(self.where, there.netloc, there.path.rpartition(RUNS)[0].strip("/"))

    def logs(self, follow: bool = False) -> Iterator[str]:
        """Lines of all machines, each machine's name first; with `follow` until the job has ended."""
        client = self.where.session.client("logs", region_name=self.where.region)
        tokens: dict[str, str] = {}
        pause = LOOKS[0]
        while True:
            ended = self.describe()["TrainingJobStatus"] in ENDED
            yield from self._new(client, tokens)
            if not follow or ended:
                return
            time.sleep(pause)
            pause = min(1.5 * pause, LOOKS[1])

    def _new(self, client: Any, tokens: dict[str, str]) -> Iterator[str]:
        from botocore.exceptions import ClientError

        with explained(f"logs of {self.name}"):
            try:
                pages = client.get_paginator("describe_log_streams").paginate(logGroupName=LOGS, logStreamNamePrefix=f"{self.name}/")
                streams = [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
            except ClientError as error:
                if error.response["Error"]["Code"] == "ResourceNotFoundException":
                    return  # nothing has been written yet
                raise
            found: list[tuple[int, str]] = []
            for stream in streams:
                host = stream.partition("/")[2].rpartition("-")[0]
                while True:
                    more = {"nextToken": tokens[stream]} if stream in tokens else {}
                    said = client.get_log_events(logGroupName=LOGS, logStreamName=stream, startFromHead=True, **more)
                    found += [(event["timestamp"], f"[{host}] {event['message'].rstrip()}") for event in said["events"]]
                    last, tokens[stream] = tokens.get(stream), said["nextForwardToken"]
                    if not said["events"] or last == tokens[stream]:
                        break
        yield from (line for _, line in sorted(found, key=lambda each: each[0]))

    def stop(self) -> str:
        """Ask it to stop: it saves a checkpoint first. Returns its state."""
        state: str = self.describe()["TrainingJobStatus"]
        if state in (*ENDED, "Stopping"):
            return state
        with explained(f"sagemaker:StopTrainingJob {self.name}"):
            self._sagemaker.stop_training_job(TrainingJobName=self.name)
        return "Stopping"

    def fetch(self, runs_dir: Path = Path("runs"), checkpoints: bool = False) -> Path:
        """Bring its run directory to <runs_dir>/<project>/<name>, finished or not; returns that folder."""
        run = self.run
        self.bucket().fetch(run, runs_dir / run, checkpoints)
        return runs_dir / run

    def wait(self, say: Any = None) -> dict[str, Any]:
        """Until it has ended, telling each change of its state and its metrics. Raises CannotRun where it failed or was stopped."""
        say = say or (lambda text: print(text, file=sys.stderr, flush=True))
        told, tokens, pause = "", dict[str, str](), LOOKS[0]
        client = self.where.session.client("logs", region_name=self.where.region)
        while True:
            found = self.describe()
            state = f"{found['TrainingJobStatus']}: {found['SecondaryStatus']}"
            if state != told:
                say(f"{self.name}: {state}")
                told = state
            for line in self._new(client, tokens):
                if "bits per byte" in line or "tokens/s" in line or "steps/s" in line or "azrecipe:" in line:
                    say(line)
            if found["TrainingJobStatus"] in ENDED:
                break
            time.sleep(pause)
            pause = min(1.5 * pause, LOOKS[1])
        if found["TrainingJobStatus"] != "Completed":
            raise CannotRun(
                f"{self.name}: {found['TrainingJobStatus']}: {found.get('FailureReason') or 'it was stopped; the same command goes on from its checkpoint'}"
            )
        return found


def attach(name: str, region: str | None = None) -> Job:
    """A job by its name."""
    needed()
    return Job(name, account(region))


def listed(where: Account, contains: str = "azrecipe-", state: str | None = None) -> list[Job]:
    """Jobs of azrecipe, of one state where it is named, the newest first."""
    client = where.session.client("sagemaker", region_name=where.region)
    more = {"StatusEquals": state} if state else {}
    with explained("sagemaker:ListTrainingJobs"):
        said = client.list_training_jobs(NameContains=contains, SortBy="CreationTime", SortOrder="Descending", MaxResults=50, **more)
    return [Job(each["TrainingJobName"], where) for each in said["TrainingJobSummaries"] if each["TrainingJobName"].startswith(contains)]


def status(name: str | None = None, region: str | None = None) -> list[dict[str, Any]]:
    """What a job, or each of azrecipe's newest, is now: name, state, run, machines, seconds trained and billed, failure."""
    needed()
    where = account(region)
    return [_status(job) for job in ([Job(name, where)] if name else listed(where)[:20])]


def _status(job: Job) -> dict[str, Any]:
    said = job.describe()
    began, ended = said.get("TrainingStartTime"), said.get("TrainingEndTime")
    seconds = said.get("TrainingTimeInSeconds")
    if seconds is None and began is not None:
        seconds = int(((ended or datetime.now(UTC)) - began).total_seconds())
    machines = said.get("ResourceConfig", {})
    transitions = said.get("SecondaryStatusTransitions") or [{}]
    return {
        "name": job.name,
        "state": said["TrainingJobStatus"],
        "doing": said.get("SecondaryStatus"),
        "message": transitions[-1].get("StatusMessage") or "",
        "run": said.get("CheckpointConfig", {}).get("S3Uri", "").rpartition(RUNS)[2].strip("/") or None,
        "machines": f"{machines.get('InstanceCount')} × {machines.get('InstanceType')}",
        "spot": bool(said.get("EnableManagedSpotTraining")),
        "seconds": seconds,
        "billable_seconds": said.get("BillableTimeInSeconds"),
        "failure": said.get("FailureReason"),
        "metrics": {each["MetricName"]: each["Value"] for each in said.get("FinalMetricDataList", [])},
    }


def logs(name: str, follow: bool = False, region: str | None = None) -> Iterator[str]:
    """Lines of a job's log."""
    return attach(name, region=region).logs(follow)


def stop(name: str, region: str | None = None) -> str:
    """Stop a job, its checkpoint saved."""
    return attach(name, region=region).stop()


def fetch(name: str, runs_dir: Path = Path("runs"), checkpoints: bool = False, region: str | None = None) -> Path:
    """Bring a job's run directory here."""
    return attach(name, region=region).fetch(runs_dir, checkpoints)
