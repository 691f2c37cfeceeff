"""The recipes that ship: every one resolves, holds the published settings, and fits the real models' shapes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from azrecipe.distributed.batch_size import split_batch
from azrecipe.modeling import parameter_groups
from azrecipe.modeling.loading import count_parameters
from azrecipe.modeling.lora import build_lora_config
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.pipeline_steps import load_pipeline, open_recipe
from azrecipe.recipe.validate import validate_recipes
from tests.conftest import ROOT

RECIPES = ROOT / "recipes"
PIPELINES = sorted(RECIPES.rglob("pipeline.yaml"))
# config.json of the two models as Meta publishes them; the hub is out of a test's reach.
LLAMA_32_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
LLAMA_31_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SHAPES = {"meta-llama/Llama-3.2-1B": (LLAMA_32_1B, 1_235_814_400), "meta-llama/Llama-3.1-8B": (LLAMA_31_8B, 8_030_261_248)}


def shape(name: str, **changes: Any) -> Any:
    """The model of a hub id on the meta device: its shapes without its weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**{**SHAPES[name][0], **changes}))


def test_every_recipe_in_the_tree_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    report = validate_recipes([Path("recipes")])
    assert report.problems == []
    assert len(report.valid) + len(report.fragments) == len(list(RECIPES.rglob("*.yaml")))


def test_the_published_continued_pretraining() -> None:
    one, two = (load_recipe(RECIPES / f"cpt_phase{n}.yaml").config for n in (1, 2))
    assert [(p.trainable_parameters, p.learning_rate, p.max_steps) for p in one.phases] == [(["embeddings"], 3.2e-3, 5_000)]
    assert [(p.trainable_parameters, p.learning_rate, p.max_steps) for p in two.phases] == [(["all"], 2.4e-3, 15_000)]
    for config in (one, two):
        training = config.training
        assert (training.global_batch_size, config.data.max_length, training.lr_scheduler_type) == (224, 2048, "cosine")
        assert (training.precision, training.use_liger_kernel) == ("bf16_mixed", True)
        assert split_batch(training.global_batch_size, training.per_device_train_batch_size, world_size=16) == split_batch(14, 14, 1)
        assert config.model.attn_implementation == "auto"  # 14 fit an A100 of 40 GB without masks only
    both = load_recipe(RECIPES / "cpt.yaml").config
    assert [(p.learning_rate, p.max_steps) for p in both.phases] == [(3.2e-3, 5_000), (2.4e-3, 15_000)]
    assert one.data.datasets == two.data.datasets  # or the second could not go on where the first ended
    assert two.data.continue_from is not None


def test_the_annealed_recipe_is_the_published_one_with_a_last_tenth_of_its_own() -> None:
    annealed, both = (load_recipe(RECIPES / f"{name}.yaml").config for name in ("annealed", "cpt"))
    assert [replace(source, id=None) for source in annealed.data.datasets] == both.data.datasets
    embeddings, full, anneal = annealed.phases
    assert embeddings == both.phases[0]
    assert full.max_steps + anneal.max_steps == both.phases[1].max_steps == 10 * anneal.max_steps
    assert full.learning_rate == anneal.learning_rate == both.phases[1].learning_rate
    assert (anneal.lr_scheduler_type, anneal.decay_ratio, anneal.warmup_ratio) == ("warmup_stable_decay", 1, 0)
    assert annealed.list_weights(full) == both.list_weights(both.phases[1]) == [0.80, 0.05, 0.15]
    assert annealed.list_weights(anneal) == [0.45, 0.40, 0.15]


def test_the_published_tokenizer_and_instruction_tuning() -> None:
    tokenizer = load_recipe(RECIPES / "tokenizer.yaml").config
    assert tokenizer.candidates[tokenizer.select].vocab_size == 100_000
    assert min(c.vocab_size for c in tokenizer.candidates.values() if c.vocab_size) == 50_000
    sft = load_recipe(RECIPES / "sft.yaml").config
    assert (sft.lora.r, sft.lora.lora_alpha, sft.lora.lora_dropout) == (64, 28, 0.05)
    assert sft.lora.target_modules == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert (sft.data.max_length, sft.training.learning_rate, sft.chat_template) == (1024, 1e-4, "llama3")
    assert sft.training.assistant_only_loss


