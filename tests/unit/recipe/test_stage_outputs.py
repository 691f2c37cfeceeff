"""What a step takes from another is checked before any runs: each stage says what it will make."""

from __future__ import annotations

from pathlib import Path

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe.load import Recipe, load_recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline, open_recipe
from azrecipe.recipe.stage_outputs import StageOutput, describe_file, describe_output, follow_steps
from azrecipe.recipe.validate import validate_recipes
from tests.conftest import write
from tests.small import RECIPES, fill

DPO = """\
stage: sft
project: small
model: {output_of: sft.yaml}
method: dpo
data: {max_length: 96, datasets: [{path: questions.jsonl}]}
training: {learning_rate: 1e-2, max_steps: 12, global_batch_size: 4, precision: float32}
"""
PHASES = "stage: pipeline\nproject: small\nsteps: [base.yaml, tokenizer.yaml, phase1.yaml, phase2.yaml]\n"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)


def refuse(path: str, *sets: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        open_recipe(path, parse_overrides(sets))
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("cpt.yaml:model.output_of=tokenizer.yaml", "tokenizer.yaml is a tokenizer recipe, which leaves no model. Earlier steps that do: base.yaml"),
        ("sft.yaml:model.output_of=tokenizer.yaml", "which leaves no model. Earlier steps that do: base.yaml, cpt.yaml"),
        ("evaluate.yaml:models.base.output_of=tokenizer.yaml", "tokenizer.yaml is a tokenizer recipe, which leaves no model. Earlier steps that do: base.yaml, cpt.yaml, sft.yaml"),
        ("evaluate.yaml:answers={output_of: cpt.yaml}", "cpt.yaml is a pretrain recipe, which leaves no held-out conversations; did you mean 'sft.yaml'? Earlier steps that do: sft.yaml"),
        ("evaluate.yaml:answers={output_of: tokenizer.yaml}", "tokenizer.yaml is a tokenizer recipe, which leaves no held-out conversations"),
        ("cpt.yaml:data.continue_from=tokenizer.yaml", "tokenizer.yaml is a tokenizer recipe, which leaves no position in its text to go on from. Earlier steps that do: base.yaml"),
        ("cpt.yaml:data.continue_from=base.yaml", "the data cannot go on from base.yaml: these differ: data.datasets (1 there, 2 here)"),
        ("sft.yaml:chat_template=keep", "chat_template: keep needs a chat template, and the tokenizer of cpt.yaml will have none"),
        ("cpt.yaml:data.max_length=256", "data.max_length = 256 is more than the model's 128 positions"),
        ("base.yaml:data.max_length=256", "data.max_length = 256 is more than the model's 128 positions"),
        ("sft.yaml:data.max_length=129", "data.max_length = 129 is more than the model's 128 positions"),
        ("evaluate.yaml:tasks=[{task: a.yaml, apply_chat_template: true}]", "apply_chat_template: models without a chat template: base, adapted"),
        ("evaluate.yaml:models.again={output_of: sft.yaml}", "'again' is the same model as 'assistant': name it once"),
    ],
)  # fmt: skip
def test_a_step_that_cannot_use_an_earlier_one_is_refused(change: str, message: str) -> None:
    write("a.yaml", "task: a\n")
    problems = refuse("pipeline.yaml", change)
    assert len(problems) == 1
    assert problems[0].startswith(f"--set {change}: ")
    assert message in problems[0]


@pytest.mark.usefixtures("small")
def test_the_place_is_that_of_the_key_and_all_steps_are_told_at_once() -> None:
    write("sft.yaml", RECIPES["sft"].replace("cpt.yaml", "tokenizer.yaml"))
    write("evaluate.yaml", RECIPES["evaluate"] + "answers: {output_of: base.yaml}\n")
    report = validate_recipes([Path("pipeline.yaml")])
    assert [str(problem).partition(" is ")[0] for problem in report.problems] == [
        "sft.yaml:4:20: tokenizer.yaml",
        "evaluate.yaml:10:22: base.yaml",
    ]


