"""Wrong mixes of sources are refused where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe.load import load_recipe
from tests.conftest import write

RECIPE = """\
stage: pretrain
project: small
model: {name_or_path: owner/model}
data:
  datasets:
    - {path: owner/web, id: web, weight: 8}
    - {path: owner/encyclopedia, id: clean}
    - {path: owner/english}
  validation: {target: {path: owner/held}}
phases:
  - {name: stable, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 9}
  - {name: anneal, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 1, data: {weights: {web: 1, clean: 9}}}
"""
WEIGHTS = "{web: 1, clean: 9}"
TWO = RECIPE.replace("    - {path: owner/english}\n", "")


def load(folder: Path, text: str) -> list[str]:
    """The problems of a recipe."""
    file = folder / "mix.yaml"
    write(file, text)
    try:
        load_recipe(file)
    except RecipeError as error:
        return [str(problem).removeprefix(f"{file}:") for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace(WEIGHTS, "{web: 1, claen: 9}"), "12:109: no source has the id 'claen'; did you mean 'clean'? Ids of data.datasets: clean, web"),
        (RECIPE.replace(WEIGHTS, "{wiki: 1}").replace("id: web, ", "").replace(", id: clean", ""), "12:101: no source has the id 'wiki'. No source of data.datasets has an id"),
        (RECIPE.replace("id: clean", "id: web").replace(WEIGHTS, "{web: 1}"), "7:38: two sources have the id 'web'; the other is at "),
        (TWO.replace(WEIGHTS, "{web: 0, clean: 0}"), "11:101: the weights of all sources are 0: this phase has nothing to read"),
        (RECIPE.replace(WEIGHTS, "{web: -1}"), "phases[1].data.weights.web = -1"),
        (RECIPE.replace(WEIGHTS, "{web: .nan}"), "12:106: "),
        (RECIPE.replace(WEIGHTS, "{web: much}"), "12:106: phases[1].data.weights.web"),
        (RECIPE.replace(WEIGHTS, "{}"), "12:100: phases[1].data.weights must not be empty"),
        (RECIPE.replace(f"weights: {WEIGHTS}", "weight: {web: 1}"), "did you mean 'weights'?"),
        (RECIPE.replace("weight: 8", "").replace("  validation", "  sampling_temperature: 2\n  validation"), "13:91: weights and data.sampling_temperature both determine how much"),
        (RECIPE.replace(WEIGHTS, "{web: 2}"), "7:38: the weights of no phase name the id 'clean': name it there, or remove the id"),
        (RECIPE.replace("id: clean", "id: 'clean text'"), "7:38: data.datasets[1].id"),
    ],
)  # fmt: skip
def test_a_wrong_mix_is_refused_at_its_place(tmp_path: Path, text: str, message: str) -> None:
    problems = load(tmp_path, text)
    assert any(message in line for line in problems), problems


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    text = RECIPE.replace("id: clean", "id: web").replace(WEIGHTS, "{wb: 1}")
    assert len(load(tmp_path, text)) == 3


def test_what_is_right_is_taken(tmp_path: Path) -> None:
    for text in (RECIPE, RECIPE.replace(WEIGHTS, "{web: 0, clean: 0}"), RECIPE.replace(f", data: {{weights: {WEIGHTS}}}", "")):
        assert load(tmp_path, text) == []
    config = load_recipe(tmp_path / "mix.yaml").config
    assert not config.changes_mix  # the ids alone change nothing
    write(tmp_path / "mix.yaml", RECIPE)
    config = load_recipe(tmp_path / "mix.yaml").config
    assert [config.list_weights(phase) for phase in config.phases] == [[8, 1, 1], [1, 9, 1]]
