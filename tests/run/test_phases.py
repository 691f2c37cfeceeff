"""Whole runs in phases: EEVE's seven, new tokens across recipes and interruptions, an optimizer and a schedule for each."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from azrecipe.modeling.loading import build_model, save_model
from azrecipe.recipe.load import load_recipe
from azrecipe.tokenization.bpe_extension import extend_tokenizer
from azrecipe.tokenization.bpe_training import train_llama3
from azrecipe.tokenization.tokenizer import save_tokenizer
from azrecipe.training.checkpoints import MARKER, list_complete
from tests.conftest import ROOT, TALES, Done, write
from tests.small import CPT, Project, assert_same_weights, fill, weights

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": False,
}
EEVE = load_recipe(ROOT / "recipes" / "eeve" / "pretrain.yaml").config.phases
# Two steps for each of the seven phases of the recipe that ships; one with an optimizer and a schedule of its own.
OWN = "lr_scheduler_type: warmup_stable_decay, decay_ratio: 0.5, min_lr_ratio: 0.1, warmup_ratio: 0.25, optim: adamw_torch, max_grad_norm: 0.1"
PHASES = "\n".join(
    f"  - {{name: {p.name}, trainable_parameters: {json.dumps(p.trainable_parameters)}, learning_rate: 1e-2, max_steps: {8 if p is EEVE[-1] else 2}"
    + (f", {OWN}}}" if p is EEVE[-1] else "}")
    for p in EEVE
)
ONE = "[{name: new, trainable_parameters: [new_tokens, new_tokens_head], learning_rate: 1e-2, max_steps: 4}]"


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A model of two matrices, an extension of its vocabulary, and the seven phases, padded; recipes that go on from there."""
    project = fill(tmp_path_factory.mktemp("untied"))
    own = train_llama3([TALES[0] * 20, TALES[2] * 20], 340)
    save_model(build_model(CONFIG, own, "float32", "sdpa", seed=1), own, project.folder / "llama")
    save_tokenizer(extend_tokenizer(own, [TALES[1] * 20, TALES[3] * 20], 40).tokenizer, project.folder / "longer")
    tokenizer = "{name_or_path: ./longer, pad_to_multiple_of: 64}"
    cpt = CPT.replace("{output_of: base.yaml}", "{name_or_path: ./llama}").replace("{output_of: tokenizer.yaml}", tokenizer)
    write(project.folder / "cpt.yaml", f"{cpt[: cpt.index('phases:')]}phases:\n{PHASES}\n{cpt[cpt.index('training:') :]}")
    after = f"stage: pretrain\nextends: cpt.yaml\nmodel: {{name_or_path: null, output_of: cpt.yaml}}\ntokenizer: null\nphases: {ONE}\n"
    write(project.folder / "after.yaml", after + "training: {save_steps: 3}\n")
    write(project.folder / "none.yaml", f"stage: pretrain\nextends: cpt.yaml\ntokenizer: null\nphases: {ONE}\n")
    write(project.folder / "printed.txt", project.run("cpt"))
    return project


def changes(before: Path, after: Path) -> dict[str, list[int]]:
    """Rows of each tensor that differ between two saved models of one shape."""
    old, new = weights(before), weights(after)
    assert old.keys() == new.keys()
    rows = {name: [i for i, (a, b) in enumerate(zip(old[name], new[name], strict=True)) if not torch.equal(a, b)] for name in old}
    return {name: found for name, found in rows.items() if found}


def new_rows(folder: Path) -> set[int]:
    return {i for first, last in json.loads((folder / "new_tokens.json").read_text())["ids"] for i in range(first, last + 1)}


def test_each_of_eeve_s_seven_phases_changes_what_it_names_and_nothing_else(untied: Project) -> None:
    run = untied.path("cpt")
    folders = [*(run / "phases" / phase.name for phase in EEVE[:-1]), run / "final"]
    size = untied.result("cpt")["vocabulary"]
    new = new_rows(run / "final")
    assert (len(new), size["new_size"], size["padding"]) == (40, 380, 4)
    assert new == set(range(340, 380))
    assert all(new_rows(folder) == new for folder in folders)
    layers = {name for name in weights(run / "final") if name.startswith("model.layers.")}
    expected = [
        (None, new),
        (new, None),
        (new, new),
        (set(range(384)), None),
        (set(range(384)), new),
        (set(range(384)), set(range(384))),
        (None, None),
    ]
    for i in range(1, 7):
        found = changes(folders[i - 1], folders[i])
        head, embeddings = expected[i]
        for matrix, rows in ((HEAD, head), (EMBEDDINGS, embeddings)):
            assert (matrix in found) is (rows is not None), (EEVE[i].name, matrix)
            assert set(found.get(matrix, [])) <= (rows or set()), (EEVE[i].name, matrix)
        assert {name for name in found if name.startswith("model.layers.")} == (layers if i >= 5 else set()), EEVE[i].name
        assert ("model.norm.weight" in found) is (i == 5)
    # The first phase's model has every old row and every other tensor of the base.
    base, first = weights(untied.folder / "llama"), weights(folders[0])
    for name, before in base.items():
        assert torch.equal(first[name][: len(before)] if name in (EMBEDDINGS, HEAD) else first[name], before), name


def test_a_phase_says_what_it_trains(untied: Project) -> None:
    printed = (untied.folder / "printed.txt").read_text()
    assert f"phase {EEVE[0].name}: trains 1,280 of " in printed  # 40 tokens × 32
    assert "(new_tokens 1,280)" in printed
    assert "(new_tokens 1,280, head 12,288)" in printed
    phases = untied.result("cpt")["phases"]
    assert [phases[p.name]["trainable_parameters"] for p in EEVE[:5]] == [1280, 1280, 2560, 12288, 13568]


