"""A pipeline's steps: which recipe each one is once the pipeline's project, variables and `set:` are put in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from azrecipe.errors import CommandError, Problem, RecipeError, hint
from azrecipe.recipe.compose import compose, shown
from azrecipe.recipe.load import Recipe, load
from azrecipe.recipe.overrides import Override, split_keys
from azrecipe.recipe.yaml_tree import Node


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: the recipe, and the key that `--step` and `set:` know it by."""

    key: str
    recipe: Recipe


def load_pipeline(path: str | Path, overrides: Sequence[Override] = ()) -> tuple[Recipe, list[Step]]:
    """A pipeline and its steps; overrides that name a step (`sft.yaml:lora.r=8`) go to it. Raises RecipeError."""
    pipeline = load(path, [o for o in overrides if o.step is None])
    steps, problems = resolve(pipeline, [o for o in overrides if o.step is not None])
    if problems:
        raise RecipeError(problems)
    return pipeline, steps


def resolve(pipeline: Recipe, overrides: Sequence[Override] = ()) -> tuple[list[Step], list[Problem]]:
    """The steps of a loaded pipeline that can be loaded, and everything wrong in steps, `set:` and variables."""
    root = pipeline.tree
    node = root.get("steps")
    assert node is not None and isinstance(node.value, list)
    files: dict[str, tuple[Path, Node]] = {}
    problems: list[Problem] = []
    for item in node.value:
        file = Path(str(item.value))
        if file.name in files:
            first = files[file.name][1].place
            problems.append(Problem(item.place, f"a step is known by its file name, and '{file.name}' stands already at {first}"))
        files.setdefault(file.name, (file, item))
    problems += _unknown_step(root, overrides, set(files))
    variables = _variables(root)
    used = set(pipeline.used)
    steps: list[Step] = []
    for key, (file, item) in files.items():
        changes, wrong = _changes(root, key)
        problems += wrong
        changes += [Override(o.keys, o.node) for o in overrides if o.step == key]
        try:
            used |= set(compose(file).variables)
            recipe = load(file, changes, variables, pipeline.project)
            if recipe.stage == "pipeline":
                problems.append(Problem(item.place, "a pipeline cannot be a step of a pipeline"))
            steps.append(Step(key, recipe))
        except RecipeError as error:
            problems += error.problems
    for name, value in variables.items():
        if name not in used:
            problems.append(Problem(value.at, f"variable '{name}' is declared by no step{hint(name, used or ['none'], 'Declared')}"))
    return steps, problems


def _unknown_step(root: Node, overrides: Sequence[Override], known: set[str]) -> list[Problem]:
    node = root.get("set")
    named = [(key, n.at) for key, n in node.value.items()] if node and isinstance(node.value, dict) else []
    named += [(o.step, o.node.at) for o in overrides if o.step is not None]
    return [Problem(at, f"'{key}' is no step{hint(key, known, 'Steps')}") for key, at in named if key not in known]


def _changes(root: Node, step: str) -> tuple[list[Override], list[Problem]]:
    node = root.get("set", step)
    changes, problems = [], []
    for path, value in node.value.items() if node and isinstance(node.value, dict) else ():
        keys = split_keys(path)
        if keys is None:
            problems.append(Problem(value.at, f"'{path}' is no path of keys: write data.max_length, data.datasets[0].weight"))
        else:
            changes.append(Override(keys, value))
    return changes, problems


def _variables(root: Node) -> Mapping[str, Node]:
    node = root.get("variables")
    return node.value if node and isinstance(node.value, dict) else {}


def open_recipe(path: str | Path, overrides: Sequence[Override] = (), step: str | None = None) -> tuple[Recipe, list[Step]]:
    """What a command line names: a recipe, a pipeline with its steps, or with `step` one of them by itself.

    Returns the recipe and, for a pipeline run whole, its steps. Raises RecipeError or CommandError.
    """
    composed = compose(Path(path), [o for o in overrides if o.step is None])
    stage = composed.root.get("stage")
    if composed.fragment or stage is None or stage.value != "pipeline":
        if step is not None:
            raise CommandError(f"{shown(Path(path))}: --step names a step of a pipeline, and this is none")
        return load(path, overrides), []
    pipeline, steps = load_pipeline(path, overrides)
    if step is None:
        return pipeline, steps
    for each in steps:
        if step in (each.key, str(each.recipe.path)):
            return each.recipe, []
    known = [each.key for each in steps]
    raise CommandError(f"{shown(Path(path))}: there is no step '{step}'{hint(step, known, 'Steps')}")
