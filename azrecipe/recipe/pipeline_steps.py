"""A pipeline's steps: which recipe each one is once the pipeline's project, variables, `set:` and `matrix:` are put in."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from azrecipe.errors import CommandError, Problem, RecipeError, allowed, hint
from azrecipe.recipe import matrix
from azrecipe.recipe.compose import Composed, compose, shown
from azrecipe.recipe.load import Cell, Recipe, load
from azrecipe.recipe.overrides import Override, split_keys
from azrecipe.recipe.yaml_tree import Node


@dataclass(frozen=True)
class Step:
    """One step of a pipeline: the recipe, and the key that `--step`, `set:` and `matrix:` know it by."""

    key: str
    recipe: Recipe

    @property
    def cell(self) -> str | None:
        """The cell of the matrix that runs it; None for a step that runs once."""
        return self.recipe.cell.name if self.recipe.cell else None

    @property
    def title(self) -> str:
        """The step as a line of progress names it."""
        return f"{self.cell}: {self.key}" if self.cell else self.key


def load_pipeline(path: str | Path, overrides: Sequence[Override] = ()) -> tuple[Recipe, list[Step]]:
    """A pipeline and its steps; overrides that name a step (`sft.yaml:lora.r=8`) go to it. Raises RecipeError."""
    pipeline = load(path, [o for o in overrides if o.step is None])
    steps, problems = resolve(pipeline, [o for o in overrides if o.step is not None])
    if problems:
        raise RecipeError(problems)
    return pipeline, steps


def resolve(pipeline: Recipe, overrides: Sequence[Override] = ()) -> tuple[list[Step], list[Problem]]:
    """The steps of a loaded pipeline that can be loaded, and everything wrong in steps, changes to them and variables.

    In the order in which they run: the steps that run once, then those of each cell of the matrix.
    """
    root = pipeline.tree
    files, problems = _files(pipeline)
    problems += _unknown_step(root, overrides, set(files))
    cells, empty = _cells(root, list(files))
    problems += empty
    variables = _variables(root)
    used = set(pipeline.used)
    steps: list[Step] = []
    for cell, key in _plan(cells, list(files)):
        file, item = files[key]
        changes, wrong = _changes([root.get("set", key), root.get("matrix", cell.name, key) if cell else None])
        problems += wrong
        changes += [Override(o.keys, o.node) for o in overrides if o.step == key]
        try:
            used |= set(compose(file).variables)
            recipe = replace(load(file, changes, variables, pipeline.project), cell=cell)
            if recipe.stage == "pipeline":
                problems.append(Problem(item.place, "a pipeline cannot be a step of a pipeline"))
            steps.append(Step(key, recipe))
        except RecipeError as error:
            problems += error.problems
    for name, value in variables.items():
        if name not in used:
            problems.append(Problem(value.at, f"variable '{name}' is declared by no step{hint(name, used or ['none'], 'Declared')}"))
    if not problems:
        problems += [*_candidates(steps), *matrix.check(pipeline, of_cells(steps))]
    return steps, list(dict.fromkeys(problems))


def of_cells(steps: Iterable[Step]) -> dict[str, list[Recipe]]:
    """The recipes that each cell runs for itself, in order, by the cell's name."""
    found: dict[str, list[Recipe]] = {}
    for step in steps:
        if step.cell is not None:
            found.setdefault(step.cell, []).append(step.recipe)
    return found


def _files(pipeline: Recipe) -> tuple[dict[str, tuple[Path, Node]], list[Problem]]:
    """The steps' files and where they were named, by the steps' keys."""
    node = pipeline.tree.get("steps")
    assert node is not None and isinstance(node.value, list)
    files: dict[str, tuple[Path, Node]] = {}
    problems = []
    for item in node.value:
        file = Path(str(item.value))
        if file.name in files:
            first = files[file.name][1].place
            problems.append(Problem(item.place, f"a step is known by its file name, and '{file.name}' stands already at {first}"))
        if file.stem == pipeline.name:
            message = f"the run directory '{file.stem}' is the pipeline's own: give this step or the pipeline another file name"
            problems.append(Problem(item.place, message))
        files.setdefault(file.name, (file, item))
    return files, problems


def _cells(root: Node, keys: list[str]) -> tuple[list[Cell], list[Problem]]:
    """The cells of the matrix. Each repeats the steps from the first one that it names."""
    matrix = root.get("matrix")
    cells, problems = [], []
    for name, node in matrix.value.items() if matrix and isinstance(matrix.value, dict) else ():
        assert isinstance(node.value, dict)
        if not node.value:
            problems.append(Problem(node.at, f"cell '{name}' changes no step: name the first one that it repeats. Steps: {allowed(keys)}"))
        first = min((keys.index(key) for key in node.value if key in keys), default=len(keys))
        cells.append(Cell(name, frozenset(Path(key).stem for key in keys[first:])))
    return cells, problems


def _plan(cells: Sequence[Cell], keys: Sequence[str]) -> Iterator[tuple[Cell | None, str]]:
    """Which step runs in which cell, in order: first, once, what some cell does not repeat."""
    for key in keys:
        if not cells or any(Path(key).stem not in cell.recipes for cell in cells):
            yield None, key
    for cell in cells:
        yield from ((cell, key) for key in keys if Path(key).stem in cell.recipes)