def test_the_data_are_fineweb_wikipedia_and_a_replay_of_english() -> None:
    data = load_recipe(RECIPES / "cpt_phase1.yaml").config.data
    assert [(d.path, d.name) for d in data.datasets] == [
        ("HuggingFaceFW/fineweb-2", "azj_Latn"),
        ("wikimedia/wikipedia", "20231101.az"),
        ("HuggingFaceFW/fineweb-edu", "sample-10BT"),
    ]
    assert sum(d.weight for d in data.datasets) == pytest.approx(1)
    assert list(data.validation) == ["target", "english"]


@pytest.mark.parametrize(
    ("code", "language", "wikipedia"), [("kaz", "kaz_Cyrl", "kk"), ("uzb", "uzn_Latn", "uz"), ("kat", "kat_Geor", "ka")]
)
def test_another_language_is_a_few_lines_that_reach_every_step(code: str, language: str, wikipedia: str) -> None:
    file = RECIPES / "languages" / code / "pipeline.yaml"
    own = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    assert len(own) <= 10
    pipeline, steps = load_pipeline(file)
    by_name = {step.recipe.name: step.recipe for step in steps}
    for name in ("tokenizer", "cpt_phase1", "cpt_phase2"):
        datasets = by_name[name].config.data.datasets
        assert [d.name for d in datasets[:2]] == [language, f"20231101.{wikipedia}"]
    for recipe in by_name.values():
        assert recipe.project == pipeline.project == f"{code}-llama32-1b"
    assert by_name["evaluate"].config.data.validation["target"].name == language
    parallel = by_name["tokenizer"].config.data.parallel
    assert parallel.text_column == f"translation.{wikipedia}"
    assert wikipedia in parallel.name.split("-")
    assert by_name["tokenizer"].config.show_words != load_recipe(RECIPES / "tokenizer.yaml").config.show_words
    assert by_name["evaluate"].config.prompts[0] != load_recipe(RECIPES / "evaluate.yaml").config.prompts[0]
    assert Path(by_name["sft"].config.data.datasets[0].path).resolve() == file.with_name("questions.jsonl")
    assert by_name["cpt_phase1"].config.phases == load_recipe(RECIPES / "cpt_phase1.yaml").config.phases


@pytest.mark.parametrize("file", [RECIPES / "pipeline.yaml", RECIPES / "llama31_8b" / "pipeline.yaml"], ids=["1b", "8b"])
def test_phases_and_adapters_fit_the_real_models(file: Path) -> None:
    _, steps = load_pipeline(file)
    by_name = {step.recipe.name: step.recipe.config for step in steps}
    name = by_name["cpt_phase1"].model.name_or_path
    assert name == by_name["tokenizer"].tokenizer.name_or_path == by_name["evaluate"].models["base"].name_or_path
    model = shape(name)
    assert count_parameters(model) == SHAPES[name][1]
    vocabulary = by_name["tokenizer"].candidates[by_name["tokenizer"].select].vocab_size
    adapted = shape(name, vocab_size=vocabulary)
    matrices = 1 if SHAPES[name][0]["tie_word_embeddings"] else 2
    first = parameter_groups.set_trainable_parameters(adapted, by_name["cpt_phase1"].phases[0].trainable_parameters)
    assert first.trainable == matrices * vocabulary * SHAPES[name][0]["hidden_size"]
    assert parameter_groups.set_trainable_parameters(
        adapted, by_name["cpt_phase2"].phases[0].trainable_parameters
    ).trainable == count_parameters(adapted)
    assert set(build_lora_config(by_name["sft"].lora, adapted).target_modules) == set(by_name["sft"].lora.target_modules)


