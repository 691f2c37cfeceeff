"""A recipe's task files run no code unasked: no function, no metric of the hub, no escape from a template."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from azrecipe.errors import AzrecipeError, CommandError, RecipeError
from azrecipe.recipe.load import load_recipe
from tests.conftest import Done, write

pytest.importorskip("lm_eval")
from azrecipe.evaluation import task_code
from azrecipe.evaluation.lm_harness import Harness

RECIPE = """\
stage: evaluate
project: p
models: {base: {name_or_path: ./model}}
data: {max_length: 64, validation: {target: {path: heldout.txt}}}
tasks: [tasks/own.yaml]
"""
TASK = """\
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: rows.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ESCAPE = "{{ cycler.__init__.__globals__.os.popen('touch ran').read() }}"


@pytest.fixture
def load(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Load a recipe's tasks with this text as its task file; the function of code.py leaves a file `ran`."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
    monkeypatch.delenv("AZRECIPE_ALLOW_CODE", raising=False)
    write("tasks/rows.jsonl", "".join(json.dumps({"question": f"q{n}", "choices": ["a", "b"], "answer": 0}) + "\n" for n in range(3)))
    write("tasks/code.py", f"from pathlib import Path\nPath({str(project)!r}, 'ran').touch()\ndef text(row): return row['question']\n")
    write("recipe.yaml", RECIPE)

    def call(task: str) -> Any:
        write("tasks/own.yaml", task)
        return Harness(load_recipe("recipe.yaml")).load_tasks()

    return call


def test_a_plain_task_file_is_loaded(load: Callable[[str], Any]) -> None:
    assert load(TASK) == ["own"]


@pytest.mark.parametrize(
    ("task", "place"),
    [
        (TASK.replace('"{{question}}"', "!function code.text"), "tasks/own.yaml:6:14: !function code.text names a function"),
        (TASK + "include: part.yaml\n", "tasks/part.yaml:1:15: !function code.text names a function"),
        (TASK.replace("higher_is_better: true", "hf_evaluate: true"), "tasks/own.yaml:10:51: hf_evaluate: true downloads"),
        ("a: [\n", "tasks/own.yaml:2:1: not valid YAML"),
    ],
    ids=["function", "included", "hub metric", "broken"],
)
def test_code_is_refused_at_its_place(task: str, place: str, load: Callable[[str], Any]) -> None:
    write("tasks/part.yaml", "process_docs: !function code.text\n")
    with pytest.raises(RecipeError) as error:
        load(task)
    assert place in str(error.value) and not Path("ran").exists()


def test_check_refuses_it_before_anything_else_is_opened(load: Callable[[str], Any], cli: Callable[..., Done]) -> None:
    write("tasks/own.yaml", TASK.replace('"{{question}}"', "!function code.text"))
    done = cli("run", "recipe.yaml")
    assert done.code == 2 and "--allow-code" in done.text and not Path("ran").exists()


def test_the_option_allows_it(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZRECIPE_ALLOW_CODE", "1")
    assert load(TASK.replace('"{{question}}"', "!function code.text")) == ["own"] and Path("ran").exists()


def test_a_file_that_was_not_read_before_is_guarded_too(load: Callable[[str], Any], project: Path) -> None:
    from lm_eval.tasks import _yaml_loader

    load(TASK)
    other = write("tasks/other.yaml", "doc_to_text: !function code.text\n")
    with pytest.raises(CommandError, match=r"!function code\.text names a function"):
        _yaml_loader.load_yaml(other)
    assert not Path("ran").exists()
    package = Path(_yaml_loader.__file__).parent
    assert _yaml_loader._import_func_in_yml("os.path.join", package) is os.path.join


def test_a_metric_of_a_folder_is_not_run(load: Callable[[str], Any], project: Path) -> None:
    write("tasks/evil/evil.py", f"from pathlib import Path\nPath({str(project)!r}, 'ran').touch()\n")
    with pytest.raises(AzrecipeError, match=r"the metric '\./evil' is none of lm-evaluation-harness'"):
        load(TASK.replace("metric: acc", "metric: ./evil"))
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ ('a' * 40)|regex_replace('(a+)+b', '') }}",
        ESCAPE,
        "{{ 'a' * 10**10 }}",
        "{% set l = range(99999)|list %}{% for a in l %}{% for b in l %}{% endfor %}{% endfor %}",
    ],
)
def test_templates_are_rendered_in_a_limited_sandbox(template: str, load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_code, "PATTERN_SECONDS", 0.3)
    with pytest.raises(AzrecipeError, match="cannot load this task"):
        load(TASK.replace("{{question}}", template))
    assert not Path("ran").exists()


def test_a_regular_expression_without_end_is_refused_by_its_task(load: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.filters import build_filter_ensemble

    load(TASK)
    monkeypatch.setattr(task_code, "FILTER_SECONDS", 0.3)
    answers = [Instance("generate_until", {}, ("q", {}), 0, ("own", 0, 1), resps=["a" * 40])]
    build_filter_ensemble("plain", [("regex", {"regex_pattern": "(a+)"})]).apply(answers)
    assert answers[0].filtered_resps == {"plain": ["a" * 40]}
    with pytest.raises(
        CommandError, match="tasks: own: the filter 'strict' takes more than 0 seconds for 1 answers: its regular expression"
    ):
        build_filter_ensemble("strict", [("regex", {"regex_pattern": "(a+)+b"})]).apply(answers)
