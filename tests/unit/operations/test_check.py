"""`check` of a pipeline that has not run: later steps are checked as deep as the recipes before them tell."""

from __future__ import annotations

from pathlib import Path

import pytest

from azrecipe.errors import RecipeError
from azrecipe.operations.check import check_recipes
from tests.conftest import jsonl, write
from tests.small import RECIPES, fill

JINJA = "{% for message in messages %}{{ message.content }}{% endfor %}"


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)


def refuse(*sets: str, recipe: str = "pipeline.yaml") -> str:
    with pytest.raises(RecipeError) as caught:
        check_recipes(recipe, overrides=sets)
    assert all(problem.location.file for problem in caught.value.problems)
    return str(caught.value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sft.yaml:lora.target_modules=[q_prj]", "lora.target_modules: no linear layer is called 'q_prj'; did you mean 'q_proj'?"),
        ("sft.yaml:chat_template=mine.jinja", "does not mark the assistant's text"),
        ("sft.yaml:data.datasets[0].path=wrong.jsonl", "wrong.jsonl:1:1: message 1: unknown role 'human'"),
        (
            "cpt.yaml:phases[0].trainable_parameters=['layers\\.9\\.']",
            "trainable_parameters: layers\\.9\\. matches no parameter of this model",
        ),
        ("cpt.yaml:data.datasets[0].text_column=txt", "no column 'txt'; did you mean 'text'?"),
        ("cpt.yaml:data.validation.target.text_column=txt", "held.jsonl:1:1: no column 'txt'; did you mean 'text'?"),
        ("tokenizer.yaml:data.datasets[0].text_column=txt", "azerbaijani.jsonl:1:1: no column 'txt'; did you mean 'text'?"),
        ("evaluate.yaml:data.validation.target.text_column=txt", "held.jsonl:1:1: no column 'txt'; did you mean 'text'?"),
        ("evaluate.yaml:tasks=[./mine.yaml]", "no such task file"),
    ],
)
def test_a_later_step_is_refused_before_the_first_has_run(change: str, message: str) -> None:
    write("mine.jinja", JINJA)
    write("wrong.jsonl", jsonl({"messages": [{"role": "human", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    assert message in refuse(change)
    assert not Path("runs/small").exists(), "only the cache"


@pytest.mark.usefixtures("small")
def test_a_pipeline_that_is_right_passes_and_says_what_waits() -> None:
    report = check_recipes("pipeline.yaml")
    assert [bool(check.missing_runs) for check in report.recipes] == [False, True, True, True, True]
    keep = "extends: sft.yaml\nmodel: {output_of: sft.yaml}\nchat_template: keep\n"
    write("more.yaml", keep)
    write("pipeline.yaml", RECIPES["pipeline"].replace("sft.yaml,", "sft.yaml, more.yaml,"))
    assert len(check_recipes("pipeline.yaml").recipes) == 6, "the template of the sft before it is kept"


def test_a_tokenizer_recipe_is_checked_by_itself(llama: Path, small: None) -> None:
    sets = ["tokenizer.output_of=null", f"tokenizer.name_or_path={llama}"]
    assert check_recipes("tokenizer.yaml", overrides=sets).is_complete
    assert "no column 'txt'; did you mean 'text'?" in refuse(*sets, "data.datasets[1].text_column=txt", recipe="tokenizer.yaml")
    assert "candidates.custom.vocab_size = 257 is too small" in refuse(*sets, "candidates.custom.vocab_size=257", recipe="tokenizer.yaml")
