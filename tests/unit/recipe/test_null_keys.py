"""A key whose value is null removes what is inherited; it is no way to write a wrong key, or half a number, unseen."""

from __future__ import annotations

from pathlib import Path

import pytest

from azrecipe.errors import RecipeError
from azrecipe.hardware import load_catalog
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import load_pipeline
from tests.conftest import write

PRETRAIN = """\
stage: pretrain
project: p
model: {name_or_path: owner/model}
data:
  datasets: [{path: text.txt}]
  validation: {target: {path: heldout.txt}, other: {path: heldout.txt}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]
"""
SFT = """\
stage: sft
project: p
model: {name_or_path: owner/model}
chat_template: llama3
data: {datasets: [{path: questions.jsonl}]}
training: {learning_rate: 1e-3, num_train_epochs: 1}
"""
pytestmark = pytest.mark.usefixtures("project")


def refuse(text: str, *sets: str) -> list[str]:
    write("r.yaml", text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", parse_overrides(sets))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PRETRAIN + "foo:\n", "r.yaml:8:1: unknown key 'foo'. Allowed here: data, "),
        (PRETRAIN + "sede: ~\n", "r.yaml:8:1: unknown key 'sede'; did you mean 'seed'?"),
        (PRETRAIN.replace("text.txt", "text.txt, weigth: null"), "r.yaml:5:31: unknown key 'weigth'; did you mean 'weight'?"),
        (PRETRAIN.replace("text.txt", "text.txt, 5"), "r.yaml:5:31: unknown key '5'. Allowed here: "),
        (SFT + "lora:\n  rank:\n", "r.yaml:8:3: unknown key 'rank'. Allowed here: lora_alpha"),
        (PRETRAIN.replace("heldout.txt}}", "heldout.txt}, third: }"), "r.yaml:6:73: data.validation.third has no value, and there is no inherited one"),
        (PRETRAIN + "training: {trainer_arguments: {optmi: null}}\n", "r.yaml:8:32: training.trainer_arguments.optmi has no value"),
        (PRETRAIN + "variables: {language: null}\n", "r.yaml:8:13: variables.language has no value"),
        (PRETRAIN.replace("{name_or_path: owner/model}", "{config: {model_type: llama, hiden_size: ~}}"), "r.yaml:3:37: model.config.hiden_size has no value"),
    ],
)  # fmt: skip
def test_a_null_that_removes_nothing_hides_no_wrong_key(text: str, message: str) -> None:
    assert any(line.startswith(message) for line in refuse(text)), refuse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PRETRAIN.replace("text.txt", "text.txt, weight: 1,5"), "r.yaml:5:39: 1,5 has a comma: write 1.5"),
        (SFT + "lora: {lora_dropout: 0,05}\n", "r.yaml:7:22: 0,05 has a comma: write 0.05"),
        (SFT + "lora: {lora_dropout: 0,05, r: 8}\n", "r.yaml:7:22: 0,05 has a comma: write 0.05"),
        (PRETRAIN.replace("1e-3", "1,5e-3"), "r.yaml:7:66: 1,5e-3 has a comma: write 1.5e-3"),
        (PRETRAIN.replace("max_steps: 1", "max_steps: 1,500"), "r.yaml:7:83: 1,500 has a comma: write 1.500, or 1500 if thousands are meant"),
        (SFT + "lora:\n  lora_dropout: 0,05\n", 'r.yaml:8:17: lora.lora_dropout must be a number, not text ("0,05"): write 0.05'),
        (SFT + "seed: 1,000,000\n", 'r.yaml:7:7: seed must be a whole number, not text ("1,000,000"): write 1000000'),
        (SFT + "seed: 5k\n", 'r.yaml:7:7: seed must be a whole number, not text ("5k"): write the number without a unit: 5000'),
        (SFT + "lora: {lora_dropout: 5%}\n", 'lora.lora_dropout must be a number, not text ("5%"): write the share: 0.05'),
        (SFT + "seed: '5'\n", 'r.yaml:7:7: seed must be a whole number, not text ("5"): write it without quotes'),
        (SFT + "lora: {use_dora: Yes}\n", 'r.yaml:7:18: lora.use_dora must be true or false, not text ("Yes"): write true'),
        (SFT + "lora: {use_dora: 'false'}\n", 'lora.use_dora must be true or false, not text ("false"): write false without quotes'),
    ],
)  # fmt: skip
def test_a_number_in_another_notation_is_named(text: str, message: str) -> None:
    assert any(message in line for line in refuse(text)), refuse(text)


