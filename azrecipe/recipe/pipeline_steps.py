"""Resolve a pipeline's steps into recipes.

The pipeline's project, variables, `set:` and `matrix:` are applied to each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from azrecipe.errors import CommandError, Problem, RecipeError, list_choices, suggest_choices
from azrecipe.recipe import matrix, stage_outputs
from azrecipe.recipe.compose import ComposedRecipe, compose_recipe, display_path
from azrecipe.recipe.load import MatrixCell, Recipe, load_recipe
from azrecipe.recipe.overrides import Override, parse_key_path
from azrecipe.recipe.secrets import check_secrets
from azrecipe.recipe.yaml_tree import YamlNode


@dataclass(frozen=True)
class PipelineStep:
    """One step of a pipeline."""

    key: str  # its name in `--step`, `set:` and `matrix:`
    recipe: Recipe

    @property
    def cell(self) -> str | None:
        """The matrix cell that runs it; None: it runs once."""
        return self.recipe.cell.name if self.recipe.cell else None

    @property
    def title(self) -> str:
        """The step's name in progress messages."""
        return f"{self.cell}: {self.key}" if self.cell else self.key


def load_pipeline(path: str | Path, overrides: Sequence[Override] = ()) -> tuple[Recipe, list[PipelineStep]]:
    """Load a pipeline and its steps.

    Overrides that name a step (`sft.yaml:lora.r=8`) change that step. Raises RecipeError.
    """
    pipeline = load_recipe(path, [o for o in overrides if o.step is None])
    steps, problems = resolve_steps(pipeline, [o for o in overrides if o.step is not None])
    if problems:
        raise RecipeError(problems)
    return pipeline, steps


def resolve_steps(pipeline: Recipe, overrides: Sequence[Override] = ()) -> tuple[list[PipelineStep], list[Problem]]:
    """Return the steps of a pipeline that load, and all problems.

    Problems are those of steps, of changes to them and of variables. The steps are in the order in which they run: those that
    run once, then those of each cell of the matrix.
    """
    root = pipeline.tree
    files, problems = _load_files(pipeline)
    problems += _check_step_names(root, overrides, set(files))
    cells, cell_problems = _load_cells(root, list(files))
    problems += cell_problems
    variables = _get_variables(root)
    declared = set(pipeline.used_variables)
    steps: list[PipelineStep] = []
    for cell, key in _order_steps(cells, list(files)):
        file, item = files[key]
        changes, change_problems = _parse_changes([root.get("set", key), root.get("matrix", cell.name, key) if cell else None])
        problems += change_problems
        changes += [Override(o.keys, o.node) for o in overrides if o.step == key]
        try:
            declared |= set(compose_recipe(file).variables)
            recipe = replace(load_recipe(file, changes, variables, pipeline.project), cell=cell)
            if recipe.stage == "pipeline":
                problems.append(Problem(item.location, "a pipeline cannot be a step of a pipeline"))
            steps.append(PipelineStep(key, recipe))
        except RecipeError as error:
            problems += error.problems
    for name, value in variables.items():
        if name not in declared:
            advice = suggest_choices(name, declared or ["none"], "Declared")
            problems.append(Problem(value.entry_location, f"variable '{name}' is declared by no step{advice}"))
    problems += stage_outputs.check_steps(step.recipe for step in steps)
    if not problems:
        problems += [*_check_candidates(steps), *matrix.check_comparison(pipeline, group_by_cell(steps))]
    return steps, list(dict.fromkeys(problems))


def group_by_cell(steps: Iterable[PipelineStep]) -> dict[str, list[Recipe]]:
    """Return the recipes that each cell runs for itself, in order.

    The keys are the names of the cells.
    """
    recipes: dict[str, list[Recipe]] = {}
    for step in steps:
        if step.cell is not None:
            recipes.setdefault(step.cell, []).append(step.recipe)
    return recipes


def _load_files(pipeline: Recipe) -> tuple[dict[str, tuple[Path, YamlNode]], list[Problem]]:
    """Return the file and the node of each step, by its key."""
    node = pipeline.tree.get("steps")
    assert node is not None and isinstance(node.value, list)
    files: dict[str, tuple[Path, YamlNode]] = {}
    problems = []
    for item in node.value:
        file = Path(str(item.value))
        if file.name in files:
            first = files[file.name][1].location
            problems.append(Problem(item.location, f"the file name identifies a step, and '{file.name}' is already at {first}"))
        if file.stem == pipeline.name:
            message = f"the run directory '{file.stem}' belongs to the pipeline: give this step or the pipeline another file name"
            problems.append(Problem(item.location, message))
        files.setdefault(file.name, (file, item))
    return files, problems


