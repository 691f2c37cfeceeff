"""Two processes (torchrun) train the new rows of a very small model by DDP and FSDP 2 as one process does; rank 0 prints the differences."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from azrecipe.modeling.parameter_groups import list_weight_decay_parameters, set_trainable_parameters
from azrecipe.modeling.row_gradient_mask import register_row_masks

NEW = (3, *range(40, 51))  # of 53 rows, so that both processes hold old and new ones, and no two of them as many
# Tied or not, what trains, the matrices that this means, and the layers.
CASES = (
    (False, ["new_tokens"], ["model.embed_tokens.weight"], []),
    (False, ["new_tokens_head", "layers[1]"], ["lm_head.weight"], ["1"]),
    (True, ["new_tokens_head"], ["model.embed_tokens.weight"], []),
)


def build(tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, tie_word_embeddings=tied, pad_token_id=0, **sizes))


def plain(_: Any, __: bool) -> Any:
    return _nothing()


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def no_sync(wrapped: DistributedDataParallel, last: bool) -> Any:
    return _nothing() if last else wrapped.no_sync()


def unsynced(wrapped: FSDPModule, last: bool) -> Any:
    wrapped.set_requires_gradient_sync(last)
    return _nothing()


def train(
    model: LlamaForCausalLM, wrapped: Any, batches: list[torch.Tensor], patterns: list[str], around: Callable[[Any, bool], Any]
) -> Any:
    """Three steps of two batches each; returns the whole weights and the norms of the gradients."""
    trained = set_trainable_parameters(model, patterns, NEW)
    register_row_masks(model, trained)
    names = set(list_weight_decay_parameters(model, trained.masked_matrices))
    chosen = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = [
        {"params": [p for name, p in chosen.items() if (name in names) is decays], "weight_decay": 0.5 * decays} for decays in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    norms = []
    for _ in range(3):
        for i, batch in enumerate(batches):
            with around(wrapped, i + 1 == len(batches)):
                (wrapped(input_ids=batch, labels=batch, use_cache=False).loss / len(batches)).backward()
        norm = torch.nn.utils.clip_grad_norm_(chosen.values(), 0.05)
        norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))
        optimizer.step()
        optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone() for name, p in model.named_parameters()}, norms


def sharded(model: LlamaForCausalLM) -> LlamaForCausalLM:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def main() -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    data = torch.randint(1, 53, (2, 4, 12))  # [batches, sequences, tokens]
    mine = list(data[:, 2 * rank : 2 * rank + 2])
    found = []
    for tied, patterns, matrices, layers in CASES:
        start = build(tied)
        one, ddp, fsdp = copy.deepcopy(start), copy.deepcopy(start), sharded(copy.deepcopy(start))
        set_trainable_parameters(ddp, patterns, NEW)
        expected, norms = train(one, one, list(data), patterns, plain)
        runs = {
            "one": (expected, norms),
            "ddp": train(ddp, DistributedDataParallel(ddp), mine, patterns, no_sync),
            "fsdp2": train(fsdp, fsdp, mine, patterns, unsynced),
        }
        for kind, (weights, seen) in runs.items():
            case = {"case": [kind, patterns], "matrices": matrices, "layers": layers, "new": NEW}
            apart = max(abs(a - b) for a, b in zip(seen, norms, strict=True))
            found.append({**case, **compare(start, weights, expected), "norm": apart})
    if rank == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


def compare(start: LlamaForCausalLM, weights: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Rows and whole parameters that changed, by name, and the largest difference from the one process' weights."""
    changed: dict[str, Any] = {}
    for name, before in start.named_parameters():
        rows = [i for i, (a, b) in enumerate(zip(before, weights[name], strict=True)) if not torch.equal(a, b)]
        if rows:
            changed[name] = rows
    return {"changed": changed, "apart": max(float((weights[name] - expected[name]).abs().max()) for name in expected)}


if __name__ == "__main__":
    main()
