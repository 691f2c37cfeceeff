"""docs/recipes.md says what schema/ says, and every recipe names the schema that an editor checks it by."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from azrecipe.recipe.reference import generate_reference
from azrecipe.recipe.schema import STAGES
from azrecipe.utils import environment_variables

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs" / "recipes.md"
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


def test_document_is_current() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == generate_reference(), "run: python -m azrecipe.recipe.reference > docs/recipes.md"


def _schema(name: str) -> Any:
    return json.loads((ROOT / "schema" / f"{name}.json").read_text(encoding="utf-8"))


def _paths(schema: Any, path: str = "") -> Iterator[str]:
    """Every key of a schema file with the path that leads to it; a $ref is not followed."""
    for key, below in schema.get("properties", {}).items():
        yield f"{path}.{key}" if path else key
        yield from _paths(below, f"{path}.{key}" if path else key)
    for suffix, keyword in (("[]", "items"), (".<name>", "additionalProperties")):
        if isinstance(schema.get(keyword), dict):
            yield from _paths(schema[keyword], path + suffix)


def _section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert found, f"no section '{title}'"
    return found[1]


def _keys(section: str) -> list[str]:
    """The keys in the first column of a section's tables."""
    return re.findall(r"^\| (?:<a id=\"\w+\"></a>|\[)?`([^`]+)`", section, re.MULTILINE)


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_of_a_stage_occurs_once(stage: str) -> None:
    keys = _keys(_section(f"stage: {stage}"))
    assert sorted(keys) == sorted(_paths(_schema(stage)))


@pytest.mark.parametrize("name", _schema("common")["$defs"])
def test_every_shared_definition_occurs(name: str) -> None:
    definition, section = _schema("common")["$defs"][name], _section("Shared keys")
    assert section.count(f'<a id="{name}"></a>') == 1
    if "properties" in definition:
        own = section.partition(f'<a id="{name}"></a>')[2].partition("<a id=")[0]
        assert sorted(_keys(own)) == sorted(_paths(definition))
    else:
        assert definition["description"].replace("|", "\\|").replace("<", "&lt;") in section


def test_links_lead_somewhere() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    headings = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in re.findall(r"^##+ (.*)$", text, re.MULTILINE)}
    anchors = set(re.findall(r'<a id="(\w+)"></a>', text))
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= headings | anchors
    for file in re.findall(r"\]\(([^)#]+)\)", text):
        assert (DOCUMENT.parent / file).is_file(), file


def test_every_table_row_has_five_cells() -> None:
    for line in generate_reference().partition("## How to read the tables")[2].splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) == 6, line


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_names_the_schema_of_its_stage(recipe: Path) -> None:
    text = recipe.read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    named = re.findall(r"^# yaml-language-server: \$schema=(\S+)$", text, re.MULTILINE)
    assert len(named) == 1
    if data.get("fragment"):
        assert (recipe.parent / named[0]).is_file(), "a fragment names the schema of a stage that has all its keys"
        return
    assert (recipe.parent / named[0]).resolve() == ROOT / "schema" / f"{data['stage']}.json"


def test_environment_document_is_current() -> None:
    command = "run: python -m azrecipe.utils.environment_variables > docs/environment.md"
    assert (ROOT / "docs" / "environment.md").read_text(encoding="utf-8") == environment_variables.generate_document(), command


def test_every_environment_variable_is_read_through_the_table() -> None:
    table = ROOT / "azrecipe" / "utils" / "environment_variables.py"
    for file in (ROOT / "azrecipe").rglob("*.py"):
        if file != table:
            assert not re.findall(r"""["']AZRECIPE_\w+["']""", file.read_text(encoding="utf-8")), f"{file}: use environment_variables"
    names = {variable.name for variable in environment_variables.VARIABLES}
    for file in [*(ROOT / "docs").glob("*.md"), *(ROOT / "azrecipe").rglob("*.py")]:
        assert set(re.findall(r"\bAZRECIPE_[A-Z_]+\b", file.read_text(encoding="utf-8"))) <= names, (
            f"{file}: a variable that is not in the table"
        )
