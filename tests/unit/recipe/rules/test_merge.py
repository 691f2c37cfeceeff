"""Wrong merge recipes are refused where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe.load import load_recipe
from tests.conftest import write

RECIPE = """\
stage: merge
project: small
method: task_arithmetic
models:
  adapted: {name_or_path: some/adapted}
  chat: {name_or_path: some/chat, weight: 0.5}
base: {name_or_path: some/base}
"""
LINEAR = RECIPE.replace("task_arithmetic", "linear").replace("base: {name_or_path: some/base}\n", "")


def refuse(folder: Path, text: str) -> list[str]:
    file = folder / "merge.yaml"
    write(file, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    return [str(problem).removeprefix(f"{file}:") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (RECIPE.replace("base: {name_or_path: some/base}\n", ""), "3:9: method: task_arithmetic needs a base: add base"),
        (LINEAR + "base: {name_or_path: some/base}\n", "7:1: base is for task_arithmetic, ties, dare_ties, and the method is linear"),
        (RECIPE.replace("task_arithmetic", "linaer"), '3:9: method = "linaer" is not known; did you mean \'linear\'?'),
        (RECIPE + "density: 0.5\n", "8:1: density is for ties and dare_ties, and the method is task_arithmetic"),
        (RECIPE + "tokenizer_of: adopted\n", "8:15: tokenizer_of names no model: 'adopted'; did you mean 'adapted'?"),
        (RECIPE + "special_tokens_from: chta\n", "8:22: special_tokens_from names no model: 'chta'; did you mean 'chat'?"),
        (RECIPE.replace("adapted:", "base:"), "5:3: a model cannot be called base"),
        (LINEAR.replace("weight: 0.5", "weight: -0.5"), "6:43: the weight of chat is below 0, and method: linear takes a mean"),
        (LINEAR.replace("0.5", "0").replace("adapted}", "adapted, weight: 0}"), "4:1: all weights are 0"),
        (LINEAR.replace("  chat: {name_or_path: some/chat, weight: 0.5}\n", ""), "4:1: method: linear needs at least two models: there is 1"),
        (LINEAR.replace("linear", "slerp") + "  third: {name_or_path: some/third}\n", "4:1: method: slerp merges two models: there are 3"),
        (RECIPE.replace("weight: 0.5", "weight: 0.5, weights: {all: 1}"), "6:35: give weight or weights"),
        (RECIPE.replace("weight: 0.5", "weights: {\"layer[:2]\": 1}"), "there is no group 'layer[:2]'; did you mean 'layers[:2]'?"),
        (RECIPE.replace("weight: 0.5", "weights: {}"), "models.chat.weights must not be empty"),
        (RECIPE.replace("weight: 0.5", "weights: {new_tokens: 1}"), "new_tokens is a part of a matrix: write embeddings"),
        (RECIPE.replace("some/chat", "some/adapted").replace(", weight: 0.5", ""), "6:3: 'chat' is the same model as 'adapted': name it once"),
    ],
)  # fmt: skip
def test_a_wrong_recipe_is_refused_at_its_place(tmp_path: Path, text: str, message: str) -> None:
    assert any(message in line for line in refuse(tmp_path, text)), refuse(tmp_path, text)


def test_the_recipe_itself_is_right(tmp_path: Path) -> None:
    for text in (RECIPE, LINEAR):
        write(tmp_path / "merge.yaml", text)
        assert load_recipe(tmp_path / "merge.yaml").config.models["chat"].weight == 0.5
