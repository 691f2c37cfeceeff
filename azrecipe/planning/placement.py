"""Knows a launch on rented machines: which processes there would be, and how they would share the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from azrecipe.errors import CommandError, did_you_mean
from azrecipe.hardware import GIB, Card, Link, Machine
from azrecipe.planning.step_time import Cluster

NOWHERE = Machine("", Card("", 0, 0, 0, 0, 0, 0, Link("", 0)), 0, Link("", 0))  # before machines are named


@dataclass(frozen=True)
class Where(Cluster):
    """The machines of a plan. reshard: as fsdp_reshard_after_forward."""

    reshard: bool = True

    @property
    def card_bytes(self) -> float:
        return self.machine.card.total_memory_gib * GIB

    @property
    def title(self) -> str:
        machines = f"{self.nodes} × {self.machine.name}" if self.nodes > 1 else self.machine.name
        return (
            f"{machines}: {self.world} × {self.machine.card.name}"
            if self.machine.name.partition(" ")[0] != self.machine.card.name
            else machines
        )

    def as_kind(self, kind: str) -> Where:
        """The same machines with another backend; HSDP keeps its shards inside a machine."""
        return replace(self, kind=kind, replicate=max(self.nodes, 2) if kind == "hsdp" else 1, context=1, reshard=True)


def where(machine: Machine, nodes: int, asked: Where | None) -> Where:
    """The launch on machines: as asked, else FSDP over all cards, or one process where there is one card. Raises CommandError."""
    if nodes > 1 and machine.network is None:
        raise CommandError(
            f"--nodes {nodes}: how {machine.name} are connected is not known. Describe the machine and its network in a file of your own: --hardware-file"
        )
    if asked is not None:
        found = replace(asked, machine=machine, nodes=nodes)
        if found.kind == "single" and found.world > 1:
            raise CommandError(f"the accelerate config is for one process, and {found.title} has {found.world} cards: fsdp or ddp")
        if found.world % (found.replicate * found.context):
            raise CommandError(
                f"{found.title}: {found.world} cards do not divide into the accelerate config's groups of {found.replicate * found.context}"
            )
        if found.kind != "single" and found.world == 1:
            return replace(found, kind="single", replicate=1, context=1)
        return found
    return Where(machine, nodes, "single" if machine.count * nodes == 1 else "fsdp2")


def kind_of(distributed_type: str, replicate: int, zero_stage: int) -> str:
    """backend.Backend's word for an accelerate config's distributed_type. Raises CommandError for one that trains nothing here."""
    if distributed_type == "FSDP":
        return "hsdp" if replicate > 1 else "fsdp2"
    if distributed_type == "DEEPSPEED":
        return f"zero{zero_stage}"
    known = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp"}
    if distributed_type not in known:
        raise CommandError(f"distributed_type: {distributed_type} is no backend of azrecipe{did_you_mean(distributed_type, known)}")
    return known[distributed_type]