@pytest.mark.parametrize("file", PIPELINES, ids=[str(f.relative_to(RECIPES)) for f in PIPELINES])
def test_a_step_of_a_pipeline_can_be_opened_by_itself(file: Path) -> None:
    pipeline, steps = load_pipeline(file)
    for step in steps:
        alone, none = open_recipe(file, (), step.key)
        assert none == []
        assert alone.data == step.recipe.data
        assert alone.project == pipeline.project


def test_the_quickstart_text_is_what_the_readme_says() -> None:
    import json
    import unicodedata

    data = RECIPES / "quickstart" / "data"
    for language, least in (("azerbaijani", 40_000), ("english", 40_000)):
        training, held_out = (sorted((data / language / side).glob("*.txt")) for side in ("train", "heldout"))
        assert sum(f.stat().st_size for f in training) >= least
        sentences = [
            {s.strip() for f in files for s in f.read_text("utf-8").replace("\n", " ").split(".") if len(s) > 30}
            for files in (training, held_out)
        ]
        assert not sentences[0] & sentences[1]
        genres = {f.stem.split("_")[0] for f in training}
        assert genres >= {"news", "recipe", "tale", "letter", "history", "science", "dialogue"}
    questions = [json.loads(line) for line in (data / "questions.jsonl").read_text("utf-8").splitlines()]
    assert len({q["messages"][0]["content"] for q in questions}) == len(questions) >= 150
    for file in data.rglob("*.*"):
        text = file.read_text("utf-8")
        assert text == unicodedata.normalize("NFC", text)


def test_eeve_s_phases_fit_the_model_that_they_are_for() -> None:
    _, steps = load_pipeline(RECIPES / "eeve" / "pipeline.yaml")
    tokenizer, pretrain = (step.recipe.config for step in steps)
    name, width = pretrain.model.name_or_path, 4096
    assert name == tokenizer.tokenizer.name_or_path == "meta-llama/Llama-3.1-8B"
    assert pretrain.tokenizer.candidate == tokenizer.select
    new = range(128_256, 128_256 + tokenizer.candidates[tokenizer.select].new_tokens)
    model = shape(name, vocab_size=new.stop)
    trained = [parameter_groups.set_trainable_parameters(model, phase.trainable_parameters, new).trainable for phase in pretrain.phases]
    rows, matrix = len(new) * width, new.stop * width
    layers = count_parameters(model) - 2 * matrix - width  # the norm after the last layer is in none
    assert trained == [rows, rows, 2 * rows, matrix, rows + matrix, count_parameters(model), layers]


def test_the_8b_takes_no_learning_rate_of_the_1b() -> None:
    _, steps = load_pipeline(RECIPES / "llama31_8b" / "pipeline.yaml")
    rates = {step.recipe.name: step.recipe.config.phases[0].learning_rate for step in steps if step.recipe.stage == "pretrain"}
    assert rates == {"cpt_phase1": 1e-3, "cpt_phase2": 1e-4}


def test_the_replay_study_s_shares() -> None:
    _, steps = load_pipeline(RECIPES / "replay_study.yaml")
    shares = {}
    for step in steps:
        if step.recipe.stage == "pretrain" and step.recipe.cell is not None:
            sources = step.recipe.config.data.datasets
            assert sources[0].name == "azj_Latn"
            shares[step.recipe.cell.name] = [source.weight / sum(each.weight for each in sources) for source in sources[1:]]
    assert shares == {"english_0": [], "english_8": [0.08], "english_25": [0.25], "english_75": [0.75], "english_17_maths_8": [0.17, 0.08]}


def test_two_by_two_trains_four_layers_and_the_tokens() -> None:
    _, steps = load_pipeline(RECIPES / "two_by_two" / "pipeline.yaml")
    tokenizer, pretrain = (step.recipe.config for step in steps)
    vocabulary = 128_256 + tokenizer.candidates[pretrain.tokenizer.candidate].new_tokens
    model = shape(pretrain.model.name_or_path, vocab_size=vocabulary)
    trained = parameter_groups.set_trainable_parameters(model, pretrain.phases[0].trainable_parameters).trainable
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    assert trained == vocabulary * 2048 + 4 * layer
