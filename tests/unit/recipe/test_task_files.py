"""Task files are read with what they include, and code that they name is found at its place."""

from __future__ import annotations

from pathlib import Path

from azrecipe.recipe.task_files import read_task_files
from tests.conftest import write


def test_functions_are_found_in_included_files_too(tmp_path: Path) -> None:
    write(tmp_path / "task.yaml", "task: t\ninclude: parts/common.yaml\ndataset_kwargs: {data_files: {test: [a.jsonl, b.jsonl]}}\n")
    write(tmp_path / "parts/common.yaml", "process_docs: !function helper.clean\nmetric_list:\n  - {metric: acc, hf_evaluate: true}\n")
    write(tmp_path / "parts/helper.py", "raise SystemExit('it ran')")
    task = read_task_files(tmp_path / "task.yaml")
    assert [file.name for file in task.files] == ["task.yaml", "common.yaml"]
    assert [file.name for file in task.data_files] == ["a.jsonl", "b.jsonl"] and [file.name for file in task.modules] == ["helper.py"]
    assert [(problem.location.line, problem.location.column) for problem in task.functions] == [(1, 15), (3, 32)]
    assert "--allow-code" in task.functions[0].message and "helper.clean" in task.functions[0].message and not task.problems


def test_a_circle_of_includes_and_aliases_ends(tmp_path: Path) -> None:
    write(tmp_path / "task.yaml", "a: &a [*a]\ninclude: task.yaml\n")
    assert len(read_task_files(tmp_path / "task.yaml").files) == 1


def test_damaged_files_have_a_place(tmp_path: Path) -> None:
    for text, place in {"a: [": "task.yaml:2:1", "- a": "task.yaml:1:1", "include: none.yaml": "task.yaml:1:10"}.items():
        (problem,) = read_task_files(write(tmp_path / "task.yaml", text + "\n")).problems
        assert str(problem).startswith(f"{tmp_path}/{place}: "), problem
    write(tmp_path / "task.yaml", "x: !!python/object/apply:os.system [echo]\n")
    assert "python/object/apply:os.system" in str(read_task_files(tmp_path / "task.yaml").functions[0])
