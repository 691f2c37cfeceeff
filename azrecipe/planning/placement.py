"""A launch on machines that are only named: processes, strategy, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from azrecipe.errors import CommandError, did_you_mean
from azrecipe.hardware import GIB, Card, Link, Machine
from azrecipe.planning.step_time import MachineGroup

NO_MACHINE = Machine("", Card("", 0, 0, 0, 0, 0, 0, Link("", 0)), 0, Link("", 0))  # before machines are named


@dataclass(frozen=True)
class Placement(MachineGroup):
    """The machines of a plan.

    reshard: accelerate's fsdp_reshard_after_forward.
    """

    reshard: bool = True

    @property
    def card_bytes(self) -> float:
        return self.machine.card.total_memory_gib * GIB

    @property
    def title(self) -> str:
        machines = f"{self.nodes} × {self.machine.name}" if self.nodes > 1 else self.machine.name
        return (
            f"{machines}: {self.world_size} × {self.machine.card.name}"
            if self.machine.name.partition(" ")[0] != self.machine.card.name
            else machines
        )

    def with_strategy(self, strategy: str) -> Placement:
        """Return the same machines with another strategy.

        HSDP keeps its shards inside a machine.
        """
        return replace(
            self, strategy=strategy, replicate_size=max(self.nodes, 2) if strategy == "hsdp" else 1, context_parallel_size=1, reshard=True
        )


def build_placement(machine: Machine, nodes: int, template: Placement | None) -> Placement:
    """Place a launch on machines.

    Without a template: FSDP over all cards, or one process on one card. Raises CommandError where the template does not fit the cards.
    """
    if nodes > 1 and machine.network is None:
        raise CommandError(
            f"--nodes {nodes}: how {machine.name} are connected is not known. Describe the machine and its network in a file of your own: --hardware-file"
        )
    if template is not None:
        placed = replace(template, machine=machine, nodes=nodes)
        group_size = placed.replicate_size * placed.context_parallel_size
        if placed.strategy == "single" and placed.world_size > 1:
            raise CommandError(f"the accelerate config is for one process, and {placed.title} has {placed.world_size} cards: fsdp or ddp")
        if placed.world_size % group_size:
            raise CommandError(
                f"{placed.title}: {placed.world_size} cards do not divide into the accelerate config's groups of {group_size}"
            )
        if placed.strategy != "single" and placed.world_size == 1:
            return replace(placed, strategy="single", replicate_size=1, context_parallel_size=1)
        return placed
    return Placement(machine, nodes, "single" if machine.count * nodes == 1 else "fsdp2")


def resolve_strategy(distributed_type: str, replicate: int, zero_stage: int) -> str:
    """Translate an accelerate config's distributed_type to a strategy.

    Raises CommandError for a type that azrecipe does not support.
    """
    if distributed_type == "FSDP":
        return "hsdp" if replicate > 1 else "fsdp2"
    if distributed_type == "DEEPSPEED":
        return f"zero{zero_stage}"
    strategies = {"NO": "single", "MULTI_GPU": "ddp", "MULTI_CPU": "ddp"}
    if distributed_type not in strategies:
        raise CommandError(f"distributed_type: {distributed_type} is no backend of azrecipe{did_you_mean(distributed_type, strategies)}")
    return strategies[distributed_type]
