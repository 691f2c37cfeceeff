"""Two machines of a training job on this one: a network namespace each, their own /opt/ml, the job's own entry point as process 1.

What SageMaker does around a container is done here: files of the channels come from S3, the cluster is described in
/opt/ml/input/config, checkpoints go to S3 while they are being written and come back at the start, process 1 hears SIGTERM and is killed
later. S3 is whatever AWS_ENDPOINT_URL names. Needs root, `ip` and `unshare`.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

NETWORK = "10.77.0"
APART = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc"]


def why_not() -> str:
    """Why namespaces cannot be made here, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "mount") if shutil.which(name) is None]
    if missing:
        return f"there is no {', '.join(missing)}"
    made = subprocess.run(["ip", "netns", "add", "azprobe"], capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", "azprobe"], capture_output=True, check=False)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.strip()}"
    tried = subprocess.run(["unshare", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True, check=False)
    return f"mount and process namespaces are not permitted: {tried.stderr.strip()}" if tried.returncode else ""


def _sh(line: str) -> None:
    subprocess.run(line, shell=True, check=True)


class Store:
    """A place in S3, as SageMaker reads and writes it."""

    def __init__(self, uri: str) -> None:
        import boto3

        there = urlparse(uri)
        self.bucket, self.prefix = there.netloc, there.path.lstrip("/")
        self.s3 = boto3.client("s3")

    def keys(self, prefix: str | None = None) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self.prefix if prefix is None else prefix)
        return [each["Key"] for page in pages for each in page.get("Contents", [])]

    def get(self, key: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.s3.download_file(self.bucket, key, str(file))  # no mode bits survive

    def down(self, folder: Path) -> None:
        """An S3Prefix: everything whose key begins so."""
        for key in self.keys():
            self.get(key, folder / (key[len(self.prefix) :].lstrip("/") or Path(key).name))

    def manifest(self, folder: Path) -> None:
        """A ManifestFile: what it lists, below its prefix."""
        first, *names = json.loads(self.s3.get_object(Bucket=self.bucket, Key=self.prefix)["Body"].read())
        base = Store(first["prefix"])
        for name in names:
            base.get(f"{base.prefix}{name}", folder / name)


class Syncing(threading.Thread):
    """Brings a folder to S3 while it is written, file by file in no good order, and deletes there what is deleted here."""

    def __init__(self, folder: Path, uri: str) -> None:
        super().__init__(daemon=True)
        self.folder, self.store = folder, Store(uri)
        self.sent = {str(file.relative_to(folder)): self._state(file) for file in folder.rglob("*") if file.is_file()}
        self.ended = threading.Event()
        self.start()

    @staticmethod
    def _state(file: Path) -> tuple[int, int]:
        said = file.stat()
        return said.st_size, said.st_mtime_ns

    def run(self) -> None:
        while not self.ended.wait(0.3):
            self.once()

    def once(self) -> None:
        now: dict[str, tuple[int, int]] = {}
        for file in sorted(self.folder.rglob("*"), reverse=True):  # COMPLETE.json is not the last to go up
            try:
                if file.is_file():
                    now[str(file.relative_to(self.folder))] = self._state(file)
            except OSError:
                continue
        for name, state in now.items():
            if self.sent.get(name) != state:
                try:
                    self.store.s3.upload_file(str(self.folder / name), self.store.bucket, f"{self.store.prefix}{name}")
                    self.sent[name] = state
                except OSError:
                    continue
        for name in set(self.sent) - set(now):
            self.store.s3.delete_object(Bucket=self.store.bucket, Key=f"{self.store.prefix}{name}")
            del self.sent[name]

    def finish(self, last: bool) -> None:
        """Stop; `last`: with what has changed since."""
        self.ended.set()
        self.join()
        if last:
            self.once()


class Host:
    """One machine of a job."""

    def __init__(self, request: Mapping[str, Any], rank: int, names: list[str], folder: Path) -> None:
        self.request, self.rank, self.name, self.folder = request, rank, names[rank], folder / names[rank]
        self.namespace = f"az{os.getpid()}h{rank}"
        self.ml = self.folder / "ml"
        for each in ("input/config", "input/data", "model", "output/data", "output/tensorboard", "checkpoints"):
            (self.ml / each).mkdir(parents=True)
        self._describe(names)
        self.checkpoints = request["CheckpointConfig"]["S3Uri"]
        Store(self.checkpoints).down(self.ml / "checkpoints")
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{NETWORK}.{i + 1} {name}\n" for i, name in enumerate(names)))

    def _describe(self, names: list[str]) -> None:
        machine, channels = self.request["ResourceConfig"]["InstanceType"], {}
        for channel in self.request["InputDataConfig"]:
            source, name = channel["DataSource"]["S3DataSource"], channel["ChannelName"]
            place = self.ml / "input" / "data" / name
            place.mkdir()
            getattr(Store(source["S3Uri"]), "manifest" if source["S3DataType"] == "ManifestFile" else "down")(place)
            channels[name] = {"TrainingInputMode": "File", "S3DistributionType": "FullyReplicated", "RecordWrapperType": "None"}
        cluster = {"current_host": self.name, "current_instance_type": machine, "current_group_name": "homogeneousCluster", "hosts": names,
                   "network_interface_name": "eth0", "instance_groups": [
                       {"instance_group_name": "homogeneousCluster", "instance_type": machine, "hosts": names}]}  # fmt: skip
        for file, what in {
            "resourceconfig": cluster,
            "inputdataconfig": channels,
            "hyperparameters": self.request.get("HyperParameters") or {},
        }.items():
            (self.ml / "input" / "config" / f"{file}.json").write_text(json.dumps(what))

    def start(self, switch: str) -> None:
        """Make its network and start its process 1."""
        link = f"v{self.rank}"
        _sh(f"ip netns add {self.namespace} && ip -n {self.namespace} link set lo up && "
            f"ip -n {self.namespace} link add eth0 type veth peer name {link} netns {switch} && "
            f"ip -n {self.namespace} addr add {NETWORK}.{self.rank + 1}/24 dev eth0 && ip -n {self.namespace} link set eth0 up && "
            f"ip -n {switch} link set {link} master br0 up")  # fmt: skip
        algorithm = self.request["AlgorithmSpecification"]
        line = shlex.join([*algorithm["ContainerEntrypoint"], *algorithm["ContainerArguments"]])
        for each in ("upper", "work", "tmp"):
            (self.folder / each).mkdir()
        inside = (f"mount -t overlay overlay -o lowerdir=/opt,upperdir={self.folder}/upper,workdir={self.folder}/work /opt && mkdir -p /opt/ml && "
                  f"mount --bind {self.ml} /opt/ml && mount --bind {self.folder}/hosts /etc/hosts && mkdir -p /tmp/azrecipe && "
                  f"mount --bind {self.folder}/tmp /tmp/azrecipe && hostname {self.name} && cd / && exec {line}")  # fmt: skip
        path = f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {"PATH": path, "HOME": str(self.folder), "LANG": "C.UTF-8", "TRAINING_JOB_NAME": self.request["TrainingJobName"],
                       "TRAINING_JOB_ARN": "", "AWS_REGION": "us-east-1", "OMP_NUM_THREADS": "1", **self.request["Environment"]}  # fmt: skip
        self.log = (self.folder / "log.txt").open("wb")
        self.process = subprocess.Popen(
            ["ip", "netns", "exec", self.namespace, *APART, "bash", "-c", inside],
            env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.syncing = Syncing(self.ml / "checkpoints", self.checkpoints)

    @property
    def said(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def signal(self, number: int) -> None:
        """To the container's process 1, as SageMaker does it. unshare waits for it and ends with its code."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            os.kill(int(child), number)

    def end(self, last: bool = True) -> None:
        """Take it away; `last`: with what has not gone to S3 yet."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.syncing.finish(last)
        self.log.close()
        subprocess.run(["ip", "netns", "del", self.namespace], check=False, capture_output=True)


class Running:
    """A job that runs: `with Running(request, folder) as job: job.wait()`."""

    def __init__(self, request: Mapping[str, Any], folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        names = [f"algo-{i + 1}" for i in range(request["ResourceConfig"]["InstanceCount"])]
        self.switch = f"az{os.getpid()}s"
        self.hosts = [Host(request, rank, names, folder) for rank in range(len(names))]

    def __enter__(self) -> Running:
        _sh(f"ip netns add {self.switch} && ip -n {self.switch} link add br0 type bridge && ip -n {self.switch} link set br0 up")
        for host in self.hosts:
            host.start(self.switch)
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts:
            host.end()
        subprocess.run(["ip", "netns", "del", self.switch], check=False, capture_output=True)

    def until(self, text: str, rank: int = 0, seconds: float = 240) -> None:
        """Until a machine has said something."""
        end = time.monotonic() + seconds
        while text not in self.hosts[rank].said:
            if self.hosts[rank].process.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{self.hosts[rank].name} never said {text!r}:\n{self.hosts[rank].said[-4000:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        """StopTrainingJob, or spot's end: SIGTERM to every process 1."""
        for host in self.hosts:
            if host.process.poll() is None:
                host.signal(signal.SIGTERM)

    def wait(self, seconds: float = 400) -> list[int]:
        """The exit codes. One machine's failure ends the others, as it ends the job."""
        end, stopped = time.monotonic() + seconds, 0.0
        while any(host.process.poll() is None for host in self.hosts):
            now = time.monotonic()
            if not stopped and any(host.process.poll() not in (None, 0) for host in self.hosts):
                stopped = now
                self.stop()
            if now > end or (stopped and now > stopped + 120):
                for host in self.hosts:
                    if host.process.poll() is None:
                        host.process.kill()
            time.sleep(0.1)
        return [int(host.process.returncode) for host in self.hosts]
