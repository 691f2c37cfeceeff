"""Draws configurations by a seed, and measures a real training step of each: bytes by PyTorch's own accounting, operations by its counter.

As a module (`python -m tests.run.simulated_vs_measured FOLDER SEED`, alone or under the launcher) it measures those of its backend, one after the other,
and writes measured-KIND-RANK.json. A step is a later one of the recipe's own trainer, so that an optimizer has its state.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SINGLE, SHARDED = 14, 10
TOKENS = 340
STEPS = 6
LITTLE = 256  # bytes: numbers that outlive a step, as a loss to be logged


@dataclass(frozen=True)
class Case:
    """A configuration: what is drawn, and its recipe."""

    name: str
    kind: str
    drawn: dict[str, Any]
    recipe: dict[str, Any]


def draw(seed: int) -> list[Case]:
    """Configurations of one process and of two under FSDP 2. Every value of a choice is dealt as often as any other."""
    dealer = random.Random(seed)
    return [*_hand(dealer, "single", SINGLE), *_hand(dealer, "fsdp2", SHARDED)]


def _hand(dealer: random.Random, kind: str, number: int) -> list[Case]:
    choices: dict[str, list[Any]] = {
        "trains": ["all", "lora", "embeddings", "layers", "new_tokens", "tuning"],
        "model_type": ["llama", "qwen3", "llama", "gemma", "llama", "gpt2"],
        "precision": ["float32", "bf16_mixed", "bf16_pure"],
        "activation_checkpointing": [True, False],
        "layers": [2, 3, 6, 9],
        "batch": [1, 2, 3, 4],
        "length": [64, 80, 128],
        "vocabulary": [512, 768, 2048],
        "tied": [True, False],
        "kv_heads": [4, 2, 1],
        "packing": [True, False],
        "attn_implementation": ["sdpa", "sdpa", "eager"],
        "fused": [None, "torch"],
        "accumulation": [1, 1, 2],
        "max_grad_norm": [1.0, 0.0],
        "optim": ["adamw_torch_fused", "adamw_torch", "adafactor" if kind == "single" else "adamw_torch"],  # which takes no sharded tensors
        "targets": ["all-linear", ["q_proj", "v_proj"]],
    }
    dealt = {}
    for name, values in choices.items():
        many = (values * number)[:number]
        dealer.shuffle(many)
        dealt[name] = many
    return [_case(kind, n, {name: values[n] for name, values in dealt.items()}) for n in range(number)]


def _case(kind: str, number: int, drawn: dict[str, Any], processes: int = 2) -> Case:
    tuned = drawn["trains"] in ("lora", "tuning")
    drawn["length"] += 64 * tuned  # a conversation begins with a system prompt
    drawn["fused"] = None if tuned else drawn["fused"]
    if (kind, drawn["trains"], drawn["precision"]) == ("fsdp2", "lora", "bf16_mixed"):
        drawn["accumulation"] = 1  # FSDP 2 fails there: TRL takes the head whole, past it, and no forward pass has gathered it (torch 2.13)
    name = f"{kind}-{number:02d}"
    per_step = drawn["batch"] * drawn["accumulation"] * (1 if kind == "single" else processes)
    training = {
        "global_batch_size": per_step, "per_device_train_batch_size": drawn["batch"], "precision": drawn["precision"],
        "activation_checkpointing": drawn["activation_checkpointing"], "max_grad_norm": drawn["max_grad_norm"], "optim": drawn["optim"],
        "logging_steps": 1, "save_steps": 100,
    }  # fmt: skip
    recipe: dict[str, Any] = {"project": "reality", "training": training}
    if tuned:
        recipe |= {
            "stage": "sft", "model": {"name_or_path": f"./models/{name}", "attn_implementation": drawn["attn_implementation"]},
            "chat_template": "llama3", "adapter": "lora" if drawn["trains"] == "lora" else "none",
            "data": {"max_length": drawn["length"], "packing": drawn["packing"], "datasets": [{"path": "questions.jsonl"}]},
        }  # fmt: skip
        if drawn["trains"] == "lora":
            targets = drawn["targets"] if drawn["model_type"] != "gpt2" else "all-linear"
            recipe["lora"] = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.1, "target_modules": targets}
        recipe["data"]["validation"] = {"held_out": {"fraction": 0.1}}
        training |= {"learning_rate": 1e-3, "max_steps": STEPS}
        return Case(name, kind, drawn, recipe)
    trainable = {"layers": ["layers[2:]" if drawn["layers"] > 2 else "layers[1:]"]}.get(drawn["trains"], [drawn["trains"]])
    from_base = {"name_or_path": f"./models/{name}"} if drawn["trains"] == "new_tokens" else {"config": config_of(drawn)}
    recipe |= {
        "stage": "pretrain", "model": {**from_base, "attn_implementation": drawn["attn_implementation"]},
        "tokenizer": {"name_or_path": "./tokenizer", "pad_to_multiple_of": drawn["vocabulary"]},
        "data": {
            "max_length": drawn["length"], "packing": drawn["packing"], "datasets": [{"path": "short.jsonl" if drawn["packing"] else "long.jsonl"}],
            "validation": {"target": {"path": "held.jsonl"}},
        },
        "phases": [{"name": "phase", "trainable_parameters": trainable, "learning_rate": 1e-3, "max_steps": STEPS}],
    }  # fmt: skip
    if drawn["fused"]:
        training["fused_linear_cross_entropy"] = drawn["fused"]
    return Case(name, kind, drawn, recipe)


PLAIN: dict[str, Any] = {
    "trains": "all", "model_type": "llama", "precision": "float32", "activation_checkpointing": False, "layers": 6, "batch": 2, "length": 64,
    "vocabulary": 512, "tied": True, "kv_heads": 2, "packing": True, "attn_implementation": "sdpa", "fused": None, "accumulation": 1,
    "max_grad_norm": 1.0, "optim": "adamw_torch", "targets": "all-linear",
}  # fmt: skip


def list_sharded_cases(kind: str, processes: int) -> list[Case]:
    """Configurations of one backend with so many processes, none of them drawn."""
    changes: list[dict[str, Any]] = [{}, {"precision": "bf16_pure"}, {"length": 128, "batch": 4}]
    if kind == "fsdp2":
        changes = [{"trains": "lora", "precision": precision} for precision in ("float32", "bf16_mixed", "bf16_pure")]
    return [_case(kind, number, PLAIN | change, processes) for number, change in enumerate(changes)]


def config_of(drawn: dict[str, Any]) -> dict[str, Any]:
    """transformers' configuration of a case's model, without its vocabulary."""
    kind = drawn["model_type"]
    if kind == "gpt2":
        return {
            "model_type": "gpt2", "n_embd": 48, "n_layer": drawn["layers"], "n_head": 4, "n_positions": 256,
            "tie_word_embeddings": drawn["tied"],
        }  # fmt: skip
    return {
        "model_type": kind, "hidden_size": 48, "intermediate_size": 112, "num_hidden_layers": drawn["layers"], "num_attention_heads": 4,
        "num_key_value_heads": drawn["kv_heads"], "head_dim": 12, "max_position_embeddings": 256, "tie_word_embeddings": drawn["tied"],
    }  # fmt: skip


def fill(folder: Path, cases: list[Case]) -> None:
    """Text, tokenizers, the models that some recipes begin with, and the recipes."""
    import torch

    from azrecipe.modeling.loading import build_model, save_model
    from azrecipe.modeling.vocabulary_swap import pad_vocabulary
    from azrecipe.tokenization.bpe_training import train_llama3
    from azrecipe.tokenization.tokenizer import count_embedding_rows, save_tokenizer
    from tests.conftest import TALES, jsonl, write

    torch.set_num_threads(1)
    write(folder / "short.jsonl", jsonl(*({"text": f"{TALES[n % 4]} {n}"} for n in range(400))))
    write(folder / "long.jsonl", jsonl(*({"text": f"{n} " + "".join(TALES) * 30} for n in range(8))))
    write(folder / "held.jsonl", jsonl({"text": TALES[1]}))
    talk = [
        {"messages": [{"role": "user", "content": f"{n:04d}?"}, {"role": "assistant", "content": TALES[1] + TALES[3]}]} for n in range(500)
    ]
    short = [{"messages": [{"role": "user", "content": f"{n:04d}?"}, {"role": "assistant", "content": TALES[1][:20]}]} for n in range(500)]
    write(folder / "questions.jsonl", jsonl(*talk))
    write(folder / "short_questions.jsonl", jsonl(*short))
    tokenizer = train_llama3([tale * 20 for tale in TALES], TOKENS)
    smaller = train_llama3([tale * 20 for tale in TALES], TOKENS - 40)
    save_tokenizer(tokenizer, folder / "tokenizer")
    for case in cases:
        path = case.recipe["model"].get("name_or_path")
        if path:
            its = smaller if case.drawn["trains"] == "new_tokens" else tokenizer
            net = build_model(config_of(case.drawn), its, case.drawn["precision"], case.drawn["attn_implementation"], seed=1)
            pad_vocabulary(net, count_embedding_rows(its), 1 if its is smaller else case.drawn["vocabulary"])
            save_model(net, its, folder / path)
        if case.recipe["stage"] == "sft" and case.recipe["data"]["packing"]:
            case.recipe["data"]["datasets"][0]["path"] = "short_questions.jsonl"
        write(folder / f"{case.name}.yaml", json.dumps(case.recipe))


class Measured(Exception):
    """The steps have been seen; the run need not go on."""


def held() -> int:
    """Bytes of all tensors that are there."""
    import torch

    storages = [
        each.untyped_storage()
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.device.type == "cpu"
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def allocated(profile: Any) -> tuple[int, int]:
    """Bytes beyond those at its beginning that a profiled step had at most, and at its end, by the allocator's reports.

    Checkpointing keeps the state of the CPU's generator for each layer: in the host's memory, wherever the model is, and so not counted.
    """
    import torch

    state = torch.get_rng_state().nbytes
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]" and abs(event.nbytes()) != state]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, now


def formulas() -> dict[Any, Any]:
    """Of operators that PyTorch's counter does not know or cannot look into, as PyTorch's chunked loss is: logits, and its gradients."""
    import torch
    import torch.nn.modules.linear_cross_entropy  # it makes the operators

    from azrecipe.planning.simulation.memory_tracker import EXTRA_FLOP_FORMULAS

    def loss(x: Any, weight: Any, *_: Any, out_shape: Any = None) -> int:
        return int(2 * x[0] * x[1] * weight[0])

    def loss_and_gradients(x: Any, weight: Any, *more: Any, out_shape: Any = None) -> int:
        return loss(x, weight) * (1 + sum(more[-3:-1]))

    own = torch.ops.torch_nn
    return {
        **EXTRA_FLOP_FORMULAS,
        own._linear_cross_entropy_batch_chunked: loss_and_gradients,
        own._linear_cross_entropy_batch_chunked_no_reduction: loss,
    }


def probe() -> Any:
    """A callback that measures the bytes of the second step and the operations of the last one, and then ends the run.

    The profiler sees one thread. Where gloo's let go of a tensor last, it seems to stay (`left`): such a step is measured again.
    """
    from torch.profiler import ProfilerActivity, profile
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import TrainerCallback

    class Probe(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.found: dict[str, Any] = {}
            self.profile: Any = None
            self.shapes: list[list[int]] = []

        def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
            model.register_forward_pre_hook(lambda _, __, given: self.shapes.append(list(given["input_ids"].shape)), with_kwargs=True)

        def on_step_begin(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if state.global_step + 1 == STEPS:
                self.counter = FlopCounterMode(display=False, custom_mapping=formulas())
                self.counter.__enter__()
            if state.global_step and abs(self.found.get("left", LITTLE)) >= LITTLE:
                gc.collect()
                self.held = held()
                self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self.profile.__enter__()

        def on_step_end(self, _args: Any, state: Any, _control: Any, **_: Any) -> None:
            if self.profile is not None:
                self.profile.__exit__(None, None, None)
                peak, left = allocated(self.profile)
                if not self.found or abs(left) < abs(self.found["left"]):
                    self.found = {"shape": self.shapes[-1], "peak": self.held + peak, "left": left}
                self.profile = None
            if state.global_step == STEPS:
                self.counter.__exit__(None, None, None)
                self.found["flops"] = self.counter.get_total_flops()
                raise Measured

    return Probe()


@contextlib.contextmanager
def watched(callback: Any) -> Iterator[None]:
    """Within it every Trainer has this callback, before its own."""
    from transformers import trainer

    trainer.DEFAULT_CALLBACKS.append(callback)
    try:
        yield
    finally:
        trainer.DEFAULT_CALLBACKS.remove(callback)


def measure(case: Case, folder: Path, backend: Any) -> dict[str, Any]:
    """A real step of a case's recipe on this backend: shape [batch, length], peak and what was left (bytes), flops."""
    from accelerate.state import AcceleratorState, GradientState

    from azrecipe.recipe.load import load_recipe

    recipe = load_recipe(folder / f"{case.name}.yaml")
    stage = importlib.import_module(f"azrecipe.stages.{recipe.stage}")
    AcceleratorState._reset_state()  # a run is a process of its own, and here many come after each other
    GradientState._reset_state()
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    seen = probe()
    with watched(seen), contextlib.suppress(Measured):
        stage.run(recipe, folder / "runs", backend)
    gc.collect()
    return dict(seen.found)


def main(folder: Path, seed: int | None) -> None:
    """Measure each case of this process' backend; without a seed those of list_sharded_cases."""
    from azrecipe.distributed import backend as backends
    from azrecipe.pipeline.worker import _silence_libraries

    backend = backends.set_up_backend()
    _silence_libraries()
    import torch

    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # what was imported need not be looked through again and again
    cases = list_sharded_cases(backend.strategy, backend.world_size) if seed is None else draw(seed)
    found = {case.name: measure(case, folder, backend) for case in cases if case.kind == backend.strategy}
    (folder / f"measured-{backend.strategy}-{backend.rank}.json").write_text(json.dumps(found))
    if backend.world_size > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else None)
