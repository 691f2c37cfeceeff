"""Inheritance, variables, overrides and pipelines: which value wins, and that a problem is told where it was written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe.compose import compose_recipe
from azrecipe.recipe.load import Recipe, load_recipe
from azrecipe.recipe.overrides import parse_overrides
from azrecipe.recipe.pipeline_steps import PipelineStep, load_pipeline, open_recipe
from tests.conftest import Done, write

PRETRAIN = """\
stage: pretrain
project: p
model: {name_or_path: owner/model}
data:
  datasets: [{path: text.txt}]
  validation: {target: {path: heldout.txt}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]
"""
SFT = """\
stage: sft
project: p
model: {output_of: cpt.yaml}
chat_template: llama3
data:
  datasets: [{path: questions.jsonl}]
training: {learning_rate: 1e-3, num_train_epochs: 1}
"""
pytestmark = pytest.mark.usefixtures("project")


def merged(parent: str, child: str, sets: Sequence[str] = ()) -> Any:
    write("parent.yaml", parent)
    write("child.yaml", "extends: parent.yaml\n" + child)
    data = compose_recipe(Path("child.yaml"), parse_overrides(sets)).root.to_plain()
    del data["extends"]
    return data


def problems(path: str, *sets: str) -> list[str]:
    """What is wrong with a recipe or a pipeline."""
    with pytest.raises(RecipeError) as caught:
        open_recipe(path, parse_overrides(sets))
    return str(caught.value).splitlines()


def steps(path: str, *sets: str) -> dict[str, Recipe]:
    found: list[PipelineStep] = load_pipeline(path, parse_overrides(sets))[1]
    return {step.key: step.recipe for step in found}


@pytest.mark.parametrize(
    ("parent", "child", "result"),
    [
        ("a: {x: 1, y: 2}", "a: {y: 3, z: 4}", {"a": {"x": 1, "y": 3, "z": 4}}),
        ("a: [1, 2]", "a: [3]", {"a": [3]}),
        ("a: {x: 1}", "a: 5", {"a": 5}),
        ("a: 5", "a: {x: 1}", {"a": {"x": 1}}),
        ("a: {x: 1, y: 2}", "a: {x: null}", {"a": {"y": 2}}),
        ("a: {x: 1}\nb: 2", "a: ~", {"b": 2}),
        ("a: 1", "b: {c: null, d: 1}", {"a": 1, "b": {"d": 1}}),
        ("m: {name_or_path: o/m, revision: v1}", "m: {output_of: a.yaml}", {"m": {"output_of": "a.yaml"}}),
        ("m: {output_of: a.yaml}", "m: {name_or_path: o/m}", {"m": {"name_or_path": "o/m"}}),
        ("m: {config: {x: 1}}", "m: {name_or_path: o/m}", {"m": {"name_or_path": "o/m"}}),
        ("m: {name_or_path: o/m, revision: v1}", "m: {name_or_path: o/n}", {"m": {"name_or_path": "o/n", "revision": "v1"}}),
        ("t: {family: llama3, vocab_size: 300}", "t: {output_of: a.yaml}", {"t": {"output_of": "a.yaml"}}),
        ("t: {max_steps: 5}", "t: {num_train_epochs: 2}", {"t": {"num_train_epochs": 2}}),
        ("t: {num_train_epochs: 2}", "t: {max_bytes: 5}", {"t": {"max_bytes": 5}}),
        ("t: {max_steps: 5}", "t: {max_tokens: null}", {"t": {"max_steps": 5}}),
    ],
)
def test_a_child_over_its_parent(parent: str, child: str, result: Any) -> None:
    assert merged(parent, child) == result


def test_three_generations_and_paths_relative_to_each_file() -> None:
    write("base/a.yaml", "fragment: true\nextends: deep/b.yaml\nx: a\ny: a")
    write("base/deep/b.yaml", "fragment: true\nx: b\nz: b")
    write("r.yaml", "extends: base/a.yaml\ny: r")
    composed = compose_recipe(Path("r.yaml"))
    assert composed.root.to_plain() == {"extends": "base/a.yaml", "fragment": True, "x": "a", "y": "r", "z": "b"}
    assert composed.files == (Path("r.yaml"), Path("base/a.yaml"), Path("base/deep/b.yaml"))
    assert not composed.is_fragment, "fragment: true is the parent's own"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"r.yaml": "extends: a.yaml", "a.yaml": "extends: r.yaml"}, "a.yaml:1:10: extends goes in a circle: r.yaml → a.yaml → r.yaml"),
        ({"r.yaml": "extends: r.yaml"}, "r.yaml:1:10: extends goes in a circle"),
        ({"r.yaml": "extends: bsae.yaml", "base.yaml": ""}, "r.yaml:1:10: extends: no such file: bsae.yaml; did you mean 'base.yaml'?"),
        ({"r.yaml": "extends: base/a.yaml"}, "r.yaml:1:10: extends: no such file: base/a.yaml (nor the folder base)"),
        ({"r.yaml": "extends: [a.yaml]"}, "r.yaml:1:10: extends must be the path of one recipe"),
        ({"r.yaml": "extends: a.yaml", "a.yaml": ""}, "a.yaml:1:1: the recipe is empty"),
        ({"r.yaml": "- 1"}, "r.yaml:1:1: the recipe must be a mapping"),
        ({"r.yaml": "extends: a.yaml", "a.yaml": "x: 1\nx: 2"}, "a.yaml:2:1: duplicate key 'x'"),
        ({}, "r.yaml: no such file"),
    ],
)
def test_a_chain_that_cannot_be_read(files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        write(name, text)
    with pytest.raises(RecipeError) as caught:
        compose_recipe(Path("r.yaml"))
    assert message in str(caught.value)


# Variables


@pytest.mark.parametrize(
    ("text", "x"),
    [
        ("variables: {v: 5}\nx: ${v}", 5),
        ("variables: {v: 2e-5}\nx: ${v}", 2e-5),
        ("variables: {v: true}\nx: ${v}", True),
        ("variables: {v: az}\nx: 20231101.${v}.${v}", "20231101.az.az"),
        ("variables: {v: 5}\nx: n${v}", "n5"),
        ("variables: {v: az}\nx: [{y: '${v}'}]", [{"y": "az"}]),
        ("variables: {v: 5}\nx: $${v}", "${v}"),
        ("variables: {v: 5}\nx: '$${v} ${v}'", "${v} 5"),
        ("x: $v {v} $", "$v {v} $"),
    ],
)
def test_variables_are_put_in(text: str, x: Any) -> None:
    write("r.yaml", text)
    found = compose_recipe(Path("r.yaml")).root.to_plain()["x"]
    assert found == x
    assert type(found) is type(x)


def test_the_nearer_declaration_of_a_variable_wins() -> None:
    assert merged("variables: {v: 1, w: 2}\nx: ${v} ${w}", "variables: {v: 3}")["x"] == "3 2"
    assert merged("variables: {v: 1}\nx: ${v}", "", ["variables.v=7"])["x"] == 7


@pytest.mark.parametrize(
    ("text", "sets", "message"),
    [
        ("x: ${v}", (), "r.yaml:1:4: variable 'v' is not defined. This recipe declares no variables"),
        ('variables: {a: x, b: "${a}"}\nx: ${b}', (), "r.yaml:1:22: variable 'b' takes another variable"),
        ("variables: {lang: az}\nx: ${lnag}", (), "r.yaml:2:4: variable 'lnag' is not defined; did you mean 'lang'? Declared: lang"),
        ("extends: base.yaml\nvariables: {langage: az}", (), "variable 'langage' is declared by nothing and used by nothing; did you mean"),
        ("extends: base.yaml\n", ("variables.langage=az",), "--set variables.langage=az: variable 'langage' is declared by nothing"),
    ],
)
def test_variables_that_are_wrong(text: str, sets: tuple[str, ...], message: str) -> None:
    write("base.yaml", "variables: {language: az}\ny: ${language}")
    write("r.yaml", text)
    problems = compose_recipe(Path("r.yaml"), parse_overrides(sets)).problems
    assert any(message in str(problem) for problem in problems)


def test_a_variable_is_a_scalar_and_the_place_is_its_declaration() -> None:
    write("r.yaml", PRETRAIN + "seed: ${s}\nvariables:\n  s: [1]\n")
    assert problems("r.yaml") == ["r.yaml:10:6: variable 's' must be text, a number, true or false, not a list"]


# --set


@pytest.mark.parametrize(
    ("sets", "keys", "value"),
    [
        (["data.max_length=64"], ("data", "max_length"), 64),
        (["data.datasets[0].weight=0.5"], ("data", "datasets", 0, "weight"), 0.5),
        (["data.datasets.0.weight=0.5"], ("data", "datasets", 0, "weight"), 0.5),
        (["phases[0].learning_rate=2e-5"], ("phases", 0, "learning_rate"), 2e-5),
        (["phases[0].num_train_epochs=3"], ("phases", 0, "num_train_epochs"), 3),
        (["training.use_liger_kernel=true"], ("training", "use_liger_kernel"), True),
        (["training.report_to=[tensorboard]"], ("training", "report_to"), ["tensorboard"]),
        (["data={max_length: 64}"], ("data", "max_length"), 64),
        (["description=a=b"], ("description",), "a=b"),
        (["seed=1", "seed=2"], ("seed",), 2),
        (["model.config={model_type: llama}", "tokenizer={family: llama3, vocab_size: 300}"], ("model", "config", "model_type"), "llama"),
    ],
)
def test_set_changes_one_value(sets: list[str], keys: tuple[Any, ...], value: Any) -> None:
    write("r.yaml", PRETRAIN)
    data: Any = load_recipe("r.yaml", parse_overrides(sets)).data
    for key in keys:
        data = data[key]
    assert data == value


def test_set_drops_the_alternative_that_it_replaces() -> None:
    write("r.yaml", PRETRAIN)
    phase = load_recipe("r.yaml", parse_overrides(["phases[0].max_bytes=5000"])).data["phases"][0]
    assert "max_steps" not in phase


def test_set_to_null_gives_the_default_back() -> None:
    write("r.yaml", PRETRAIN + "seed: 7\n")
    assert load_recipe("r.yaml").data["seed"] == 7
    assert load_recipe("r.yaml", parse_overrides(["seed=null"])).data["seed"] == 42


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data.max_lenght=64", "--set data.max_lenght=64: unknown key 'max_lenght'; did you mean 'max_length'?"),
        ("data.max_length=many", '--set data.max_length=many: data.max_length must be a whole number, not text ("many")'),
        ("data.max_length=2", "--set data.max_length=2: data.max_length = 2 is too small: at least 8"),
        ("phases[3].max_steps=2", "--set phases[3].max_steps=2: there is no element [3]: it has 1"),
        ("model[0]=2", "--set model[0]=2: there is no element [0]: it is no list"),
        ("seed.x=2", "--set seed.x=2: cannot set 'x': the value above it is no mapping"),
        ("data.max_length", "--set data.max_length: write key.path=value"),
        ("=5", "--set =5: write key.path=value"),
        ("a..b=5", "--set a..b=5: write key.path=value"),
        ("seed=[1", "--set seed=[1: '[' is not closed"),
        ("training={seed: 1, seed: 2}", "--set training={seed: 1, seed: 2}: duplicate key 'seed'"),
        ("sft.yaml:seed=1", "--set sft.yaml:seed=1: sft.yaml: names a step, and r.yaml is run by itself"),
    ],
)
def test_a_set_that_is_wrong_is_told_as_it_was_typed(text: str, message: str) -> None:
    write("r.yaml", PRETRAIN + "seed: 7\n")
    assert problems("r.yaml", text)[0].startswith(message)


# Places


def test_a_problem_in_a_parent_is_told_at_the_parent() -> None:
    write("base/parent.yaml", "fragment: true\ntraining:\n  precision: fp16\n  warmup_ratoi: 0.1\n")
    write("r.yaml", "extends: base/parent.yaml\n" + PRETRAIN)
    found = problems("r.yaml")
    assert len(found) == 2
    assert found[0].startswith('base/parent.yaml:3:14: training.precision = "fp16" is not known')
    assert found[1].startswith("base/parent.yaml:4:3: unknown key 'warmup_ratoi'; did you mean 'warmup_ratio'?")


def test_a_value_that_a_child_replaces_is_told_at_the_child() -> None:
    write("base/parent.yaml", "fragment: true\ndata:\n  max_length: 64\n")
    write("r.yaml", "extends: base/parent.yaml\n" + PRETRAIN + "training: {}\n")
    recipe = load_recipe("r.yaml")
    assert str(recipe.locate("data", "max_length")) == "base/parent.yaml:3:15"
    assert str(recipe.locate("data", "datasets", 0, "path")) == "r.yaml:6:21"
    assert str(recipe.locate("data", "datasets", 0, "weight")) == "r.yaml:6:14", "absent: the nearest thing above it"


@pytest.mark.parametrize(
    ("path", "seen"),
    [
        ("text.txt", "./base/text.txt"),
        ("./text.txt", "./base/text.txt"),
        ("../text.txt", "./text.txt"),
        ("data/*.jsonl.gz", "./base/data/*.jsonl.gz"),
        ("/data/text.txt", "/data/text.txt"),
        ("owner/dataset", "owner/dataset"),
    ],
)
def test_a_data_path_is_relative_to_the_file_it_stands_in(path: str, seen: str) -> None:
    write("base/parent.yaml", f"fragment: true\ndata: {{datasets: [{{path: '{path}'}}]}}\n")
    write("sub/r.yaml", "extends: ../base/parent.yaml\n" + PRETRAIN.replace("  datasets: [{path: text.txt}]\n", ""))
    assert load_recipe("sub/r.yaml").config.data.datasets[0].path == seen


def test_a_model_folder_is_relative_to_its_file_and_one_from_the_command_line_to_the_current_folder() -> None:
    write("base/parent.yaml", "fragment: true\nmodel: {name_or_path: ./llama}\n")
    write("r.yaml", "extends: base/parent.yaml\n" + PRETRAIN.replace("model: {name_or_path: owner/model}\n", ""))
    assert load_recipe("r.yaml").config.model.name_or_path == "./base/llama"
    assert load_recipe("r.yaml", parse_overrides(["model.name_or_path=./llama"])).config.model.name_or_path == "./llama"
    assert load_recipe("r.yaml", parse_overrides(["data.datasets[0].path=mine.txt"])).config.data.datasets[0].path == "mine.txt"


# Pipelines


@pytest.fixture
def pipeline(project: Path) -> None:
    write("parts/cpt.yaml", PRETRAIN + "description: ${language}\nvariables: {language: az}\n")
    write("parts/sft.yaml", SFT)
    write(
        "p.yaml",
        """\
