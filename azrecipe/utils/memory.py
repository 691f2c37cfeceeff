"""The peak memory of this process."""

from __future__ import annotations

import resource
import sys


def peak_memory() -> int:
    """Most bytes in use so far: on a GPU what PyTorch allocated there since the loop began, on CPU the process' resident size."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
