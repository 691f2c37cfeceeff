"""How a fixed global batch falls on a machine: sequences at once on a device, and how often they accumulate."""

from __future__ import annotations

from dataclasses import dataclass

from azrecipe.errors import CommandError


@dataclass(frozen=True)
class Split:
    """global_batch_size = world x per_device x accumulation."""

    per_device: int
    accumulation: int


def split(global_batch_size: int, ceiling: int, world: int) -> Split:
    """The largest batch a device that divides its share and is at most `ceiling`. Raises CommandError where none does."""
    if global_batch_size % world:
        fitting = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        nearest = sorted(sorted(fitting, key=lambda n: abs(n - world))[:5])
        raise CommandError(
            f"training.global_batch_size = {global_batch_size} does not divide over {world} processes. "
            f"Numbers of processes that do: {', '.join(map(str, nearest))}; or set a multiple of {world}"
        )
    share = global_batch_size // world
    per_device = next(n for n in range(min(share, ceiling), 0, -1) if share % n == 0)
    return Split(per_device, share // per_device)
