"""Select the recipes and the text that rank a matrix' cells."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from azrecipe.errors import Problem, suggest_choices
from azrecipe.recipe.load import Recipe


def select_lineage(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Return the pretrain recipes that train a cell's last model, in order."""
    remaining = {recipe.name: recipe for recipe in recipes if recipe.stage == "pretrain"}
    selected: list[Recipe] = []
    name = next(reversed(remaining), None)
    while name in remaining:  # each recipe is removed once, so a circle of recipes ends
        selected.insert(0, remaining.pop(name))
        output_of = selected[0].config.model.output_of
        name = Path(output_of).stem if output_of else None
    return selected


def get_ranking_dataset(pipeline: Recipe, cells: Mapping[str, Sequence[Recipe]]) -> str:
    """Return the name of the validation set that ranks the cells.

    By default it is the first one of the first cell's last pretrain step.
    """
    dataset_name: str | None = pipeline.config.compare.dataset
    return dataset_name or next(iter(select_lineage(next(iter(cells.values())))[-1].config.data.validation))


def check_comparison(pipeline: Recipe, cells: Mapping[str, Sequence[Recipe]]) -> Iterator[Problem]:
    """Find the problems that prevent a ranking of the cells.

    `cells` maps the name of each cell to its recipes.
    """
    if pipeline.config.compare is None:
        return
    last_recipes = {name: select_lineage(recipes)[-1:] for name, recipes in cells.items()}
    without_pretrain = [name for name, recipes in last_recipes.items() if not recipes]
    for name in without_pretrain:
        message = f"cell '{name}' repeats no pretrain step: compare has no bits per byte of its own to rank it by"
        yield Problem(pipeline.tree.find_nearest(("matrix", name)).entry_location, message)
    if without_pretrain:
        return
    dataset_name = get_ranking_dataset(pipeline, cells)
    validation = {name: recipe.data["data"]["validation"] for name, (recipe,) in last_recipes.items()}
    without_dataset = [name for name, sets in validation.items() if dataset_name not in sets]
    for name in without_dataset[:1] if pipeline.config.compare.dataset else without_dataset:
        advice = suggest_choices(dataset_name, validation[name], "Validation sets")
        message = f"cell '{name}' has no validation set '{dataset_name}' to be compared on{advice}"
        yield Problem(pipeline.locate("compare", "dataset"), message)
    if without_dataset:
        return
    first = next(iter(cells))
    for name, (recipe,) in last_recipes.items():
        if validation[name][dataset_name] != validation[first][dataset_name]:
            message = f"cell '{name}' measures another text as '{dataset_name}' than cell '{first}': their bits per byte cannot be ranked"
            yield Problem(recipe.locate("data", "validation", dataset_name), message)
