"""The schema is the law: every key is described, typed, used; and all that breaks it is told at once."""

from __future__ import annotations

import ast
import types
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe import schema
from azrecipe.recipe.load import load_recipe
from azrecipe.recipe.types import STAGE_TYPES, LigerKernels
from tests.conftest import ROOT, write

COMPOSED = {"extends", "fragment", "variables"}  # gone once a recipe is resolved


def objects(definition: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Every mapping with keys of its own below a definition, with its path."""
    definition = schema.resolve_ref(definition)
    if definition.get("properties"):
        yield at, definition
    for key, inner in definition.get("properties", {}).items():
        yield from objects(inner, f"{at}.{key}")
    for key in ("items", "additionalProperties"):
        if isinstance(definition.get(key), dict):
            yield from objects(definition[key], f"{at}.{'[]' if key == 'items' else '*'}")


OBJECTS = dict(found for stage in schema.STAGES for found in objects(schema.load_schema(stage), stage))
KEYS = [(f"{at}.{key}", definition, key) for at, definition in OBJECTS.items() for key in definition["properties"]]


@pytest.mark.parametrize("at", OBJECTS)
def test_an_object_is_closed_and_requires_only_keys_that_it_has(at: str) -> None:
    definition = OBJECTS[at]
    assert definition.get("additionalProperties") is False or at == "pretrain.model.config", "transformers' own fields"
    named = [*definition.get("x-required", []), *definition.get("x-exactly-one", [])]
    assert not set(named) - set(definition["properties"])


@pytest.mark.parametrize(("at", "definition", "key"), KEYS, ids=[at for at, _, _ in KEYS])
def test_a_key_says_what_it_is_and_what_its_absence_means(at: str, definition: Any, key: str) -> None:
    inner = schema.resolve_ref(definition["properties"][key])
    assert inner.get("description", "").endswith((".", "…")), "a sentence"
    assert inner.get("type") or "const" in inner
    required = key in definition.get("x-required", []) or key in definition.get("x-exactly-one", [])
    alternatives = {"name_or_path", "output_of", "revision", "family", "vocab_size"}  # one asks for, or leads to, another
    open_ended = {"extends", "variables", "name", "data_files", "held_out", "by", "continue_from", "messages"}  # absent: there is none
    if "default" not in inner and not required and key not in alternatives | open_ended:
        assert "Absent: " in inner["description"]
    if "default" in inner:
        assert not required, "a key with a default may be left out"


def dataclasses_of(hint: Any) -> list[type]:
    if is_dataclass(hint):
        return [hint]  # type: ignore[list-item]
    if get_origin(hint) in (Union, types.UnionType):
        return [each for argument in get_args(hint) for each in dataclasses_of(argument)]
    return dataclasses_of(get_args(hint)[-1]) if get_args(hint) else []


def pairs(kind: type, definition: Any, at: str) -> Iterator[tuple[str, type, Any]]:
    """A dataclass beside the object that it stands for, and those below both."""
    definition = schema.resolve_ref(definition)
    yield at, kind, definition
    for name, hint in get_type_hints(kind).items():
        for inner in dataclasses_of(hint):
            below = schema.resolve_ref(definition["properties"][name])
            while "properties" not in below:
                below = schema.resolve_ref(below.get("items") or below["additionalProperties"])
            yield from pairs(inner, below, f"{at}.{name}")


PAIRS = [found for stage, kind in STAGE_TYPES.items() for found in pairs(kind, schema.load_schema(stage), stage)]


@pytest.mark.parametrize(("at", "kind", "definition"), PAIRS, ids=[at for at, _, _ in PAIRS])
def test_a_dataclass_has_the_keys_of_its_object(at: str, kind: type, definition: Any) -> None:
    assert {f.name for f in fields(kind)} == set(definition["properties"]) - COMPOSED


def test_every_object_but_transformers_own_has_a_dataclass() -> None:
    assert len(PAIRS) == len(OBJECTS) - 1  # pretrain.model.config


def test_every_key_is_read_by_some_code() -> None:
    read = {f.name for f in fields(LigerKernels)}  # handed to Liger whole, by their names
    for file in (ROOT / "azrecipe").rglob("*.py"):
        if file.parent != ROOT / "azrecipe/recipe/types":
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                match node:
                    case ast.Attribute(attr=name):
                        read.add(name)
                    case ast.Call(func=ast.Attribute(attr="get"), args=[*arguments]):
                        read |= {a.value for a in arguments if isinstance(a, ast.Constant)}
                    case ast.Call(func=ast.Attribute(attr="pop"), args=[ast.Constant(value=name), *_]):
                        read.add(name)
    assert not {key for _, _, key in KEYS} - read


def test_every_shipped_default_is_valid_in_its_own_schema() -> None:
    from jsonschema import Draft202012Validator

    for at, definition, key in KEYS:
        inner = schema.resolve_ref(definition["properties"][key])
        if "default" in inner and "properties" not in inner:
            assert not list(Draft202012Validator(inner).iter_errors(inner["default"])), f"{at}.{key}"


@pytest.mark.usefixtures("project")
def test_every_problem_of_a_recipe_is_told_at_once_in_the_order_of_its_lines() -> None:
    write(
        "r.yaml",
        """\
stage: pretrain
project: my project
model: {name_or_path: o/m, output_of: a.yaml, atn_implementation: eager}
data:
  max_length: 4
  datasets: []
  validation: {2nd: {path: x.txt, weigth: 1}}
phases:
  - {name: a, trainable_parameters: [embedings], learning_rate: 2, max_steps: 1, max_tokens: 1}
  - {trainable_parameters: [all, all], learning_rate: fast}
training: {precision: fp16, warmup_ratio: 1, report_to: wandb, trainer_arguments: {fp16: true, save_step: 1}}
speed: fast
""",
    )
    write("a.yaml", "stage: pretrain\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    places = [(problem.location.line, problem.location.column) for problem in caught.value.problems]
    assert places == sorted(places)
    text = str(caught.value)
    for expected in [
        "r.yaml:2:10: project = \"my project\" must be letters, digits, '-', '_' and '.', no spaces",
        "r.yaml:3:1: model: give exactly one of name_or_path, output_of, config: there are name_or_path, output_of",
        "r.yaml:3:47: unknown key 'atn_implementation'; did you mean 'attn_implementation'? Allowed here: ",
        "r.yaml:5:15: data.max_length = 4 is too small: at least 8",
        "r.yaml:6:13: data.datasets must not be empty",
        "r.yaml:7:16: '2nd' is no name to use here: letters, digits and _ only, a letter first",
        "r.yaml:7:35: unknown key 'weigth'. Allowed here: data_files, ",
        "r.yaml:9:5: phases[0]: give exactly one of max_steps, max_tokens, max_bytes, num_train_epochs: there are max_steps, max_tokens",
        "r.yaml:9:38: there is no group 'embedings'; did you mean 'embeddings'? Groups: ",
        "r.yaml:9:65: phases[0].learning_rate = 2 is too large: at most 1",
        "r.yaml:10:5: phases[1]: missing key 'name': Names the phase in logs, checkpoints and result.json",
        "r.yaml:10:5: phases[1]: give exactly one of max_steps, max_tokens, max_bytes, num_train_epochs: there is none",
        "r.yaml:10:28: phases[1].trainable_parameters names something twice",
        'r.yaml:10:55: phases[1].learning_rate must be a number, not text ("fast")',
        'r.yaml:11:23: training.precision = "fp16" is not known. Allowed: float32, bf16_mixed, bf16_pure',
        "r.yaml:11:43: training.warmup_ratio = 1 is too large: it must be below 1",
        'r.yaml:11:57: training.report_to must be a list, not text ("wandb")',
        "r.yaml:11:84: 'fp16' follows from the recipe, the launcher or the run directory and cannot be set",
        "r.yaml:11:96: transformers.TrainingArguments has no field 'save_step'; did you mean 'save_steps'?",
        "r.yaml:12:1: unknown key 'speed'; did you mean 'seed'? Allowed here: data, description, extends, ",
    ]:
        assert expected in text, expected


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_shipped_recipe_names_its_schema_for_editors(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    if "fragment: true" not in text:
        line = next(line for line in text.splitlines() if "$schema=" in line)
        named = (recipe.parent / line.rpartition("$schema=")[2]).resolve()
        assert named.is_file()
        stage = next(line for line in text.splitlines() if line.startswith("stage: ")).removeprefix("stage: ")
        assert named.stem == stage


def walk(node: Any, at: str) -> Iterator[tuple[str, Any]]:
    """Every mapping of a schema file, with its path."""
    if isinstance(node, dict):
        yield at, node
    for key, inner in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from walk(inner, f"{at}.{key}")


NODES = [
    found
    for file in (ROOT / "schema").glob("*.json")
    if file.stem not in ("result", "plan")
    for found in walk(schema.load_schema(file.stem), file.stem)
]


def test_every_pattern_ends_where_the_text_ends() -> None:
    """In Python a `$` alone also matches before a last line break."""
    patterns = {at: node["pattern"] for at, node in NODES if isinstance(node.get("pattern"), str) and node["pattern"] != r"\S"}
    assert len(patterns) > 20
    assert {at: pattern for at, pattern in patterns.items() if not (pattern.startswith("^") and pattern.endswith(r"$(?!\n)"))} == {}


def test_every_number_has_bounds() -> None:
    numbers = {
        at: node
        for at, node in NODES
        if {"integer", "number"} & set([node.get("type")] if isinstance(node.get("type"), str) else node.get("type") or ())
    }
    del numbers["common.$defs.variables.additionalProperties"]
    assert len(numbers) > 60
    assert [at for at, node in numbers.items() if not node.keys() & {"maximum", "exclusiveMaximum"}] == []
    assert [at for at, node in numbers.items() if not node.keys() & {"minimum", "exclusiveMinimum"}] == []


BOUNDED = """\
stage: pretrain
project: p
model: {name_or_path: owner/model}
data: {max_length: 32, datasets: [{path: text.txt}], validation: {target: {path: heldout.txt}}}
phases: [{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1}]
"""


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("project: p", 'project: "p\\n"', 'r.yaml:2:10: project = "p\\n" must be letters, digits'),
        ("target:", '"target\\n":', "r.yaml:4:67: a key with a line break or another control character"),
        ("name: all", 'name: "all\\n"', 'r.yaml:5:17: phases[0].name = "all\\n" must be letters'),
        ("name_or_path: owner/model", 'output_of: "a.yaml\\n"', 'r.yaml:3:20: model.output_of = "a.yaml\\n" must be the file name of a recipe'),
        ("project: p", f"project: {'p' * 300}", "r.yaml:2:10: project has 300 characters: at most 100"),
        ("target:", f"{'t' * 300}:", "has 300 characters: at most 100"),
        ("max_steps: 1", "max_steps: 1e40", "r.yaml:5:83: phases[0].max_steps = 1e+40 is too large: at most 1000000000"),
        ("max_steps: 1", f"max_steps: 1{'0' * 900}", "is too large: at most 1000000000"),
        ("max_steps: 1", "max_steps: 1.5", "phases[0].max_steps must be a whole number, not a number (1.5)"),
        ("max_steps: 1", "num_train_epochs: 1e300", "phases[0].num_train_epochs = 1e+300 is too large: at most 1000000"),
        ("max_steps: 1", "max_bytes: 1e400", 'phases[0].max_bytes must be a whole number, not text ("1e400")'),
        ("1e-3", ".inf", 'phases[0].learning_rate must be a number, not text (".inf")'),
        ("1e-3", ".nan", 'phases[0].learning_rate must be a number, not text (".nan")'),
        ("1e-3", "nan", 'phases[0].learning_rate must be a number, not text ("nan")'),
        ("1e-3", "-1e-3", "phases[0].learning_rate = -0.001 is too small: it must be above 0"),
        ("path: text.txt", "path: text.txt, weight: 1e308", "data.datasets[0].weight = 1e+308 is too large"),
    ],
)  # fmt: skip
def test_a_name_or_a_number_beyond_its_bounds(old: str, new: str, message: str) -> None:
    write("r.yaml", BOUNDED.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.usefixtures("project")
def test_a_whole_number_may_be_written_as_a_power_of_ten() -> None:
    write("r.yaml", BOUNDED.replace("max_steps: 1", "max_steps: 1e3"))
    steps = load_recipe("r.yaml").config.phases[0].max_steps
    assert (steps, type(steps)) == (1000, int)