def _load_cells(root: YamlNode, keys: list[str]) -> tuple[list[MatrixCell], list[Problem]]:
    """Return the cells of the matrix.

    Each repeats the steps from the first one that it names.
    """
    matrix = root.get("matrix")
    cells, problems = [], []
    by_changes: dict[object, str] = {}
    by_folder: dict[str, str] = {}  # names in small letters
    for name, node in matrix.value.items() if matrix and isinstance(matrix.value, dict) else ():
        assert isinstance(node.value, dict)
        if not node.value:
            message = f"cell '{name}' changes no step: name the first one that it repeats. Steps: {list_choices(keys)}"
            problems.append(Problem(node.entry_location, message))
        first = min((keys.index(key) for key in node.value if key in keys), default=len(keys))
        equal = by_changes.setdefault(_freeze(node.to_plain()), name)
        if equal != name and node.value:
            problems.append(Problem(node.entry_location, f"cell '{name}' changes the same as cell '{equal}': remove one of them"))
        similar = by_folder.setdefault(name.lower(), name)
        if similar != name:
            message = f"cell '{name}' differs from '{similar}' in case only, and both name folders: give one another name"
            problems.append(Problem(node.entry_location, message))
        cells.append(MatrixCell(name, frozenset(Path(key).stem for key in keys[first:])))
    return cells, problems


def _freeze(value: Any) -> Any:
    """Return plain data that can be a key; equal data are equal keys."""
    if isinstance(value, dict):
        return frozenset((key, _freeze(item)) for key, item in value.items())
    return tuple(map(_freeze, value)) if isinstance(value, list) else value


def _order_steps(cells: Sequence[MatrixCell], keys: Sequence[str]) -> Iterator[tuple[MatrixCell | None, str]]:
    """Yield the cell and the key of each step, in order.

    A step that some cell does not repeat runs once, before the cells.
    """
    for key in keys:
        if not cells or any(Path(key).stem not in cell.recipes for cell in cells):
            yield None, key
    for cell in cells:
        yield from ((cell, key) for key in keys if Path(key).stem in cell.recipes)


def _check_step_names(root: YamlNode, overrides: Sequence[Override], step_keys: set[str]) -> list[Problem]:
    matrix = root.get("matrix")
    nodes = [root.get("set"), *(matrix.value.values() if matrix and isinstance(matrix.value, dict) else ())]
    names = [(key, n.entry_location) for node in nodes if node and isinstance(node.value, dict) for key, n in node.value.items()]
    names += [(o.step, o.node.entry_location) for o in overrides if o.step is not None]
    return [
        Problem(location, f"'{key}' is no step{suggest_choices(key, step_keys, 'Steps')}")
        for key, location in names
        if key not in step_keys
    ]


def _parse_changes(nodes: Iterable[YamlNode | None]) -> tuple[list[Override], list[Problem]]:
    """Parse mappings of key paths to values; a later one wins."""
    changes, problems = [], []
    for node in nodes:
        for path, value in node.value.items() if node and isinstance(node.value, dict) else ():
            keys = parse_key_path(path)
            if keys is None:
                problems.append(
                    Problem(value.entry_location, f"'{path}' is no path of keys: write data.max_length, data.datasets[0].weight")
                )
            else:
                changes.append(Override(keys, value))
    return changes, problems


def _get_variables(root: YamlNode) -> Mapping[str, YamlNode]:
    node = root.get("variables")
    return node.value if node and isinstance(node.value, dict) else {}


def _check_candidates(steps: Iterable[PipelineStep]) -> Iterator[Problem]:
    """Check each `tokenizer.candidate` against its tokenizer step, if any."""
    earlier: dict[tuple[str | None, str], Recipe] = {}
    for step in steps:
        file = _get_tokenizer_file(step.recipe)
        tokenizer = earlier.get((step.recipe.find_cell(file.stem), file.stem)) if file else None
        if tokenizer is not None:
            yield from _check_candidate_name(step.recipe, tokenizer.stage, tokenizer.data.get("candidates", ()))
        earlier[step.cell, step.recipe.name] = step.recipe


def check_upstream(recipe: Recipe) -> list[Problem]:
    """Check what a single recipe takes from others against their files."""
    return list(stage_outputs.check_references(recipe, stage_outputs.describe_file)) or _check_candidate(recipe)


def _check_candidate(recipe: Recipe) -> list[Problem]:
    """Check `tokenizer.candidate` against the file of the tokenizer recipe.

    Returns no problem where that file cannot be read.
    """
    file = _get_tokenizer_file(recipe)
    try:
        composed: ComposedRecipe | None = compose_recipe(file) if file else None
    except RecipeError:
        return []
    stage, candidates = (composed.root.get("stage"), composed.root.get("candidates")) if composed else (None, None)
    if stage is None or composed is None or composed.is_fragment or composed.problems:
        return []
    names = candidates.value if candidates and isinstance(candidates.value, dict) else {}
    return list(_check_candidate_name(recipe, str(stage.value), names))