def test_an_override_is_no_way_around() -> None:
    assert refuse(PRETRAIN, "sede=null")[0].startswith("--set sede=null: unknown key 'sede'; did you mean 'seed'?")
    assert refuse(SFT, "lora={lora_dropout: 0,05}") == ["--set lora={lora_dropout: 0,05}: 0,05 has a comma: write 0.05"]
    assert refuse(SFT, "lora.lora_dropout=0,05")[0].endswith('must be a number, not text ("0,05"): write 0.05')


def test_a_null_removes_what_is_inherited_at_every_level() -> None:
    write("base.yaml", PRETRAIN + "training: {save_steps: 5, trainer_arguments: {group_by_length: true}}\n")
    child = "extends: base.yaml\nseed: ~\ndata: {validation: {other: null}}\ntraining: {save_steps: null, trainer_arguments: {group_by_length: }}\n"
    write("r.yaml", child)
    recipe = load_recipe("r.yaml")
    assert list(recipe.config.data.validation) == ["target"]
    assert (recipe.config.seed, recipe.config.training.save_steps, recipe.config.training.trainer_arguments) == (42, 500, {})
    write("again.yaml", "extends: r.yaml\ndata: {validation: {other: {path: text.txt}}}\n")
    assert load_recipe("again.yaml").config.data.validation["other"].path == "./text.txt"
    assert list(load_recipe("again.yaml", parse_overrides(["data.validation.other=null"])).config.data.validation) == ["target"]


def test_an_override_sets_a_key_below_one_that_is_null() -> None:
    write("r.yaml", SFT + "lora:\n")
    assert load_recipe("r.yaml", parse_overrides(["lora.r=4"])).config.lora.r == 4


def test_changes_of_a_pipeline_are_checked_likewise() -> None:
    write("cpt.yaml", PRETRAIN)
    changes = "set: {cpt.yaml: {data.validation.third: {path: text.txt}}}\nmatrix: {a: {cpt.yaml: {%s}}}\n"
    write(
        "study.yaml",
        "stage: pipeline\nproject: p\nsteps: [cpt.yaml]\n" + changes % "data.validation.third: null, data.validation.other: null",
    )
    assert list(load_pipeline("study.yaml")[1][0].recipe.config.data.validation) == ["target"]
    write("study.yaml", "stage: pipeline\nproject: p\nsteps: [cpt.yaml]\n" + changes % "data.validation.fourth: null, sede: null")
    with pytest.raises(RecipeError) as caught:
        load_pipeline("study.yaml")
    assert [str(problem).split("; did")[0] for problem in caught.value.problems] == [
        "study.yaml:5:25: data.validation.fourth has no value, and there is no inherited one to remove: give it a value, or remove the line",
        "study.yaml:5:55: unknown key 'sede'",
    ]
    for text, message in (
        ("matrix: {a: {cpt.yaml: }}", "matrix.a.cpt.yaml has no value"),
        ("set: {cpt.yaml: }", "must be a mapping, not empty"),
    ):
        write("study.yaml", f"stage: pipeline\nproject: p\nsteps: [cpt.yaml]\n{text}\n")
        with pytest.raises(RecipeError, match=message):
            load_pipeline("study.yaml")


def test_a_hardware_file_is_checked_likewise() -> None:
    write("mine.yaml", "machines:\n  p5.48xlarge: null\n  p5.48xlrage: null\ncrads:\n")
    with pytest.raises(RecipeError) as caught:
        load_catalog(Path("mine.yaml"))
    text = str(caught.value)
    assert "mine.yaml:3:3: machines.p5.48xlrage has no value" in text
    assert "mine.yaml:4:1: unknown key 'crads'; did you mean 'cards'?" in text
    write("mine.yaml", "machines: {p5.48xlarge: null}\n")
    assert "p5.48xlarge" not in load_catalog(Path("mine.yaml")).machines
