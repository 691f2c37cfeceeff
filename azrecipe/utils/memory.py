"""The peak memory of this process."""

from __future__ import annotations

import resource
import sys


def measure_peak_memory() -> int:
    """Return the peak memory of this process in bytes.

    On a GPU it is what PyTorch allocated there since the loop began; on a CPU the resident size of the process.
    """
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