stage: pipeline
project: kazakh
variables: {language: kk}
steps: [parts/cpt.yaml, parts/sft.yaml]
set:
  cpt.yaml: {data.max_length: 64, "data.datasets[0].weight": 2, training: {logging_steps: 1}}
  sft.yaml: {data.datasets: [{path: mine.jsonl}], lora.r: 4}
""",
    )


@pytest.mark.usefixtures("pipeline")
def test_a_pipeline_changes_its_steps() -> None:
    found = steps("p.yaml", "sft.yaml:lora.r=8", "sft.yaml:training.learning_rate=5e-4")
    cpt, sft = found["cpt.yaml"], found["sft.yaml"]
    assert (cpt.project, sft.project) == ("kazakh", "kazakh")
    assert cpt.data["description"] == "kk"
    assert (cpt.config.data.max_length, cpt.config.data.datasets[0].weight, cpt.config.training.logging_steps) == (64, 2, 1)
    assert cpt.config.data.datasets[0].path == "./parts/text.txt", "stands in the step's file"
    assert sft.config.data.datasets[0].path == "./mine.jsonl", "stands in the pipeline's file"
    assert (sft.config.lora.r, sft.config.training.learning_rate) == (8, 5e-4), "the command line wins"


@pytest.mark.usefixtures("pipeline")
def test_a_variable_of_the_pipeline_can_be_set_from_the_command_line() -> None:
    assert steps("p.yaml", "variables.language=ka")["cpt.yaml"].data["description"] == "ka"


@pytest.mark.usefixtures("pipeline")
@pytest.mark.parametrize("step", ["sft.yaml", "parts/sft.yaml"])
def test_one_step_of_a_pipeline_is_the_step_as_the_pipeline_changes_it(step: str) -> None:
    recipe, rest = open_recipe("p.yaml", [], step)
    assert (recipe.name, recipe.project, recipe.config.lora.r, rest) == ("sft", "kazakh", 4, [])


@pytest.mark.usefixtures("pipeline")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("data.max_length: 64", "data.max_lenght: 64", "p.yaml:6:14: unknown key 'max_lenght'; did you mean 'max_length'?"),
        ("data.max_length: 64", "data.max_length: 1", "p.yaml:6:31: data.max_length = 1 is too small"),
        ("data.max_length: 64", "data..max_length: 64", "p.yaml:6:14: 'data..max_length' is no path of keys"),
        ("  sft.yaml: {data", "  stf.yaml: {data", "p.yaml:7:3: 'stf.yaml' is no step; did you mean 'sft.yaml'? Steps: cpt.yaml, sft.yaml"),
        ("{language: kk}", "{langauge: kk}", "p.yaml:3:13: variable 'langauge' is declared by no step; did you mean 'language'?"),
        ("parts/sft.yaml]", "parts/stf.yaml]", "p.yaml:4:25: no such recipe: parts/stf.yaml; did you mean 'sft.yaml'?"),
        ("parts/sft.yaml]", "p.yaml]", "p.yaml:4:25: a pipeline cannot be a step of a pipeline"),
        (
            "parts/sft.yaml]",
            "parts/x/cpt.yaml]",
            "p.yaml:4:25: the file name identifies a step, and 'cpt.yaml' is already at p.yaml:4:9",
        ),
    ],
)
def test_a_pipeline_that_is_wrong(old: str, new: str, message: str) -> None:
    write("parts/x/cpt.yaml", PRETRAIN)
    text = Path("p.yaml").read_text(encoding="utf-8")
    assert old in text
    write("p.yaml", text.replace(old, new))
    found = problems("p.yaml")
    assert any(line.startswith(message) for line in found), found


@pytest.mark.usefixtures("pipeline")
def test_everything_wrong_in_all_steps_is_told_at_once() -> None:
    write("parts/cpt.yaml", PRETRAIN + "sede: 1\n")
    write("parts/sft.yaml", SFT + "lroa: {}\n")
    found = "\n".join(problems("p.yaml"))
    assert "parts/cpt.yaml:8:1: unknown key 'sede'; did you mean 'seed'?" in found
    assert "parts/sft.yaml:8:1: unknown key 'lroa'; did you mean 'lora'?" in found
    assert "p.yaml:3:13: variable 'language' is declared by no step" in found


def test_what_is_wrong_with_variables_is_told_with_all_the_rest(project: Path, cli: Callable[..., Done]) -> None:
    write(
        "r.yaml",
        """\
