"""Knows what SageMaker has written about the machines of a job, and how their processes are started and meet."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe import hardware
from azrecipe.errors import CannotRun
from azrecipe.utils import shipped_files
from azrecipe.utils.process_pool import cores

RESOURCES = Path("/opt/ml/input/config/resourceconfig.json")
PORT = "7777"  # the one that SageMaker's own drivers use (sagemaker-train, container_drivers/scripts/environment.py)


@dataclass(frozen=True)
class Cluster:
    """One machine of a job, and the others. hosts are sorted: the first one is where all meet."""

    hosts: tuple[str, ...]
    host: str
    interface: str
    instance_type: str
    gpus: int

    @property
    def rank(self) -> int:
        return self.hosts.index(self.host)

    @property
    def processes(self) -> int:
        """On each machine: one a GPU, one where there is none."""
        return max(self.gpus, 1)

    @property
    def efa(self) -> bool:
        """Whether machines of this kind have EFA, as far as is known."""
        machine = hardware.of_instance(self.instance_type)
        return machine is not None and machine.network is not None and bool(machine.network.efa_interfaces)


def here(file: Path = RESOURCES) -> Cluster:
    """The machine that this process runs on. Raises CannotRun where SageMaker has written nothing of it."""
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        hosts, host = tuple(sorted(said["hosts"])), said["current_host"]
    except (OSError, ValueError, KeyError) as error:
        raise CannotRun(f"{file}: this is no container of a SageMaker training job ({type(error).__name__})") from None
    kind = said.get("current_instance_type") or os.environ.get("SM_CURRENT_INSTANCE_TYPE", "")
    return Cluster(hosts, host, said.get("network_interface_name") or "eth0", kind, _gpus())


def _gpus() -> int:
    """GPUs of this machine, as nvidia-smi lists them; torch would take a second to say the same."""
    told = os.environ.get("SM_NUM_GPUS")
    if told is not None:
        return int(told)
    if shutil.which("nvidia-smi") is None:
        return 0
    done = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines())


def command(cluster: Cluster, accelerate_config: str | None, worker: Sequence[str]) -> list[str]:
    """What starts this machine's processes. One process alone needs no launcher."""
    total = len(cluster.hosts) * cluster.processes
    if total == 1:
        return [sys.executable, "-m", "azrecipe", *worker]
    config = shipped_files.root() / "accelerate_configs" / f"{accelerate_config or ('fsdp' if cluster.gpus else 'ddp')}.yaml"
    line = [sys.executable, "-m", "azrecipe.pipeline.accelerate_launcher", "--config_file", str(config), "--num_processes", str(total)]
    line += ["--num_machines", str(len(cluster.hosts)), "--machine_rank", str(cluster.rank)]
    line += ["--main_process_ip", cluster.hosts[0], "--main_process_port", os.environ.get("SM_MASTER_PORT", PORT)]
    line += ["--rdzv_backend", "static", "--same_network", "--max_restarts", "0"]
    return [*line, "-m", "azrecipe", *worker]


def environment(cluster: Cluster) -> Mapping[str, str]:
    """What the processes' libraries must know of the network; a user's own settings win.

    The drivers of AWS' containers set EFA's variables only for launches of their own, so they are set here
    (aws-ofi-nccl and libfabric: FI_PROVIDER, FI_EFA_USE_DEVICE_RDMA, RDMAV_FORK_SAFE).
    """
    wanted = {"NCCL_SOCKET_IFNAME": cluster.interface, "GLOO_SOCKET_IFNAME": cluster.interface, "TP_SOCKET_IFNAME": cluster.interface}
    if cluster.efa and len(cluster.hosts) > 1:
        wanted |= {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "RDMAV_FORK_SAFE": "1", "NCCL_DEBUG": "WARN"}
    wanted["OMP_NUM_THREADS"] = str(max(cores() // cluster.processes // 2, 1))
    return {**wanted, **os.environ}
