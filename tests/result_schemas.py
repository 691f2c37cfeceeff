"""result.json and plan.json are what schema/ says, wherever a test runs something."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from tests.conftest import ROOT


@cache
def load_validator(name: str) -> Draft202012Validator:
    """schema/<name>.json; of results, that of one stage: result/<stage>, which gives messages of that stage only."""
    file, _, stage = name.partition("/")
    schema = json.loads((ROOT / "schema" / f"{file}.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator({"$ref": f"#/$defs/{stage}", "$defs": schema["$defs"]} if stage else schema)


def list_problems(name: str, content: Any) -> list[str]:
    """Every problem of a file's content with its schema."""
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in load_validator(name).iter_errors(content)]


def check_written_files(run: Path) -> None:
    """Check the result.json and the plan.json of a run, and of the steps of a pipeline."""
    folders = [run]
    if (run / "steps.json").exists():
        folders += [run.parent / step["run"] for step in json.loads((run / "steps.json").read_text(encoding="utf-8"))["steps"]]
    for folder in folders:
        if (folder / "result.json").exists():
            content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            problems = list_problems(f"result/{content['stage']}", content) + list_problems("result", content)
            assert not problems, f"{folder / 'result.json'}: {problems[:5]}"
        if (folder / "plan.json").exists():
            problems = list_problems("plan", json.loads((folder / "plan.json").read_text(encoding="utf-8")))
            assert not problems, f"{folder / 'plan.json'}: {problems[:5]}"