stage: pretrain
project: p
model: {name_or_path: "${bsae}"}
data: {max_lenght: 8, datasets: [{path: text.txt}], validation: {t: {path: heldout.txt}}}
phases: [{name: a, trainable_parameters: [all], learning_rate: 5, max_steps: 1}]
""",
    )
    done = cli("validate", "r.yaml")
    assert done.code == 2
    for part in ("variable 'bsae' is not defined", "unknown key 'max_lenght'", "learning_rate = 5 is too large"):
        assert part in done.out
    assert len(done.out.splitlines()) == 3


def test_a_variable_whose_only_use_is_replaced_is_no_misspelling(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", "fragment: true\nx: 1\n")
    write(tmp_path / "text.yaml", "fragment: true\nextends: base.yaml\nvariables: {lang: az}\ndata: {name: '${lang}'}\n")
    write(tmp_path / "r.yaml", "extends: text.yaml\n")
    assert compose_recipe(tmp_path / "r.yaml", parse_overrides(["data=null"])).problems == ()


@pytest.mark.parametrize(
    ("recipe", "sets", "message"),
    [
        (PRETRAIN.replace("owner/model", "base"), (), "sub/r.yaml:3:23: 'base' is a name on the hub, and there is a folder sub/base here: write ./base for that"),
        (PRETRAIN.replace("owner/model", "near"), (), "sub/r.yaml:3:23: 'near' is a name on the hub, and there is a folder near here: write ../near for that"),
        (PRETRAIN.replace("path: text.txt", "path: base"), (), "sub/r.yaml:5:21: 'base' is a name on the hub"),
        (PRETRAIN, ("model.name_or_path=near",), "--set model.name_or_path=near: 'near' is a name on the hub, and there is a folder near here: write ./near"),
    ],
)  # fmt: skip
def test_a_folder_without_a_leading_dot_is_no_name_on_the_hub(recipe: str, sets: Sequence[str], message: str) -> None:
    write("sub/r.yaml", recipe)
    for folder in ("sub/base", "near"):
        Path(folder).mkdir(parents=True)
    assert any(line.startswith(message) for line in problems("sub/r.yaml", *sets)), problems("sub/r.yaml", *sets)
    assert load_recipe(write("sub/r.yaml", PRETRAIN.replace("owner/model", "./base"))).config.model.name_or_path == "./sub/base"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dpo: {beta: 0.1}\n", "dpo.beta is for method: dpo, and method is sft"),
        ("dpo: {}\n", "dpo is for method: dpo, and method is sft"),
        ("method: sft\ndpo: {loss_type: sigmoid}\n", "dpo.loss_type is for method: dpo"),
        ("adapter: none\nlora: {r: 16}\n", "lora.r is the adapter's, and there is none (adapter: none)"),
    ],
)
def test_a_block_that_the_method_ignores_is_refused_with_any_value(text: str, message: str) -> None:
    write("r.yaml", SFT.replace("output_of: cpt.yaml", "name_or_path: owner/model") + text)
    assert message in problems("r.yaml")[0]