def test_the_learning_rate_of_a_phase_follows_its_own_schedule(untied: Project) -> None:
    lines = [json.loads(line) for line in (untied.path("cpt") / "metrics.jsonl").read_text().splitlines()]
    rates = {
        name: [line["learning_rate"] for line in lines if line["phase"] == name and "loss" in line]
        for name in (EEVE[0].name, EEVE[-1].name)
    }
    # Steps 1 to 8: a warm-up of two from 0.1, the peak until the fourth, then 1 - sqrt to 0.1 in four.
    shares = [0.1, 0.55, 1, 1, 1, 0.1 + 0.9 * (1 - 0.5), 0.1 + 0.9 * (1 - 0.5**0.5), 0.1 + 0.9 * (1 - 0.75**0.5)]
    assert rates[EEVE[-1].name] == pytest.approx([share * 1e-2 for share in shares])
    assert rates[EEVE[0].name] == pytest.approx([1e-2, 0.5e-2])  # the others': cosine, a warm-up that rounds to none


def test_a_recipe_that_goes_on_knows_what_is_new_also_after_an_interruption(untied: Project) -> None:
    untied.run("after")
    before, run = untied.path("cpt") / "final", untied.path("after")
    found, new = changes(before, run / "final"), new_rows(before)
    assert found.keys() == {EMBEDDINGS, HEAD}
    assert all(set(rows) <= new for rows in found.values())
    assert new_rows(run / "final") == new
    # The run as a signal leaves it after its third step of four.
    whole = shutil.move(run / "final", untied.folder / "whole")
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "new" / "checkpoint-4")
    for file, left in (("phases.json", {"phases": {}}), ("status.json", {"state": "interrupted"})):
        write(run / file, json.dumps({**json.loads((run / file).read_text()), **left}))
    assert "going on from" in untied.run("after")
    assert untied.result("after")["phases"]["new"]["resumed_from"] == 3
    assert_same_weights(whole, run / "final")


def test_new_tokens_are_refused_where_the_vocabulary_stays(
    untied: Project, cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(untied.folder)
    done = cli("run", "none.yaml")
    assert done.code == 2
    assert "none.yaml:4:" in done.text
    assert "new_tokens matches nothing: no token is known to be new" in done.text
    assert "new_tokens_head matches nothing" in done.text


def test_frozen_matrices_are_rounded_while_a_phase_trains_and_saved_as_they_were(small: Project) -> None:
    """Also after a kill: the checkpoint has them rounded, and the next phase begins with the base model's own numbers."""
    mixed = ("--set", "training.precision=bf16_mixed")
    small.interrupt("phase1", lambda run: any(run.glob("checkpoints/*/*/" + MARKER)), signal.SIGTERM, *mixed)
    (checkpoint, *_) = list_complete(small.path("phase1") / "checkpoints" / "embeddings")
    base = weights(small.path("base") / "final")
    frozen = [name for name, tensor in base.items() if tensor.dim() == 2 and name != EMBEDDINGS]
    stored = weights(checkpoint)
    assert {stored[name].dtype for name in frozen} == {torch.bfloat16} and stored[EMBEDDINGS].dtype == torch.float32
    assert "going on from" in small.run("phase1", *mixed)
    saved = weights(small.path("phase1") / "final")
    assert all(torch.equal(saved[name], base[name]) for name in frozen)
    assert not any(torch.equal(base[name], base[name].bfloat16().float()) for name in frozen)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


RATES = "learning_rates: {embeddings: 1e-30, 'layers[0]': 2e-3}"


def test_a_phase_has_learning_rates_by_part(small: Project) -> None:
    phases = f"phases: [{{name: full, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 8, {RATES}}}]\n"
    write(small.folder / "rates.yaml", "stage: pretrain\nextends: cpt.yaml\nmodel: {output_of: base.yaml}\ntokenizer: null\n" + phases)
    write(small.folder / "plain.yaml", (small.folder / "rates.yaml").read_text().replace(f", {RATES}", ""))
    for name in ("rates", "plain"):
        small.run(name)
    changed = changes(small.path("base") / "final", small.path("rates") / "final")
    assert EMBEDDINGS not in changed and "model.layers.0.mlp.up_proj.weight" in changed and "model.layers.1.mlp.up_proj.weight" in changed
    base, slow, plain = (weights(small.path(name) / "final")["model.layers.0.mlp.up_proj.weight"] for name in ("base", "rates", "plain"))
    assert (slow - base).norm() < 0.7 * (plain - base).norm()
    for part, message in (("layer[0]", "did you mean 'layers[0]'?"), ("lora_B", "learning_rates: lora_B matches no parameter that trains")):
        write(small.folder / "wrong.yaml", (small.folder / "rates.yaml").read_text().replace(RATES, f"learning_rates: {{'{part}': 1e-3}}"))
        printed = small.run("wrong", code=2)
        assert message in printed


@pytest.mark.long
def test_sharded_learning_rates_train_the_same_model(small: Project) -> None:
    phases = f"phases: [{{name: full, trainable_parameters: [all], learning_rate: 5e-3, max_steps: 8, {RATES}}}]\n"
    write(small.folder / "rates.yaml", "stage: pretrain\nextends: cpt.yaml\nmodel: {output_of: base.yaml}\ntokenizer: null\n" + phases)
    small.run("rates")
    shutil.copytree(small.path("base"), small.path("base", "sharded"))
    small.run("rates", "--accelerate-config", "fsdp", "--num-processes", "2", runs="sharded")
    one, two = (weights(small.path("rates", runs) / "final") for runs in ("runs", "sharded"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], atol=1e-4, rtol=1e-3, msg=name)
