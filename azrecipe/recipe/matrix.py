"""What the cells of a pipeline's matrix are compared by: which recipes of a cell count, and on which held-out text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from azrecipe.errors import Problem, hint
from azrecipe.recipe.load import Recipe


def lineage(recipes: Sequence[Recipe]) -> list[Recipe]:
    """The pretrain recipes of a cell that made the model of its last one, that one included, in the order they ran."""
    earlier = {recipe.name: recipe for recipe in recipes if recipe.stage == "pretrain"}
    found: list[Recipe] = []
    name = next(reversed(earlier), None)
    while name in earlier:  # a name leaves the mapping once it was taken, so a circle of recipes ends
        found.insert(0, earlier.pop(name))
        output_of = found[0].config.model.output_of
        name = Path(output_of).stem if output_of else None
    return found


def dataset(pipeline: Recipe, cells: Mapping[str, Sequence[Recipe]]) -> str:
    """The validation set that cells are ranked by: the one asked for, or the first of the first cell's last pretrain step."""
    asked: str | None = pipeline.config.compare.dataset
    return asked or next(iter(lineage(next(iter(cells.values())))[-1].config.data.validation))


def check(pipeline: Recipe, cells: Mapping[str, Sequence[Recipe]]) -> Iterator[Problem]:
    """What keeps a pipeline's cells, each given with the recipes of its own, from being ranked."""
    if pipeline.config.compare is None:
        return
    last = {name: lineage(recipes)[-1:] for name, recipes in cells.items()}
    idle = [name for name, found in last.items() if not found]
    for name in idle:
        message = f"cell '{name}' repeats no pretrain step: compare has no bits per byte of its own to rank it by"
        yield Problem(pipeline.tree.nearest(("matrix", name)).at, message)
    if idle:
        return
    ranked = dataset(pipeline, cells)
    held_out = {name: found[0].data["data"]["validation"] for name, found in last.items()}
    lacking = [name for name, sets in held_out.items() if ranked not in sets]
    for name in lacking[:1] if pipeline.config.compare.dataset else lacking:
        message = f"cell '{name}' has no validation set '{ranked}' to be compared on{hint(ranked, held_out[name], 'Validation sets')}"
        yield Problem(pipeline.place("compare", "dataset"), message)
    if lacking:
        return
    first = next(iter(cells))
    for name, (recipe,) in last.items():
        if held_out[name][ranked] != held_out[first][ranked]:
            message = f"cell '{name}' measures another text as '{ranked}' than cell '{first}': their bits per byte cannot be ranked"
            yield Problem(recipe.place("data", "validation", ranked), message)
