"""Let the processes of a launch meet before their process group starts.

The start of the group only waits. Here, a process that ends before it tells the others why, and one that does not come is named.
"""

from __future__ import annotations

import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING

from azrecipe.errors import CannotRun, RunFailed
from azrecipe.utils.environment_variables import START_TIMEOUT

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

POLL_SECONDS = 0.25
ANNOUNCEMENT_SECONDS = 5.0  # for a process that ends: the store may not be there
MAX_NAMED_RANKS = 20
COUNT_KEY, FAILURE_KEY = "arrived", "failure"

_served: list[Store] = []  # where this process serves the store, its group finds it here


def meet_processes() -> None:
    """Wait until all processes of the launch are here.

    Raises:
        RunFailed: A process has ended, with its reason, or did not come within AZRECIPE_START_TIMEOUT.
        CannotRun: The store of the launch cannot be reached.
    """
    rank, world_size, timeout = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), START_TIMEOUT.read_seconds()
    deadline = time.monotonic() + timeout
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store = _connect(rank, timeout)
    except (RuntimeError, OSError):
        raise CannotRun(f"process 0, or its launcher, was not reached at {place} within {timeout:.0f} s ({START_TIMEOUT})") from None
    try:
        store.set(str(rank), socket.gethostname())
        store.add(COUNT_KEY, 1)
        while not store.check([FAILURE_KEY]):
            if store.add(COUNT_KEY, 0) >= world_size:
                return
            if time.monotonic() > deadline:
                raise RunFailed(_describe_missing(store, world_size, timeout))
            time.sleep(POLL_SECONDS)
        failure = store.get(FAILURE_KEY).decode(errors="replace")
    except RuntimeError:
        raise RunFailed(f"the launcher at {place} ended before all processes had met: its own output says why") from None
    raise RunFailed(f"{failure}\n  So this run ended before it began")


def announce_failure(message: str) -> None:
    """Tell processes that wait, or will wait, that this one ends."""
    rank = int(os.environ.get("RANK", "0"))
    if "MASTER_ADDR" not in os.environ or (rank == 0 and not _has_launcher_store()):
        return  # a store that this process serves would end with it
    try:
        _connect(rank, ANNOUNCEMENT_SECONDS).set(FAILURE_KEY, f"process {rank} on {socket.gethostname()}: {message}")
    except (RuntimeError, OSError):
        return


def _describe_missing(store: Store, world_size: int, timeout: float) -> str:
    missing = [rank for rank in range(world_size) if not store.check([str(rank)])]
    hosts = sorted({store.get(str(rank)).decode(errors="replace") for rank in range(world_size) if rank not in missing})
    more = f" and {len(missing) - MAX_NAMED_RANKS} more" if len(missing) > MAX_NAMED_RANKS else ""
    return (
        f"process {', '.join(map(str, missing[:MAX_NAMED_RANKS]))}{more} of {world_size} did not come within {timeout:.0f} s ({START_TIMEOUT}): "
        f"look at its machine, which is none of {', '.join(hosts)}, or at its own output"
    )


def _has_launcher_store() -> bool:
    """Whether the launcher serves the store of the launch, not process 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _connect(rank: int, timeout: float) -> Store:
    """Connect to the store of this launch, which process 0 may serve."""
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    is_server = rank == 0 and not _has_launcher_store()
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=is_server,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        multi_tenant=True,  # the group's store has the same port
    )
    if is_server:
        _served.append(store)
    return PrefixStore(f"azrecipe-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
