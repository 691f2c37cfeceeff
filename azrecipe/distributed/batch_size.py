"""Split a global batch into device batches and accumulation steps."""

from __future__ import annotations

from dataclasses import dataclass

from azrecipe.errors import CommandError


@dataclass(frozen=True)
class BatchSplit:
    """A device's share of a global batch.

    global_batch_size = world_size × per_device × accumulation, in sequences.
    """

    per_device: int
    accumulation: int


def split_batch(global_batch_size: int, ceiling: int, world_size: int) -> BatchSplit:
    """Return the largest device batch of at most `ceiling` sequences.

    It divides the device's share. Raises CommandError where the global batch does not divide over `world_size` processes.
    """
    if global_batch_size % world_size:
        divisors = [n for n in range(1, global_batch_size + 1) if global_batch_size % n == 0]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - world_size))[:5])
        raise CommandError(
            f"training.global_batch_size = {global_batch_size} does not divide over {world_size} processes. "
            f"Numbers of processes that do: {', '.join(map(str, nearest))}; or set a multiple of {world_size}"
        )
    share = global_batch_size // world_size
    per_device = next(n for n in range(min(share, ceiling), 0, -1) if share % n == 0)
    return BatchSplit(per_device, share // per_device)
