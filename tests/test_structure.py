"""The architecture, read from the imports: arrows point down only, nothing goes in a circle, the front door is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "azrecipe"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "_shipped" not in path.parts
}
# From the top down. A module may import what stands below its own layer; layers on one line do not know each other.
LAYERS = (
    ("__main__",),
    ("cli",),
    ("pipeline",),
    ("launch", "plan", "report", "using"),
    ("stages",),
    ("parts",),
    ("recipe",),
    ("errors",),
    ("",),
)
INSIDE = ("launch", "parts", "plan", "recipe", "report", "using")  # layers whose modules may import each other
LIGHT = ("recipe", "launch", "cli", "errors", "pipeline", "plan", "report", "using")
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "liger_kernel"}
MAX_LINES = 400
MAX_ARGUMENTS = 5


def _tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _names(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that an import statement names; `from azrecipe.parts import files` names azrecipe.parts.files."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0 and node.module, f"{module}: line {node.lineno}: a relative import"
    for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        yield whole if whole in MODULES else node.module


def imports(module: str) -> set[str]:
    """Every module that a module imports anywhere in it: at the top, in functions and for type checking."""
    nodes = (node for node in ast.walk(_tree(module)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {name for node in nodes for name in _names(module, node)} - {module}


def own(module: str) -> set[str]:
    return {name for name in imports(module) if name.partition(".")[0] == "azrecipe"}


def layer(module: str) -> str:
    return module.removeprefix("azrecipe").removeprefix(".").partition(".")[0]


def rank(name: str) -> int:
    found = [i for i, names in enumerate(LAYERS) if name in names]
    assert found, f"azrecipe/{name} stands in no layer"
    return found[0]


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down_only(module: str) -> None:
    here = layer(module)
    for imported in own(module):
        assert imported in MODULES, f"{module} imports {imported}, which is not there"
        there = layer(imported)
        if there == here:
            assert here in INSIDE, f"{module} imports its neighbour {imported}"
        else:
            assert rank(there) > rank(here), f"{module} imports {imported}, which stands above or beside it"


def test_there_are_no_circles() -> None:
    try:
        TopologicalSorter({module: own(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail("imports go in a circle: " + " → ".join(error.args[1]))


def _at_the_top(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _at_the_top(node.orelse)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for field in ("body", "orelse", "finalbody"):
                yield from _at_the_top(getattr(node, field, []))
            for handler in getattr(node, "handlers", []):
                yield from _at_the_top(handler.body)


@pytest.mark.parametrize("module", [module for module in MODULES if layer(module) in LIGHT])
def test_light_modules_import_nothing_heavy_at_the_top(module: str) -> None:
    named = {name.partition(".")[0] for node in _at_the_top(_tree(module).body) for name in _names(module, node)}
    assert not named & HEAVY


LOADED = (
    "azrecipe.cli", "azrecipe.pipeline", "azrecipe.launch.worker", "azrecipe.launch.command", "azrecipe.recipe.validate", "azrecipe.recipe.steps",
    "azrecipe.parts.hardware", "azrecipe.plan.plan", "azrecipe.using.chat", "azrecipe.using.generate", "azrecipe.using.push", "azrecipe.using.serve",
)  # fmt: skip


def test_light_modules_load_nothing_heavy() -> None:
    code = (
        f"import importlib, sys\nfor name in {LOADED!r}:\n    importlib.import_module(name)\n    print(name, {HEAVY!r} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == [f"{name} set()" for name in LOADED]


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= MAX_LINES


def _arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """A function's arguments as a caller counts them."""
    given = function.args
    names = [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


@pytest.mark.parametrize("module", MODULES)
def test_functions_take_few_arguments(module: str) -> None:
    lines = MODULES[module].read_text(encoding="utf-8").splitlines()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "noqa: PLR0913" not in lines[node.lineno - 1]:
            assert len(_arguments(node)) <= MAX_ARGUMENTS, f"{module}: {node.name} takes {', '.join(_arguments(node))}"


@pytest.mark.parametrize("stage", sorted((ROOT / "schema").glob("*.json")), ids=lambda path: path.stem)
def test_every_computing_stage_has_one_module_with_run(stage: Path) -> None:
    if stage.stem in ("common", "pipeline", "hardware", "sagemaker"):
        return
    functions = {node.name for node in _tree(f"azrecipe.stages.{stage.stem}").body if isinstance(node, ast.FunctionDef)}
    assert "run" in functions