@pytest.mark.usefixtures("small")
def test_conversations_that_an_sft_step_will_not_hold_out() -> None:
    write("evaluate.yaml", RECIPES["evaluate"] + "answers: {output_of: sft.yaml}\n")
    assert open_recipe("pipeline.yaml")
    assert "sft.yaml holds out no conversation" in refuse("pipeline.yaml", "sft.yaml:data.validation.held_out.fraction=0")[0]
    write("dpo.yaml", DPO)
    write("pipeline.yaml", RECIPES["pipeline"].replace("sft.yaml,", "sft.yaml, dpo.yaml,"))
    problems = refuse("pipeline.yaml", "evaluate.yaml:answers.output_of=dpo.yaml")
    assert len(problems) == 1 and "dpo.yaml trains on preferences (method: dpo)" in problems[0]


@pytest.mark.usefixtures("small")
def test_data_that_cannot_go_on() -> None:
    write("phases.yaml", PHASES)
    assert open_recipe("phases.yaml")
    assert "these differ: seed (42 there, 1 here)" in refuse("phases.yaml", "phase2.yaml:seed=1")[0]
    assert open_recipe("phases.yaml", parse_overrides(["phase1.yaml:data.datasets[0].weight=2"]))  # the mix may be another
    fewer = "phase2.yaml:data.datasets=[{path: azerbaijani.jsonl}]"
    assert "these differ: data.datasets (2 there, 1 here)" in refuse("phases.yaml", fewer)[0]


@pytest.mark.usefixtures("small")
def test_a_cell_is_checked_by_the_steps_that_it_runs() -> None:
    matrix = "matrix:\n  right: {sft.yaml: {chat_template: chatml}}\n  wrong: {sft.yaml: {chat_template: keep}}\n  other: {cpt.yaml: {model.output_of: tokenizer.yaml}}\n"
    write("study.yaml", RECIPES["pipeline"] + matrix)
    assert [problem.partition(": ")[0] for problem in refuse("study.yaml")] == ["study.yaml:8:37", "study.yaml:9:39"]


@pytest.mark.usefixtures("small")
def test_a_single_recipe_is_checked_by_the_stages_of_the_files_that_it_names() -> None:
    assert refuse("cpt.yaml", "model.output_of=tokenizer.yaml") == [
        "--set model.output_of=tokenizer.yaml: tokenizer.yaml is a tokenizer recipe, which leaves no model. Stages that do: merge, pretrain, sft"
    ]
    write("cpt2.yaml", RECIPES["cpt"].replace("model: {output_of: base.yaml}", "model: {output_of: evaluate.yaml}"))
    assert [str(problem) for problem in validate_recipes([Path("cpt2.yaml")]).problems] == [
        "cpt2.yaml:4:20: evaluate.yaml is an evaluate recipe, which leaves no model. Stages that do: merge, pretrain, sft"
    ]
    assert describe_file("sft.yaml") == StageOutput("sft")
    assert describe_file("missing.yaml") is None


def describe(pipeline: str) -> dict[str, StageOutput]:
    outputs = {}
    for recipe, find_output in follow_steps(step.recipe for step in load_pipeline(pipeline)[1]):
        outputs[recipe.name] = describe_output(recipe, find_output)
    return outputs


@pytest.mark.usefixtures("small")
def test_what_each_stage_says_that_it_will_make() -> None:
    outputs = describe("pipeline.yaml")
    base: Recipe = load_recipe("base.yaml")
    assert {name: (output.has_template, output.max_positions) for name, output in outputs.items()} == {
        "base": (False, 128),
        "tokenizer": (False, None),
        "cpt": (False, 128),
        "sft": (True, 128),
        "evaluate": (None, None),
    }
    assert outputs["sft"].base_model == base.config.model
    assert outputs["sft"].chat_template == "llama3"
    write("cpt.yaml", RECIPES["cpt"].replace("model: {output_of: base.yaml}", "model: {name_or_path: owner/model, revision: v1}"))
    write("tokenizer.yaml", RECIPES["tokenizer"].replace("output_of: base.yaml", "name_or_path: owner/tokenizer"))
    outputs = describe("pipeline.yaml")
    assert outputs["cpt"].has_template is None, "its base tokenizer says"
    assert outputs["cpt"].base_tokenizer.name_or_path == "owner/tokenizer"  # type: ignore[union-attr]
    assert (outputs["sft"].base_model.name_or_path, outputs["sft"].base_model.revision) == ("owner/model", "v1")  # type: ignore[union-attr]
