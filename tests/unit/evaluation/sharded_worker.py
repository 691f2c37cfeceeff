"""Two processes (torchrun, gloo) score text with a model that FSDP 2 splits; rank 0 prints what each of them has.

python -m torch.distributed.run --nproc-per-node 2 sharded_worker.py
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from azrecipe.distributed.local_storage import all_gather_object
from azrecipe.evaluation import token_losses
from azrecipe.planning.simulation import step_simulation
from azrecipe.planning.simulation.step_spec import StepSpec

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def score(tied: bool) -> dict[str, Any]:
    """Score the same text with the whole model, and with a part of it in each process."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied)).eval()
    ids = torch.randint(96, (3, 300))  # 897 rows of logits
    with torch.no_grad():
        expected = token_losses.compute_token_losses(model, ids, ids)
    spec = StepSpec(config={"model_type": "llama", **SIZES}, precision="float32", strategy="fsdp2", shards=2)
    step_simulation._apply_fsdp(model, model, spec, init_device_mesh("cpu", (2,)))
    rows: list[int] = []
    head = model.get_output_embeddings()
    forward = type(head).forward
    head.forward = lambda hidden: rows.append(len(hidden)) or forward(head, hidden)
    with torch.no_grad():
        losses = token_losses.compute_token_losses(model, ids, ids)
    return {"apart": float((losses - expected).abs().max()), "rows": rows, "whole": hasattr(model, token_losses._WHOLE_LOGITS)}


def main() -> None:
    dist.init_process_group("gloo")
    answers = all_gather_object([score(tied) for tied in (False, True)])
    if dist.get_rank() == 0:
        print(json.dumps(answers))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
