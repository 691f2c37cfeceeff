"""Share between processes which signal to stop one of them received."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


class SignalExchange:
    """Tells all processes, at the same step, that one received a signal.

    Each step starts a reduction and reads the one that the step before started. So no step waits: on a GPU the number travels on a stream
    of its own, and is in the host's memory when it is read.
    """

    def __init__(self, device: torch.device) -> None:
        self.flag = torch.zeros((), dtype=torch.int32, device=device)
        self.is_cuda = device.type == "cuda"
        self.host_flag = torch.zeros((), dtype=torch.int32, pin_memory=True) if self.is_cuda else self.flag
        self.stream = torch.cuda.Stream(device) if self.is_cuda else None
        self.pending: Any = None  # an operation, or a CUDA event after it

    def exchange(self, number: int, at_once: bool) -> int:
        """Share a step's signal; return the one that all processes know.

        Every process must call this after every step.

        Args:
            number: The signal that this process received; 0 for none.
            at_once: Whether this step's reduction is read too, and not a step later. The same in all processes.

        Returns:
            The highest signal of all processes; 0 for none.
        """
        known = self._finish()
        self._start(max(number, known))
        return self._finish() if at_once else known

    def _start(self, number: int) -> None:
        if self.stream is None:
            self.flag.fill_(number)
            self.pending = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
            return
        with torch.cuda.stream(self.stream):
            self.flag.fill_(number)
            operation: Any = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
            operation.wait()  # the stream waits, the host does not
            self.host_flag.copy_(self.flag, non_blocking=True)
            self.pending = torch.cuda.Event()
            self.pending.record()

    def _finish(self) -> int:
        if self.pending is None:
            return 0
        if self.is_cuda:
            self.pending.synchronize()
        else:
            self.pending.wait()
        self.pending = None
        return int(self.host_flag)
