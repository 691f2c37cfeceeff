"""The machines of a training job, and the launch of their processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe import hardware
from azrecipe.errors import CannotRun
from azrecipe.utils import shipped_files
from azrecipe.utils.process_pool import count_cores
from azrecipe.utils.python_command import build_python_command

RESOURCE_CONFIG_FILE = Path("/opt/ml/input/config/resourceconfig.json")
MASTER_PORT = "7777"  # the one that SageMaker's own drivers use (sagemaker-train, container_drivers/scripts/environment.py)


@dataclass(frozen=True)
class TrainingCluster:
    """The machines of a job, seen from one of them.

    Attributes:
        hosts: The names of all machines, sorted. The first one is the rendezvous.
        host: This machine's name.
        network_interface: Its network interface.
        instance_type: Its SageMaker type, such as ml.g5.8xlarge.
        gpus_per_host: The GPUs of each machine.
    """

    hosts: tuple[str, ...]
    host: str
    network_interface: str
    instance_type: str
    gpus_per_host: int

    @property
    def rank(self) -> int:
        return self.hosts.index(self.host)

    @property
    def processes_per_host(self) -> int:
        """Processes on each machine: one for each GPU, or one."""
        return max(self.gpus_per_host, 1)

    @property
    def has_efa(self) -> bool:
        """Whether this instance type is known to have EFA."""
        machine = hardware.find_instance_type(self.instance_type)
        return machine is not None and machine.network is not None and bool(machine.network.efa_interfaces)


def read_cluster(file: Path = RESOURCE_CONFIG_FILE) -> TrainingCluster:
    """Read SageMaker's description of the job's machines.

    Raises CannotRun outside the container of a training job.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        hosts, host = tuple(sorted(config["hosts"])), config["current_host"]
    except (OSError, ValueError, KeyError) as error:
        raise CannotRun(f"{file}: this is no container of a SageMaker training job ({type(error).__name__})") from None
    instance_type = config.get("current_instance_type") or os.environ.get("SM_CURRENT_INSTANCE_TYPE", "")
    return TrainingCluster(hosts, host, config.get("network_interface_name") or "eth0", instance_type, _count_gpus())


def _count_gpus() -> int:
    """Count this machine's GPUs with nvidia-smi, which is faster than torch."""
    count = os.environ.get("SM_NUM_GPUS")
    if count is not None:
        return int(count)
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return sum(line.startswith("GPU ") for line in listing.stdout.splitlines())


def build_launch_command(cluster: TrainingCluster, accelerate_config: str | None, worker: Sequence[str]) -> list[str]:
    """Build the command that starts this machine's processes.

    Args:
        cluster: The machines of the job.
        accelerate_config: The name of a shipped config; None for fsdp on GPUs and ddp on CPUs.
        worker: The arguments of azrecipe.

    Returns:
        The command line. A single process needs no launcher.
    """
    total = len(cluster.hosts) * cluster.processes_per_host
    if total == 1:
        return build_python_command("azrecipe", *worker)
    config = (
        shipped_files.locate_root() / "accelerate_configs" / f"{accelerate_config or ('fsdp' if cluster.gpus_per_host else 'ddp')}.yaml"
    )
    line = build_python_command("azrecipe.pipeline.accelerate_launcher", "--config_file", str(config), "--num_processes", str(total))
    line += ["--num_machines", str(len(cluster.hosts)), "--machine_rank", str(cluster.rank)]
    line += ["--main_process_ip", cluster.hosts[0], "--main_process_port", os.environ.get("SM_MASTER_PORT", MASTER_PORT)]
    line += ["--rdzv_backend", "static", "--same_network", "--max_restarts", "0"]
    return [*line, "-m", "azrecipe", *worker]


def build_environment(cluster: TrainingCluster) -> Mapping[str, str]:
    """Build the processes' environment; variables that are set already win.

    AWS' drivers set the variables of EFA only for their own launches, so they are set here
    (aws-ofi-nccl and libfabric: FI_PROVIDER, FI_EFA_USE_DEVICE_RDMA, RDMAV_FORK_SAFE).
    """
    variables = {
        "NCCL_SOCKET_IFNAME": cluster.network_interface,
        "GLOO_SOCKET_IFNAME": cluster.network_interface,
        "TP_SOCKET_IFNAME": cluster.network_interface,
    }
    if cluster.has_efa and len(cluster.hosts) > 1:
        variables |= {"FI_PROVIDER": "efa", "FI_EFA_USE_DEVICE_RDMA": "1", "RDMAV_FORK_SAFE": "1", "NCCL_DEBUG": "WARN"}
    variables["OMP_NUM_THREADS"] = str(max(count_cores() // cluster.processes_per_host // 2, 1))
    return {**variables, **os.environ}
