"""Instruction tuning in whole small runs: adapters, all weights, packing, sources by weight, preferences, templates that add tokens."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import jsonl, write
from tests.small import Project, assert_same_weights, weights

pytestmark = pytest.mark.slow
LENGTH = 96


@pytest.fixture
def tuned(small: Project, finished: Project) -> Project:
    """A project whose adapted model is there to be tuned."""
    shutil.copytree(finished.path("cpt"), small.path("cpt"))
    return small


def opened(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def recipe(project: Project, name: str, text: str) -> None:
    write(project.folder / f"{name}.yaml", f"stage: sft\nextends: sft.yaml\n{text}")


def test_all_weights_train_without_an_adapter(tuned: Project) -> None:
    recipe(tuned, "whole", "adapter: none\nlora: null\ntraining: {learning_rate: 1e-3}\n")
    tuned.run("whole")
    before, after = weights(tuned.path("cpt") / "final"), weights(tuned.path("whole") / "final")
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert not (tuned.path("whole") / "adapter").exists()
    loss = tuned.result("whole")["held_out_loss"]
    assert loss["after"] < loss["before"]
    model, tokenizer = opened(tuned.path("whole") / "final")
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id


def test_parts_learn_at_their_own_rates(tuned: Project) -> None:
    still = "adapter: none\nlora: null\ntraining: {learning_rate: 1e-3, learning_rates: {embeddings: 1e-30, 'layers[0]': 1e-30}}\n"
    recipe(tuned, "rates", still)
    tuned.run("rates")
    before, after = weights(tuned.path("cpt") / "final"), weights(tuned.path("rates") / "final")
    for name in before:
        same = torch.equal(before[name], after[name])
        assert same == ("embed_tokens" in name or "layers.0." in name), name
    recipe(tuned, "nothing", "training: {learning_rates: {embeddings: 1e-5}}\n")
    printed = tuned.run("nothing", code=2)
    assert "learning_rates: embeddings matches no parameter that trains" in printed


def test_packed_conversations_see_only_themselves(tuned: Project) -> None:
    recipe(tuned, "packed", "data: {packing: true}\ntraining: {max_steps: null, num_train_epochs: 3, learning_rate: 1e-2}\n")
    printed = tuned.run("packed")
    result = tuned.result("packed")
    assert result["training"]["sequences"] < result["data"]["train"] * 3
    assert f"in {result['training']['sequences']:,} sequences" in printed
    assert result["held_out_loss"]["after"] < result["held_out_loss"]["before"]

    from azrecipe.data.finetuning_examples import join_examples
    from azrecipe.data.packing import Collator
    from azrecipe.tokenization.chat_templates import TokenizedExample

    model, tokenizer = opened(tuned.path("cpt") / "final")
    model.config.use_cache = False
    parts = [tokenizer(text)["input_ids"] for text in ("Ev 3?", "Bəli, 3 ev var.", "Cavab 8 edir.")]
    row = {key: torch.tensor(value) for key, value in join_examples([TokenizedExample(ids, list(ids)) for ids in parts]).items()}
    assert [int(label) for label in row["labels"]] == [token if n else -100 for ids in parts for n, token in enumerate(ids)]
    longer = {key: torch.cat([value, value]) for key, value in row.items()}
    batch = Collator(tokenizer.pad_token_id)([row, longer])
    logits = model(**batch).logits
    at = 0
    for ids in parts:
        alone = model(torch.tensor([ids])).logits[0]
        assert torch.allclose(logits[0, at : at + len(ids)], alone, atol=1e-5)
        at += len(ids)


@pytest.mark.parametrize("more", ["", "{use_dora: true, use_rslora: true, target_modules: ['.*layers\\.[01]\\..*proj']}"])
def test_tokens_that_the_template_adds_are_trained_and_end_the_turn(tuned: Project, more: str) -> None:
    recipe(tuned, "chatml", f"chat_template: chatml\n{f'lora: {more}' if more else ''}\n")
    printed = tuned.run("chatml")
    assert "new tokens: <|im_start|>, <|im_end|>" in printed
    model, tokenizer = opened(tuned.path("chatml") / "final")
    ids = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [tokenizer(token, add_special_tokens=False)["input_ids"] for token in ("<|im_start|>", "<|im_end|>")] == [[i] for i in ids]
    assert model.generation_config.eos_token_id[0] == ids[1] != tokenizer.pad_token_id
    rows, old = model.get_input_embeddings().weight, weights(tuned.path("cpt") / "final")["model.embed_tokens.weight"]
    assert torch.equal(rows[: len(old)], old)
    mean = old.float().mean(0)
    assert all(not torch.allclose(rows[i], mean, atol=1e-4) for i in ids)
    assert torch.equal(model.lm_head.weight, rows)  # tied, and still so

    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tuned.path("cpt") / "final")
    base.resize_token_embeddings(len(rows), mean_resizing=False)
    base.get_input_embeddings().weight.data[len(old) :] = mean
    adapted = PeftModel.from_pretrained(base, tuned.path("chatml") / "adapter")
    given = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Ev 3?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert torch.allclose(adapted(**given).logits, model(**given).logits, atol=1e-4)


def test_new_tokens_that_do_not_train_are_warned_of(tuned: Project) -> None:
    recipe(tuned, "still", "chat_template: chatml\nlora: {train_new_tokens: false}\ntraining: {max_steps: 2}\n")
    printed = tuned.run("still")
    assert "warning: the rows of <|im_start|>, <|im_end|> are untrained, and lora.train_new_tokens is false" in printed


def test_sources_are_read_by_weight_and_every_format_is_recognised(tuned: Project) -> None:
    n = range(20)
    write(
        tuned.folder / "shared.jsonl",
        jsonl(*({"conversations": [{"from": "human", "value": f"Su {i}?"}, {"from": "gpt", "value": "Bəli."}]} for i in n)),
    )
    write(tuned.folder / "alpaca.jsonl", jsonl(*({"instruction": f"Say {i}", "input": "", "output": f"{i}", "system": "Qısa."} for i in n)))
    write(tuned.folder / "completions.jsonl", jsonl(*({"prompt": f"Daş {i}?", "completion": "Var."} for i in n)))
    recipe(
        tuned,
        "mixed",
        "data: {datasets: [{path: shared.jsonl, weight: 3}, {path: alpaca.jsonl, weight: 1}, {path: completions.jsonl, weight: 1}]}\ntraining: {max_steps: 30}\n",
    )
    tuned.run("mixed")
    read = tuned.result("mixed")["training"]["sources"]
    shares = [source["bytes"] / sum(each["bytes"] for each in read) for source in read]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    assert read[0]["epochs"] > 2.5 > read[1]["epochs"]


PAIRS = [{"prompt": f"Ev {n}?", "chosen": f"Bəli, {n} ev var.", "rejected": f"Ev {n} ev {n} ev."} for n in range(30)]


@pytest.mark.parametrize("adapter", ["lora", "none"])
def test_preferences_are_learnt_by_dpo(tuned: Project, adapter: str) -> None:
    write(tuned.folder / "pairs.jsonl", jsonl(*PAIRS, {"prompt": "Ev?", "chosen": "Bəli. " * 60, "rejected": "Yox."}, PAIRS[0]))
    rate = "1e-2" if adapter == "lora" else "1e-3"
    text = f"method: dpo\nadapter: {adapter}\ndata: {{datasets: [{{path: pairs.jsonl}}]}}\ntraining: {{learning_rate: {rate}, save_steps: 5}}\n"
    recipe(tuned, "dpo", text + ("lora: null\n" if adapter == "none" else ""))
    tuned.run("dpo")
    result = tuned.result("dpo")
    assert (result["data"]["dropped"], result["data"]["duplicates"]) == (1, 1)
    assert result["held_out_margin"]["after"] > result["held_out_margin"]["before"] + 1
    assert tuned.losses("dpo")[0] == pytest.approx(0.6931, abs=1e-3)
    assert tuned.losses("dpo")[-1] < 0.5
    lines = [json.loads(line) for line in (tuned.path("dpo") / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("rewards/accuracies") is not None for line in lines)
    opened(tuned.path("dpo") / "final")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator here: these runs are for the CPU")
@pytest.mark.parametrize(
    "config, what",
    [
        ("fsdp", "data: {packing: true}"),
        pytest.param("zero3", "method: dpo\ndata: {datasets: [{path: pairs.jsonl}]}", marks=pytest.mark.long),
    ],
)
def test_sharded_tuning_gives_the_weights_of_one_process(tuned: Project, config: str, what: str) -> None:
    if config == "zero3":
        pytest.importorskip("deepspeed")
    write(tuned.folder / "pairs.jsonl", jsonl(*PAIRS))
    recipe(tuned, "shared", f"{what}\nlora: {{lora_dropout: 0.0}}\ntraining: {{max_steps: 5, learning_rate: 2e-3}}\n")
    shutil.copytree(tuned.path("cpt"), tuned.path("cpt", "one"))
    tuned.run("shared", runs="one")
    tuned.run("shared", "--accelerate-config", config, "--num-processes", "2")
    left, right = weights(tuned.path("shared", "one") / "final"), weights(tuned.path("shared") / "final")
    assert left.keys() == right.keys()
    assert max(float((left[name] - right[name]).abs().max()) for name in left) < 5e-5


def test_a_killed_dpo_goes_on_exactly(tuned: Project) -> None:
    import signal

    from tests.fault.test_kills import step

    write(tuned.folder / "pairs.jsonl", jsonl(*PAIRS))
    recipe(tuned, "dpo", "method: dpo\ndata: {datasets: [{path: pairs.jsonl}]}\n")
    assert tuned.interrupt("dpo", lambda run: step(run) >= 5, signal.SIGKILL) == -signal.SIGKILL
    assert "going on from" in tuned.run("dpo")
    first = tuned.path("dpo").rename(tuned.folder / "first")
    tuned.run("dpo")
    assert_same_weights(first / "final", tuned.path("dpo") / "final")


def test_a_base_in_four_bits_is_tuned_on_cpu_too(tuned: Project) -> None:
    pytest.importorskip("bitsandbytes", reason="adapter: qlora needs bitsandbytes (azrecipe[qlora])")
    recipe(tuned, "qlora", "adapter: qlora\n")
    tuned.run("qlora")
    loss = tuned.result("qlora")["held_out_loss"]
    assert loss["after"] < loss["before"]
    opened(tuned.path("qlora") / "final")


def test_the_adapter_is_merged_in_float32_and_rounded_once(tuned: Project) -> None:
    recipe(tuned, "half", "training: {precision: bf16_pure, max_steps: 6}\n")
    tuned.run("half")
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tuned.path("cpt") / "final", dtype=torch.float32)
    exact = PeftModel.from_pretrained(base, tuned.path("half") / "adapter").merge_and_unload().state_dict()
    for name, value in weights(tuned.path("half") / "final").items():
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, exact[name].to(torch.bfloat16)), name

    from azrecipe.modeling import lora
    from azrecipe.recipe.types import Model

    saved = AutoModelForCausalLM.from_pretrained(tuned.path("half") / "final", dtype=torch.bfloat16)
    path, (_, tokenizer) = str(tuned.path("cpt") / "final"), opened(tuned.path("half") / "final")
    live = lora.merge_adapter(lora.BaseModel(path, Model(path), tokenizer), tuned.path("half") / "adapter", "bf16_pure")
    ids = torch.arange(1, 90)[None]
    assert torch.equal(live(ids).logits, saved(ids).logits)  # buffers as in a model that is opened


def test_check_shows_an_example_with_what_the_loss_covers(tuned: Project) -> None:
    from tests.small import called

    done = called([*tuned.command("sft")[:3], "check", "sft.yaml"], tuned.folder)
    assert done.code == 0, done.text
    printed = done.out
    assert "33 rows to train on, 9 held out" in printed
    assert "a turn ends with <|eot_id|>, padding is <|finetune_right_pad_id|>" in printed
    assert printed.replace("·", "").split("⟦")[1].split("⟧")[0].endswith("edir.<|eot_id|>")
    write(tuned.folder / "questions.jsonl", jsonl({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]}))
    done = called([*tuned.command("sft")[:3], "check", "sft.yaml"], tuned.folder)
    assert done.code == 2
    assert "questions.jsonl:1:1: message 2 (assistant) is empty" in done.err


def test_noise_on_the_embeddings_is_there_while_training_and_not_after(tuned: Project) -> None:
    recipe(tuned, "plain", "training: {max_steps: 2}\n")
    recipe(tuned, "noisy", "training: {max_steps: 2, neftune_noise_alpha: 15}\n")
    for name in ("plain", "noisy"):
        tuned.run(name)
    assert tuned.losses("noisy")[0] != pytest.approx(tuned.losses("plain")[0], abs=1e-4)
    before = [tuned.result(name)["held_out_loss"]["before"] for name in ("plain", "noisy")]
    assert before[0] == before[1]
    model, _ = opened(tuned.path("noisy") / "final")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(ids).logits, model(ids).logits)
