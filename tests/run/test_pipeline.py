"""The whole job, as `azrecipe run pipeline.yaml` leaves it."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch

from azrecipe.tokenization.chat_templates import SHIPPED_TEMPLATES
from tests.conftest import write
from tests.small import Project, weights


def test_every_stage_leaves_what_the_design_promises(finished: Project) -> None:
    for recipe in ("base", "tokenizer", "cpt", "sft", "evaluate"):
        run = finished.path(recipe)
        assert finished.status(recipe)["state"] == "complete"
        assert {"recipe.yaml", "environment.json", "status.json", "result.json"} <= {p.name for p in run.iterdir()}
        environment = json.loads((run / "environment.json").read_text())
        assert environment["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert (finished.path("cpt") / "phases" / "embeddings" / "model.safetensors").exists()
    assert (finished.path("sft") / "adapter" / "adapter_model.safetensors").exists()


def test_the_pipeline_ends_with_one_table(finished: Project) -> None:
    printed = (finished.folder / "printed.txt").read_text()
    assert "The small job." in printed
    for row in ("base", "adapted", "assistant"):
        assert f"│ {row}" in printed
    evaluated = finished.result("evaluate")["models"]
    assert f"{evaluated['adapted']['bpb']['target']['value']:.3f}" in printed


def test_bpb_on_the_target_language_falls_with_training(finished: Project) -> None:
    bpb = finished.result("cpt")["bpb"]
    assert list(bpb) == ["base", "new_vocabulary", "embeddings", "full"]
    assert bpb["base"]["target"] > bpb["embeddings"]["target"] > bpb["full"]["target"]
    models = finished.result("evaluate")["models"]
    assert models["base"]["bpb"]["target"]["value"] > models["adapted"]["bpb"]["target"]["value"]
    assert set(models["base"]) >= {"bpb", "fertility", "samples"}


def test_the_final_models_are_plain_hugging_face_models(finished: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for recipe in ("base", "cpt", "sft"):
        model = AutoModelForCausalLM.from_pretrained(finished.path(recipe) / "final")
        tokenizer = AutoTokenizer.from_pretrained(finished.path(recipe) / "final")
        assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().weight.shape[0]
        assert model.config.use_cache is True
        assert model.dtype == torch.float32


def test_the_embeddings_phase_leaves_the_backbone_as_it_was(finished: Project) -> None:
    base, phase1, full = (weights(finished.path(r) / f) for r, f in (("base", "final"), ("cpt", "phases/embeddings"), ("cpt", "final")))
    backbone = [key for key in base if "embed_tokens" not in key]
    assert backbone
    for key in backbone:
        assert torch.equal(base[key], phase1[key])
        assert not torch.equal(phase1[key], full[key])
    assert finished.result("cpt")["phases"]["embeddings"]["trainable_parameters"] == 400 * 32


def test_the_tokenizer_is_trained_by_the_bases_rules(finished: Project) -> None:
    from transformers import AutoTokenizer

    base, custom = (AutoTokenizer.from_pretrained(finished.path(r) / "final") for r in ("base", "tokenizer"))
    for part in ("pre_tokenizer", "normalizer", "decoder"):
        old, new = (json.loads(t.backend_tokenizer.to_str())[part] for t in (base, custom))
        assert old == new
    assert base.all_special_tokens == custom.all_special_tokens
    assert {t.content for t in base.added_tokens_decoder.values()} == {t.content for t in custom.added_tokens_decoder.values()}
    for text in ("Kənddə İlham ağaclara su verərdi.\n\n  123 Ə", "😀 ქართული қазақ"):
        assert custom.decode(custom(text, add_special_tokens=False)["input_ids"]) == text
    assert custom("a")["input_ids"][0] == custom.bos_token_id
    found = {c["name"]: c for c in finished.result("tokenizer")["candidates"]}
    assert found["custom"]["fertility"]["target"]["value"] < found["baseline"]["fertility"]["target"]["value"]
    assert finished.result("tokenizer")["selected"] == "custom"


def test_an_extension_keeps_every_old_token_and_cuts_protected_text_as_before(small: Project) -> None:
    from transformers import AutoTokenizer

    candidates = "{baseline: {kind: baseline}, more: {kind: extension, new_tokens: 60, protect: {path: ./english.jsonl}}}"
    base = f"./{small.path('base').relative_to(small.folder)}/final"
    small.run("tokenizer", "--set", "project=other", "--set", f"tokenizer.name_or_path={base}", "--set", "select=more", "--set", f"candidates={candidates}",
              "--set", "candidates.custom=null")  # fmt: skip
    run = small.folder / "runs" / "other" / "tokenizer"
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (small.path("base") / "final", run / "final"))
    assert {token: i for token, i in new.get_vocab().items() if i < len(old)} == old.get_vocab()
    for line in (small.folder / "english.jsonl").read_text().splitlines():
        assert new(json.loads(line)["text"])["input_ids"] == old(json.loads(line)["text"])["input_ids"]
    found = {c["name"]: c for c in json.loads((run / "result.json").read_text())["candidates"]}
    assert found["more"]["added"] == 60 == len(new) - len(old)
    assert found["more"]["fertility"]["target"]["value"] < found["baseline"]["fertility"]["target"]["value"]


def test_metrics_have_a_line_for_every_step_with_cumulative_counts(finished: Project) -> None:
    lines = [json.loads(line) for line in (finished.path("cpt") / "metrics.jsonl").read_text().splitlines()]
    steps = [(line["phase"], line["step"]) for line in lines]
    assert steps == [("embeddings", n) for n in range(1, 9)] + [("full", n) for n in range(1, 17)]
    assert [line["tokens"] for line in lines[:8]] == [n * 8 * 32 for n in range(1, 9)]
    assert all(a["bytes"] < b["bytes"] for a, b in itertools.pairwise(lines[:8]))
    assert {"loss", "learning_rate", "tokens_per_second", "peak_memory_bytes"} <= lines[0].keys()


def test_the_merged_model_is_base_plus_adapter(finished: Project) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(finished.path("cpt") / "final")
    ids = torch.tensor([[0, 50, 60, 70, 80, 300]])
    before = base(ids).logits
    adapted = PeftModel.from_pretrained(base, finished.path("sft") / "adapter")(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(finished.path("sft") / "final")(ids).logits
    assert torch.allclose(merged, adapted, atol=1e-5)
    assert not torch.allclose(merged, before, atol=1e-2)


def test_the_assistant_keeps_its_template_and_stops_at_the_end_of_turn(finished: Project) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished.path("sft") / "final")
    model = AutoModelForCausalLM.from_pretrained(finished.path("sft") / "final")
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert tokenizer.chat_template == SHIPPED_TEMPLATES["llama3"].text
    assert tokenizer.eos_token_id == eot
    assert model.generation_config.eos_token_id[0] == eot
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != eot
    loss = finished.result("sft")["held_out_loss"]
    assert loss["after"] < loss["before"]
    assert finished.result("evaluate")["models"]["assistant"]["samples"][1]["form"] == "chat"
    assert finished.result("evaluate")["models"]["base"]["samples"][1]["form"] == "text"


def test_running_it_again_touches_nothing(finished: Project) -> None:
    before = {p: p.stat().st_mtime_ns for p in (finished.folder / "runs").rglob("*") if p.is_file()}
    printed = finished.run("pipeline")
    assert printed.count("already complete") == 5
    assert {p: p.stat().st_mtime_ns for p in (finished.folder / "runs").rglob("*") if p.is_file()} == before


def test_two_recipes_that_continue_each_other_equal_one_with_both_phases(small: Project, finished: Project) -> None:
    from tests.small import assert_same_weights

    small.run("phase1")
    small.run("phase2")
    assert small.losses("phase1") + small.losses("phase2") == finished.losses("cpt")
    assert_same_weights(small.path("phase2") / "final", finished.path("cpt") / "final")
    assert small.result("phase2")["data_end"] == finished.result("cpt")["data_end"]


def test_a_directory_of_another_recipe_is_refused_and_harmless_keys_may_change(small: Project) -> None:
    small.run("phase1")
    printed = small.run("phase1", "--set", "phases[0].learning_rate=1e-3", "--set", "training.save_steps=2", code=2)
    assert "phases[0].learning_rate" in printed
    assert "save_steps" not in printed
    assert "already complete" in small.run("phase1", "--set", "training.save_steps=2")


def test_a_step_whose_input_was_made_again_is_not_called_complete(small: Project) -> None:
    small.run("phase1")
    status: dict[str, Any] = small.status("tokenizer")
    write(small.path("tokenizer") / "status.json", json.dumps({**status, "run_id": "made again"}))
    assert "tokenizer.yaml" in small.run("phase1", code=2)


@pytest.mark.parametrize("name", ["base", "cpt"])
def test_held_out_documents_are_never_trained_on(small: Project, name: str) -> None:
    text = (small.folder / "english.jsonl").read_text()
    write(small.folder / "held_english.jsonl", "".join(text.splitlines(keepends=True)[:5]))
    small.run(
        name,
        "--set",
        "project=fresh",
        "--set",
        "phases[0].max_steps=2",
        *(
            ()
            if name == "base"
            else (
                "--set",
                "model.name_or_path=./runs/small/base/final",
                "--set",
                "tokenizer.name_or_path=./runs/small/tokenizer/final",
                "--set",
                "phases=[{name: a, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]",
            )
        ),
    )
    data = json.loads((small.folder / "runs" / "fresh" / name / "result.json").read_text())["data"]
    english = next(d for d in data if "english" in d["source"])
    assert (english["held_out_left_out"], english["documents"]) == (5, 35)