def _unknown_step(root: Node, overrides: Sequence[Override], known: set[str]) -> list[Problem]:
    matrix = root.get("matrix")
    changed = [root.get("set"), *(matrix.value.values() if matrix and isinstance(matrix.value, dict) else ())]
    named = [(key, n.at) for node in changed if node and isinstance(node.value, dict) for key, n in node.value.items()]
    named += [(o.step, o.node.at) for o in overrides if o.step is not None]
    return [Problem(at, f"'{key}' is no step{hint(key, known, 'Steps')}") for key, at in named if key not in known]


def _changes(nodes: Iterable[Node | None]) -> tuple[list[Override], list[Problem]]:
    """What mappings of dotted keys to values change, in order; a later one wins."""
    changes, problems = [], []
    for node in nodes:
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


def _candidates(steps: Iterable[Step]) -> Iterator[Problem]:
    """Each `tokenizer.candidate` is one of the step's that it takes from, as far as that is a step."""
    seen: dict[tuple[str | None, str], Recipe] = {}
    for step in steps:
        name = _maker(step.recipe)
        maker = seen.get((step.recipe.cell_of(name.stem), name.stem)) if name else None
        if maker is not None:
            yield from _no_candidate(step.recipe, maker.stage, maker.data.get("candidates", ()))
        seen[step.cell, step.recipe.name] = step.recipe


def lone_candidate(recipe: Recipe) -> list[Problem]:
    """What is wrong with `tokenizer.candidate` by the tokenizer recipe as it stands in its file; nothing where that cannot be read."""
    maker = _maker(recipe)
    try:
        composed: Composed | None = compose(maker) if maker else None
    except RecipeError:
        return []
    stage, candidates = (composed.root.get("stage"), composed.root.get("candidates")) if composed else (None, None)
    if stage is None or composed is None or composed.fragment or composed.problems:
        return []
    known = candidates.value if candidates and isinstance(candidates.value, dict) else {}
    return list(_no_candidate(recipe, str(stage.value), known))


def _maker(recipe: Recipe) -> Path | None:
    """The recipe that a pretrain recipe's `tokenizer.candidate` is one of."""
    asked = recipe.config.tokenizer if recipe.stage == "pretrain" else None
    return Path(asked.output_of) if asked and asked.candidate is not None and asked.output_of is not None else None


def _no_candidate(recipe: Recipe, stage: str, known: Iterable[str]) -> Iterator[Problem]:
    name, file = recipe.config.tokenizer.candidate, Path(recipe.config.tokenizer.output_of).name
    place = recipe.place("tokenizer", "candidate")
    if stage != "tokenizer":
        yield Problem(place, f"{file} is a {stage} recipe, which has no candidates")
    elif name not in known:
        yield Problem(place, f"{file} has no candidate '{name}'{hint(name, known, 'Candidates')}")


def open_recipe(
    path: str | Path, overrides: Sequence[Override] = (), step: str | None = None, cell: str | None = None
) -> tuple[Recipe, list[Step]]:
    """What a command line names: a recipe, a pipeline with its steps, or with `step` one of them by itself.

    `cell` leaves of a matrix one cell, with the steps that run once. Returns the recipe and, for a pipeline that is
    not taken apart by `step`, its steps. Raises RecipeError or CommandError.
    """
    composed = compose(Path(path), [o for o in overrides if o.step is None])
    stage = composed.root.get("stage")
    if composed.fragment or stage is None or stage.value != "pipeline":
        if step is not None or cell is not None:
            option, what = ("--step", "a step") if step is not None else ("--cell", "a cell of the matrix")
            raise CommandError(f"{shown(Path(path))}: {option} names {what} of a pipeline, and this is none")
        return load(path, overrides), []
    pipeline, steps = load_pipeline(path, overrides)
    if cell is not None:
        steps = _of_cell(pipeline, steps, cell)
    return (pipeline, steps) if step is None else (_one(pipeline, steps, step, cell), [])


def _of_cell(pipeline: Recipe, steps: Sequence[Step], cell: str) -> list[Step]:
    """The steps that a cell needs: those that run once and that it takes from, and its own."""
    known = of_cells(steps)
    if cell not in known:
        tail = hint(cell, known, "Cells") if known else ": it has no matrix"
        raise CommandError(f"{shown(pipeline.path)}: there is no cell '{cell}'{tail}")
    own = {step.key for step in steps if step.cell == cell}
    return [step for step in steps if step.cell == cell or (step.cell is None and step.key not in own)]


def _one(pipeline: Recipe, steps: Sequence[Step], step: str, cell: str | None) -> Recipe:
    """The step that `--step` names: as the given cell runs it, or without one as it runs once for all."""
    named = [each for each in steps if step in (each.key, str(each.recipe.path))]
    found = next((each for each in named if each.cell is None or each.cell == cell), None)
    if found is not None:
        return found.recipe
    if named:
        cells = ", ".join(str(each.cell) for each in named)
        raise CommandError(f"{shown(pipeline.path)}: {step} runs in each cell of the matrix: say --cell, one of {cells}")
    raise CommandError(f"{shown(pipeline.path)}: there is no step '{step}'{hint(step, dict.fromkeys(s.key for s in steps), 'Steps')}")


def taken(data: object, keys: tuple[str | int, ...] = ()) -> list[tuple[tuple[str | int, ...], str]]:
    """Every `output_of` and `continue_from` in a resolved recipe, with its path of keys."""
    found: list[tuple[tuple[str | int, ...], str]] = []
    if isinstance(data, dict):
        for key, value in data.items():
            if key in ("output_of", "continue_from") and isinstance(value, str):
                found.append(((*keys, key), value))
            else:
                found += taken(value, (*keys, key))
    elif isinstance(data, list):
        for i, value in enumerate(data):
            found += taken(value, (*keys, i))
    return found