def _get_tokenizer_file(recipe: Recipe) -> Path | None:
    """Return the tokenizer recipe that `tokenizer.candidate` refers to."""
    tokenizer = recipe.config.tokenizer if recipe.stage == "pretrain" else None
    return Path(tokenizer.output_of) if tokenizer and tokenizer.candidate is not None and tokenizer.output_of is not None else None


def _check_candidate_name(recipe: Recipe, stage: str, candidates: Iterable[str]) -> Iterator[Problem]:
    name, file = recipe.config.tokenizer.candidate, Path(recipe.config.tokenizer.output_of).name
    location = recipe.locate("tokenizer", "candidate")
    if stage != "tokenizer":
        yield Problem(location, f"{file} is a {stage} recipe, which has no candidates")
    elif name not in candidates:
        yield Problem(location, f"{file} has no candidate '{name}'{suggest_choices(name, candidates, 'Candidates')}")


def open_recipe(
    path: str | Path, overrides: Sequence[Override] = (), step: str | None = None, cell: str | None = None
) -> tuple[Recipe, list[PipelineStep]]:
    """Load the recipe, pipeline or step that a command line names.

    Args:
        path: A recipe or a pipeline.
        overrides: Values that replace those of the recipe or of its steps.
        step: Load this step of the pipeline only.
        cell: Load the steps of this cell, and those that run once.

    Returns:
        The recipe and its steps. Only a pipeline that is loaded without `step` has steps.

    Raises:
        RecipeError: A recipe is wrong, or holds what looks like a secret.
        CommandError: There is no such step or cell.
    """
    composed = compose_recipe(Path(path), [o for o in overrides if o.step is None])
    stage = composed.root.get("stage")
    if composed.is_fragment or stage is None or stage.value != "pipeline":
        if step is not None or cell is not None:
            option, subject = ("--step", "a step") if step is not None else ("--cell", "a cell of the matrix")
            raise CommandError(f"{display_path(Path(path))}: {option} names {subject} of a pipeline, and this is none")
        recipe = load_recipe(path, overrides)
        if problems := list(stage_outputs.check_references(recipe, stage_outputs.describe_file)):
            raise RecipeError(problems)
        check_secrets([recipe])
        return recipe, []
    pipeline, steps = load_pipeline(path, overrides)
    check_secrets([pipeline, *(step.recipe for step in steps)])
    if cell is not None:
        steps = _select_cell(pipeline, steps, cell)
    return (pipeline, steps) if step is None else (_select_step(pipeline, steps, step, cell), [])


def _select_cell(pipeline: Recipe, steps: Sequence[PipelineStep], cell: str) -> list[PipelineStep]:
    """Return a cell's steps, and those that run once for all cells."""
    cells = group_by_cell(steps)
    if cell not in cells:
        advice = suggest_choices(cell, cells, "Cells") if cells else ": it has no matrix"
        raise CommandError(f"{display_path(pipeline.path)}: there is no cell '{cell}'{advice}")
    cell_keys = {step.key for step in steps if step.cell == cell}
    return [step for step in steps if step.cell == cell or (step.cell is None and step.key not in cell_keys)]


def _select_step(pipeline: Recipe, steps: Sequence[PipelineStep], name: str, cell: str | None) -> Recipe:
    """Return the step that `--step` names.

    It is the step of the cell or, without a cell, the step that runs once.
    """
    matches = [step for step in steps if name in (step.key, str(step.recipe.path))]
    match = next((step for step in matches if step.cell is None or step.cell == cell), None)
    if match is not None:
        return match.recipe
    if matches:
        cells = ", ".join(str(step.cell) for step in matches)
        raise CommandError(f"{display_path(pipeline.path)}: {name} runs in each cell of the matrix: say --cell, one of {cells}")
    advice = suggest_choices(name, dict.fromkeys(step.key for step in steps), "Steps")
    raise CommandError(f"{display_path(pipeline.path)}: there is no step '{name}'{advice}")


def find_upstream_references(data: object, keys: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], str]]:
    """Return every `output_of` and `continue_from` in a resolved recipe.

    Each comes with its path of keys.
    """
    references: list[tuple[tuple[str | int, ...], str]] = []
    if isinstance(data, dict):
        for key, value in data.items():
            if key in ("output_of", "continue_from") and isinstance(value, str):
                references.append(((*keys, key), value))
            else:
                references += find_upstream_references(value, (*keys, key))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            references += find_upstream_references(value, (*keys, i))
    return references
