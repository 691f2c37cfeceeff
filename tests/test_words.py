"""The words of the code: names say what is inside, docstrings begin with a short line, and tests mirror the package."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_structure import MODULES, ROOT, read_tree, room_of

# Past participles and fillers: they name nothing. A name is a noun of the field for what is inside.
VAGUE = {
    "apart", "aside", "asked", "beside", "came", "foreseen", "foretold", "found", "given", "held", "made", "net", "nth", "often", "own", "said",
    "say", "shown", "taken", "tell", "told", "torn", "wanted", "worked",
}  # fmt: skip
BARE_VERBS = {"check", "facts", "find", "identity", "make", "of", "parts", "read", "run", "save", "show", "write"}
NAMED_BY_CONTRACT = {"stages", "api"}  # rooms whose functions are the stages' and the Python interface's verbs
MAX_FIRST_LINE = 13  # words
Function = ast.FunctionDef | ast.AsyncFunctionDef
UNIT = ROOT / "tests" / "unit"
SEVERAL_MODULES = {"report/test_page.py", "inference/test_generate_and_chat.py"}


def list_functions(module: str) -> list[Function]:
    return [node for node in ast.walk(read_tree(module)) if isinstance(node, Function)]


def list_parameters(function: Function) -> list[ast.arg]:
    """List a function's parameters without self and cls."""
    parameters = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    return [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]


def list_names(module: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that a module assigns or defines."""
    for node in ast.walk(read_tree(module)):
        if isinstance(node, Function):
            yield node.lineno, node.name
            yield from ((parameter.lineno, parameter.arg) for parameter in list_parameters(node))
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr


@pytest.mark.parametrize("module", MODULES)
def test_no_name_is_vague(module: str) -> None:
    vague = [f"{line}: {name}" for line, name in list_names(module) if name in VAGUE]
    assert not vague, f"{module}: {', '.join(vague)}"


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) not in NAMED_BY_CONTRACT])
def test_module_level_functions_have_an_object(module: str) -> None:
    bare = [node.name for node in read_tree(module).body if isinstance(node, Function) and node.name in BARE_VERBS]
    assert not bare, f"{module}: {', '.join(bare)}: verb and object"


def test_a_class_name_exists_once() -> None:
    places: dict[str, list[str]] = defaultdict(list)
    for module in MODULES:
        for node in ast.walk(read_tree(module)):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{module}:{node.lineno}")
    assert {name: at for name, at in places.items() if len(at) > 1} == {}


@pytest.mark.parametrize("module", MODULES)
def test_docstrings_begin_with_a_short_line(module: str) -> None:
    tree = read_tree(module)
    nodes = [node for node in ast.walk(tree) if isinstance(node, Function | ast.ClassDef)]
    for name, node in [("the module", tree), *((node.name, node) for node in nodes)]:
        first = (ast.get_docstring(node) or "").partition("\n")[0]
        assert len(first.split()) <= MAX_FIRST_LINE, f"{module}: {name}: {first}"
        assert not first.startswith("Knows"), f"{module}: {name}: {first}"


@pytest.mark.parametrize("module", MODULES)
def test_functions_of_many_parameters_describe_them(module: str) -> None:
    for function in list_functions(module):
        docstring = ast.get_docstring(function)
        if docstring and not function.name.startswith("_") and len(list_parameters(function)) > 3:
            assert "Args:" in docstring, f"{module}: {function.name} has more than three parameters and no Args:"


@pytest.mark.parametrize("module", MODULES)
def test_no_parameter_bundles_unlike_things(module: str) -> None:
    for function in list_functions(module):
        for parameter in list_parameters(function):
            annotation = parameter.annotation
            if (
                isinstance(annotation, ast.Subscript)
                and ast.unparse(annotation.value) == "tuple"
                and isinstance(annotation.slice, ast.Tuple)
            ):
                kinds = {ast.unparse(kind) for kind in annotation.slice.elts} - {"..."}
                assert len(kinds) == 1, f"{module}: {function.name}: {parameter.arg}: use a dataclass or keyword arguments"


@pytest.mark.parametrize("file", sorted(UNIT.rglob("test_*.py")), ids=lambda path: str(path.relative_to(UNIT)))
def test_unit_tests_mirror_the_package(file: Path) -> None:
    place = file.relative_to(UNIT)
    module = ROOT / "azrecipe" / place.parent / f"{place.name.removeprefix('test_')}"
    assert module.is_file() or place.as_posix() in SEVERAL_MODULES, f"tests/unit/{place} tests no module of its name"
