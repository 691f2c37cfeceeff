"""Stage 2: attention alone, forward and backward, for packed documents at the published shape; milliseconds, memory, agreement."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from environment import timed
from results import Results

SHAPE = {"rows": 7, "heads": 32, "groups": 8, "tokens": 2048, "width": 64}
TOY = {"rows": 2, "heads": 4, "groups": 2, "tokens": 64, "width": 16}
DOCUMENTS = 5  # in a row, about as many as the recipes' text has in 2,048 tokens


def run(results: Results, _recipe: Path, toy: bool) -> None:
    import torch
    from torch.nn.attention import SDPBackend

    if not torch.cuda.is_available():
        results.measure("attention", "skipped", lambda: {"skipped": "no GPU; the loop over documents is compared with the mask"})
    case = Case(TOY if toy else SHAPE)
    ways: dict[str, Callable[[], Any]] = {"masked float32": lambda: case.sdpa(masked=True, exact=True)}
    if torch.cuda.is_available():
        ways |= {
            "causal, cuDNN": lambda: case.sdpa(backend=SDPBackend.CUDNN_ATTENTION),
            "causal, flash": lambda: case.sdpa(backend=SDPBackend.FLASH_ATTENTION),
            "masked, as PyTorch chooses": lambda: case.sdpa(masked=True),
            "masked, cuDNN": lambda: case.sdpa(masked=True, backend=SDPBackend.CUDNN_ATTENTION),
            "masked, memory-efficient": lambda: case.sdpa(masked=True, backend=SDPBackend.EFFICIENT_ATTENTION),
            "masked, cuDNN, K and V not repeated": lambda: case.sdpa(masked=True, backend=SDPBackend.CUDNN_ATTENTION, grouped=True),
        }
    ways |= {
        "varlen": lambda: case.varlen(repeated=False, longest=None),
        "varlen, longest document": lambda: case.varlen(repeated=False, longest=case.longest),
        "varlen, K and V repeated": lambda: case.varlen(repeated=True, longest=None),
    }
    for name, way in ways.items():
        if not results.measure("attention", name, lambda way=way: case.measure(way)):
            return
    if torch.cuda.is_available():
        results.measure("attention", "ten new lengths, cuDNN first", lambda: new_lengths(SDPBackend.CUDNN_ATTENTION))
        results.measure("attention", "ten new lengths, flash", lambda: new_lengths(SDPBackend.FLASH_ATTENTION))
        results.measure("attention", "kernel that PyTorch chooses", lambda: chosen(case))
    results.measure("attention", "flex_attention, compiled", lambda: case.measure(case.flex()))


class Case:
    """Queries, keys and values of packed rows, and what attention within documents gives in float32."""

    def __init__(self, shape: dict[str, int]) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        rows, tokens, width = shape["rows"], shape["tokens"], shape["width"]
        torch.manual_seed(0)
        self.groups = shape["heads"] // shape["groups"]
        self.exact = [
            torch.randn(rows, heads, tokens, width).to(self.device)
            for heads in (shape["heads"], shape["groups"], shape["groups"], shape["heads"])
        ]
        cuts = torch.stack([torch.randperm(tokens - 1)[: DOCUMENTS - 1].sort().values + 1 for _ in range(rows)])
        starts = torch.zeros(rows, tokens, dtype=torch.long).scatter_(1, cuts, 1)
        starts[:, 0] = 1
        self.document = starts.cumsum(1).to(self.device)
        begins = starts.reshape(-1).nonzero().view(-1)
        self.borders = torch.cat([begins, torch.tensor([rows * tokens])]).to(torch.int32).to(self.device)
        self.longest = int(self.borders.diff().max())
        same = self.document[:, None, :, None] == self.document[:, None, None, :]
        self.mask = same & torch.ones(tokens, tokens, dtype=torch.bool, device=self.device).tril()
        self.reference: list[Any] | None = None

    def tensors(self, exact: bool = False) -> list[Any]:
        import torch

        half = torch.bfloat16 if self.device == "cuda" else torch.float32
        return [x.to(torch.float32 if exact else half).detach().requires_grad_() for x in self.exact[:3]]

    def sdpa(self, masked: bool = False, exact: bool = False, grouped: bool = False, backend: Any = None) -> Any:
        import torch.nn.functional as F
        from torch.nn.attention import sdpa_kernel

        q, k, v = self.tensors(exact)

        def attend() -> Any:
            keys, values = (k, v) if grouped else (x.repeat_interleave(self.groups, 1) for x in (k, v))
            more = {"attn_mask": self.mask} if masked else {"is_causal": True}
            if backend is None:
                return F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped, **more)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, keys, values, enable_gqa=grouped, **more)

        return attend, (q, k, v), masked

    def varlen(self, repeated: bool, longest: int | None) -> Any:
        from azrecipe.modeling import attention

        attention.register_varlen()
        q, k, v = self.tensors()
        length = longest or q.shape[2]

        def attend() -> Any:
            keys, values = (x.repeat_interleave(self.groups, 1) for x in (k, v)) if repeated else (k, v)
            return attention.attend_varlen(None, q, keys, values, None, cu_seq_lens_q=self.borders, max_length_q=length)[0].transpose(1, 2)

        return attend, (q, k, v), True

    def flex(self) -> Any:
        import torch
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def within(b: Any, _h: Any, i: Any, j: Any) -> Any:
            return (i >= j) & (self.document[b, i] == self.document[b, j])

        rows, tokens = self.document.shape
        mask = create_block_mask(within, rows, None, tokens, tokens, device=self.device)
        compiled = torch.compile(flex_attention)

        def way() -> Any:
            q, k, v = self.tensors()
            return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True), (q, k, v), True

        return way

    def measure(self, way: Callable[[], Any]) -> dict[str, Any]:
        """Milliseconds forward and backward, bytes at the peak, and relative differences of output and gradients from float32 with the mask."""
        import torch

        attend, leaves, masked = way()
        grad = self.exact[3].to(leaves[0].dtype)

        def step() -> Any:
            out = attend()
            return out, *torch.autograd.grad(out, leaves, grad)

        values = [x.detach().float() for x in step()]
        if self.reference is None:
            self.reference = values
        row: dict[str, Any] = {}
        if masked:
            row["relative error"] = [
                float(f"{((a - b).norm() / b.norm()).item():.2e}") for a, b in zip(values, self.reference, strict=True)
            ]
        del values
        if self.device == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            row["forward_ms"] = round(timed(lambda: attend().detach(), 10) * 1000, 3)
            row["both_ms"] = round(timed(step, 10) * 1000, 3)
            row["peak_mb"] = round((torch.cuda.max_memory_allocated() - before) / 1e6)
        return row


def new_lengths(backend: Any) -> dict[str, Any]:
    """Seconds that ten lengths take which this process has not seen, forward and backward, and the same ten again."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import sdpa_kernel

    seconds = []
    for _ in range(2):
        torch.cuda.synchronize()
        begun = time.monotonic()
        for length in range(601, 621, 2):
            x = torch.randn(8, 32, length, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(x, x, x, is_causal=True).sum().backward()
        torch.cuda.synchronize()
        seconds.append(round(time.monotonic() - begun, 3))
    return {"first": seconds[0], "again": seconds[1]}


def chosen(case: Case) -> dict[str, Any]:
    """The kernels that run where nobody chooses, by the profiler."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    from azrecipe.training.profiling import group_fused_kernels

    found = {}
    for name, masked in (("causal", False), ("masked", True)):
        attend, _, _ = case.sdpa(masked=masked)
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as recorded:
            attend().sum().backward()
            torch.cuda.synchronize()
        found[name] = [kind for kind, names in group_fused_kernels([event.key for event in recorded.key_averages()]).items() if names]
    return {"chosen": found, "priority": str(torch._C._get_sdp_priority_order())}
