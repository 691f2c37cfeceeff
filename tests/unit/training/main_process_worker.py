"""Two processes (torchrun, FSDP 2, gloo) load a model in both of them and in the main one only; rank 0 prints what each of them has.

python -m torch.distributed.run --nproc-per-node 2 main_process_worker.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist
from accelerate import PartialState
from transformers import AutoModelForCausalLM

from azrecipe.distributed.local_storage import all_gather_object
from azrecipe.errors import CommandError
from azrecipe.training import main_process_loading
from azrecipe.training.trainer import gather_state_dict
from tests.unit.training.fsdp_worker import set_up_fsdp
from tests.unit.training.small_trainer import VOCABULARY, build_model, build_rows, build_trainer

BACKEND = set_up_fsdp()
LARGE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}  # 4 bytes x 15 million


def change(model: Any) -> int:
    """Grow the vocabulary, with rows that only whoever has the weights can compute."""
    mean = model.get_input_embeddings().weight.detach().mean(0)
    model.resize_token_embeddings(VOCABULARY + 5, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            module.weight[VOCABULARY:] = mean
    return int(model.get_input_embeddings().weight.shape[0])


def compute_loss(model: Any) -> float:
    ids = torch.stack([row["input_ids"] for row in build_rows(2)])
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids, use_cache=False).loss)


def train(folder: Path, model: Any, send: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    trainer = build_trainer(folder, build_rows(12), model=model, use_cpu=False, per_device_train_batch_size=1, max_steps=3)
    if send:
        main_process_loading.send_weights_when_sharded(trainer, BACKEND)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    state = gather_state_dict(trainer, BACKEND)
    assert state is not None
    trainer.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading = False
    return losses, {name: value.clone() for name, value in state.items()}


def compare(folder: Path, tied: bool, frozen: bool) -> dict[str, Any]:
    """Load, change, measure and train in both ways."""
    source = folder / f"{tied}"
    if BACKEND.main:
        build_model(tied=tied, num_hidden_layers=2).save_pretrained(source)
    dist.barrier()

    def load() -> Any:
        model = AutoModelForCausalLM.from_pretrained(source)
        model.model.layers.requires_grad_(not frozen)
        return model

    whole = load()
    rows = change(whole)
    one = main_process_loading.load_on_main(load, BACKEND)
    one, shared_rows = main_process_loading.change_on_main(change, one, BACKEND)
    one.model.layers.requires_grad_(not frozen)
    losses = compute_loss(whole), compute_loss(main_process_loading.shard_copy(one, BACKEND))
    answers = {"rows": rows == shared_rows == one.get_input_embeddings().weight.shape[0], "measured": losses[0] == losses[1]}
    left, right = train(folder, whole, False), train(folder, one, True)
    answers["losses"] = left[0] == right[0] and len(left[0]) == 3
    answers["weights"] = left[1].keys() == right[1].keys() and all(torch.equal(left[1][name], right[1][name]) for name in left[1])
    return answers


def measure_memory(folder: Path) -> int:
    """The bytes that a process' own memory grew by as a model was loaded."""
    if BACKEND.main:
        build_model(**LARGE).save_pretrained(folder / "large")
    dist.barrier()
    before = psutil.Process().memory_full_info().uss
    model = main_process_loading.load_on_main(lambda: AutoModelForCausalLM.from_pretrained(folder / "large").float(), BACKEND)
    if BACKEND.main:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # no longer pages of the file
    grown: int = psutil.Process().memory_full_info().uss - before
    return grown


def fail_to_load() -> Any:
    raise CommandError("weights that are NaN")


def main(folder: Path) -> None:
    PartialState()
    answers: dict[str, Any] = {"memory": measure_memory(folder)}
    for tied, frozen in ((True, False), (False, True)):
        answers[f"tied {tied}, frozen {frozen}"] = compare(folder, tied, frozen)
    try:
        main_process_loading.load_on_main(fail_to_load, BACKEND)
    except CommandError as error:
        answers["error"] = str(error)
    gathered = all_gather_object(answers)
    if BACKEND.main:
        print(json.dumps(gathered))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
