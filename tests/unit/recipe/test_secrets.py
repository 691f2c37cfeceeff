"""A recipe with what looks like a secret is refused at its place, and nothing of it is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from azrecipe.errors import RecipeError
from azrecipe.recipe.pipeline_steps import open_recipe
from tests.conftest import Done, write
from tests.unit.utils.test_secret_scan import SECRETS

RECIPE = """\
stage: pretrain
project: p
description: {}
model: {{config: {{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1}}}}
tokenizer: {{family: llama3, vocab_size: 320}}
data: {{max_length: 64, datasets: [{{path: text.txt}}], validation: {{target: {{path: heldout.txt}}}}}}
phases: [{{name: all, trainable_parameters: [all], learning_rate: 1e-3, max_steps: 4}}]
training: {{global_batch_size: 4, per_device_train_batch_size: 4, precision: float32}}
"""


@pytest.mark.parametrize("verb", ["run", "check", "validate", "show"])
def test_every_verb_refuses_a_secret_and_leaves_nothing(verb: str, project: Path, cli: Callable[..., Done]) -> None:
    write("recipe.yaml", RECIPE.format(SECRETS["github_pat"]))
    done = cli(verb, "recipe.yaml")
    assert done.code == 2 and "recipe.yaml:3:14: description looks like a secret" in done.text and "allowlist secret" in done.text
    assert SECRETS["github_pat"] not in done.text and not Path("runs").exists()


@pytest.mark.parametrize("kind", ["hf", "glpat", "address", "google", "pem"])
def test_a_value_of_any_key_is_looked_at(kind: str, project: Path) -> None:
    value = SECRETS[kind]
    write("recipe.yaml", RECIPE.format("fine") + f"variables: {{where: '{value}'}}\n")
    with pytest.raises(RecipeError, match=r"variables\.where looks like a secret") as error:
        write("recipe.yaml", Path("recipe.yaml").read_text().replace("description: fine", "description: '${where}'"))
        open_recipe("recipe.yaml")
    assert value not in str(error.value)


def test_the_comment_and_the_variable_are_ways_out(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write("recipe.yaml", RECIPE.format(SECRETS["hf"] + "  # pragma: allowlist secret"))
    assert open_recipe("recipe.yaml")[0].data["description"] == SECRETS["hf"]
    write("recipe.yaml", RECIPE.format(SECRETS["hf"]))
    monkeypatch.setenv("AZRECIPE_ALLOW_SECRETS", "1")
    assert open_recipe("recipe.yaml")[0].data["description"] == SECRETS["hf"]


def test_commits_and_hashes_pass(project: Path) -> None:
    write("recipe.yaml", RECIPE.format("0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c").replace("{path: text.txt}", "{path: org/corpus, revision: 0f1e2d3c4b5a69788796a5b4c3d2e1f00f1e2d3c}"))  # fmt: skip
    assert open_recipe("recipe.yaml")[0].project == "p"
