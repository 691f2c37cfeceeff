"""The architecture, read from the imports: each room imports only what its row allows, and the front door is light."""

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
GROUND = ("errors", "utils", "recipe")  # open to every room; among themselves only downwards, as the table says
# Each room, and the rooms that it may import beside the ground. A module of the package itself is a room of one file.
ROOMS: dict[str, set[str]] = {
    "": {"api"},  # loads it when one of its functions is used
    "errors": set(),
    "utils": set(),
    "recipe": set(),
    "hardware": set(),
    "distributed": set(),
    "tokenization": set(),
    "runs": {"distributed"},
    "data": {"tokenization", "runs"},
    "modeling": {"data", "tokenization"},
    "merging": {"modeling", "tokenization"},
    "evaluation": {"modeling", "data", "tokenization"},
    "training": {"evaluation", "modeling", "data", "tokenization", "runs", "distributed", "hardware"},
    "planning": {"modeling", "data", "runs", "distributed", "hardware"},
    "inference": {"modeling", "tokenization", "runs", "distributed"},
    "publishing": {"modeling", "runs", "tokenization"},
    "report": {"runs"},
    "stages": {"training", "planning", "evaluation", "merging", "modeling", "data", "tokenization", "runs", "distributed"},
    "pipeline": {"report", "evaluation", "data", "runs", "distributed"},  # stages by name, when one is run
    "operations": {"pipeline", "stages", "planning", "data", "tokenization", "runs", "distributed", "hardware"},
    "sagemaker": {"operations", "planning", "pipeline", "data", "runs", "hardware"},
    "api": {"operations", "sagemaker", "runs"},
    "cli": {
        "operations", "distributed", "tokenization", "runs", "data", "modeling", "evaluation", "training", "planning", "inference",
        "publishing", "report", "stages", "pipeline", "sagemaker", "hardware",
    },
    "__main__": {"cli"},
}  # fmt: skip
GROUND_ROWS = {"errors": set[str](), "utils": {"errors"}, "recipe": {"errors", "utils"}, "": {"api"}}
FRONT = ("api", "cli", "errors", "hardware", "operations", "pipeline", "publishing", "recipe", "report", "runs", "sagemaker", "utils")
LIGHT = (*FRONT, "distributed", "inference")
HEAVY = {"torch", "transformers", "trl", "peft", "accelerate", "datasets", "tokenizers", "liger_kernel"}
MAX_LINES = 400
MAX_POSITIONAL = 5
MAX_SHARE = 0.15  # of the package's lines in one room


def read_tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def _names(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """The modules that an import statement names; `from azrecipe.data import files` names azrecipe.data.files."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    assert node.level == 0 and node.module, f"{module}: line {node.lineno}: a relative import"
    for alias in node.names:
        whole = f"{node.module}.{alias.name}"
        # cli/__init__ names a function of cli/main what the module is called
        yield whole if whole in MODULES and whole != "azrecipe.cli.main" else node.module


def imports(module: str) -> set[str]:
    """Every module that a module imports anywhere in it: at the top, in functions and for type checking."""
    nodes = (node for node in ast.walk(read_tree(module)) if isinstance(node, ast.Import | ast.ImportFrom))
    return {name for node in nodes for name in _names(module, node)} - {module}


def package_imports(module: str) -> set[str]:
    """The modules of azrecipe that a module imports."""
    return {name for name in imports(module) if name.partition(".")[0] == "azrecipe"}


def room_of(module: str) -> str:
    """The room that a module stands in."""
    return module.removeprefix("azrecipe").removeprefix(".").partition(".")[0]


def allowed_rooms(room: str) -> set[str]:
    """The rooms that a room may import."""
    return GROUND_ROWS.get(room, set(GROUND)) | ROOMS[room] | {room, ""}


@pytest.mark.parametrize("module", MODULES)
def test_arrows_are_in_the_table(module: str) -> None:
    room = room_of(module)
    assert room in ROOMS, f"azrecipe/{room} is no room of the table"
    for imported in package_imports(module):
        assert imported in MODULES, f"{module} imports {imported}, which is not there"
        assert room_of(imported) in allowed_rooms(room), f"{module} imports {imported}: {room} may not import {room_of(imported)}"
        assert room != "stages" or room_of(imported) != "stages", f"{module} imports another stage, {imported}"


@pytest.mark.parametrize("module", [module for module in MODULES if module != "azrecipe"])
def test_no_module_uses_the_python_interface(module: str) -> None:
    for node in ast.walk(read_tree(module)):
        if isinstance(node, ast.ImportFrom) and node.module == "azrecipe":
            names = {alias.name for alias in node.names if f"azrecipe.{alias.name}" not in MODULES}
            assert names <= {"__version__"}, f"{module} imports {names} from azrecipe itself"


def test_every_arrow_of_the_table_is_used() -> None:
    used = {(room_of(module), room_of(imported)) for module in MODULES for imported in package_imports(module)}
    idle = sorted(f"{room} → {other}" for room, others in ROOMS.items() if room != "cli" for other in others if (room, other) not in used)
    assert not idle, f"nothing needs these arrows any longer: {', '.join(idle)}"


def _check_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("imports go in a circle: " + " → ".join(error.args[1]))


def test_modules_import_in_no_circle() -> None:
    # azrecipe/__init__ has the version and loads nothing else at once: who imports it does not import the Python interface.
    _check_no_circle({module: package_imports(module) - {"azrecipe"} for module in MODULES})


def test_the_package_itself_loads_no_module() -> None:
    code = "import azrecipe, sys; print(sorted(name for name in sys.modules if name.startswith('azrecipe')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "['azrecipe']\n"


def test_rooms_import_in_no_circle() -> None:
    _check_no_circle({room: allowed_rooms(room) - {room, ""} for room in ROOMS})


def test_no_room_is_too_large() -> None:
    lines = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    rooms = {room: sum(count for module, count in lines.items() if room_of(module) == room) for room in ROOMS}
    for room, count in rooms.items():
        assert count <= MAX_SHARE * sum(lines.values()), f"{room} holds {count} of {sum(lines.values())} lines"


@pytest.mark.parametrize("module", [module for module, path in MODULES.items() if path.name == "__init__.py" and module != "azrecipe"])
def test_rooms_say_what_they_know(module: str) -> None:
    tree = read_tree(module)
    sentence = ast.get_docstring(tree) or ""
    assert sentence and len(sentence.splitlines()[0].split()) <= 14, f"{module}: one sentence of about ten words"
    if module == "azrecipe.sagemaker":  # its names are loaded when they are asked for
        return
    for node in tree.body[1:]:
        names = isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["__all__"]
        assert isinstance(node, ast.ImportFrom) or names, f"{module}: line {node.lineno}: only a docstring and names that are exported"


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


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module) in LIGHT])
def test_light_modules_import_nothing_heavy_at_the_top(module: str) -> None:
    named = {name.partition(".")[0] for node in _at_the_top(read_tree(module).body) for name in _names(module, node)}
    assert not named & HEAVY


LOADED = (
    *(module for module in MODULES if room_of(module) in FRONT),
    "azrecipe.inference.chat", "azrecipe.inference.generate", "azrecipe.inference.serve",
    "azrecipe.planning.alternatives", "azrecipe.planning.calibrate", "azrecipe.planning.estimate", "azrecipe.planning.placement",
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


PRINTERS = {"azrecipe.utils.console", "azrecipe.utils.rich_console"}
PRINTING_CALLS = {
    "print", "Console", "rich.print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc", "Text.from_markup", "argparse.ArgumentParser",
}  # fmt: skip


@pytest.mark.parametrize("module", [module for module in MODULES if module not in PRINTERS])
def test_nothing_prints_past_the_console(module: str) -> None:
    """utils/console.py escapes control characters; all that is printed goes through it."""
    tree = read_tree(module)
    own_output = {
        id(node) for block in tree.body if isinstance(block, ast.If) and "__main__" in ast.unparse(block.test) for node in ast.walk(block)
    }
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and id(node) not in own_output]
    past = [f"{node.lineno}: {ast.unparse(node.func)}" for node in calls if ast.unparse(node.func) in PRINTING_CALLS]
    assert not past, f"{module}: {', '.join(past)}: use utils/console.py, utils/rich_console.py or cli's TerminalParser"


def _positional(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The arguments that a caller may give by position."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args)]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


@pytest.mark.parametrize("module", MODULES)
def test_functions_take_few_positional_arguments(module: str) -> None:
    lines = MODULES[module].read_text(encoding="utf-8").splitlines()
    for node in ast.walk(read_tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and "noqa: PLR0913" not in lines[node.lineno - 1]:
            assert len(_positional(node)) <= MAX_POSITIONAL, f"{module}: {node.name} takes {', '.join(_positional(node))}"


@pytest.mark.parametrize("stage", sorted((ROOT / "schema").glob("*.json")), ids=lambda path: path.stem)
def test_every_computing_stage_has_one_module_with_run(stage: Path) -> None:
    if stage.stem in ("common", "pipeline", "hardware", "sagemaker", "result", "plan"):
        return
    functions = {node.name for node in read_tree(f"azrecipe.stages.{stage.stem}").body if isinstance(node, ast.FunctionDef)}
    assert "run" in functions


def _describe(room: str) -> str:
    """A room's line in CONTRIBUTING.md: its name and the first line of its docstring."""
    module = f"azrecipe.{room}"
    name = f"{room}/" if MODULES[module].name == "__init__.py" else f"{room}.py"
    return f"{name:<15} {(ast.get_docstring(read_tree(module)) or '').partition(chr(10))[0]}"


def test_contributing_lists_the_rooms() -> None:
    """Each room has the line of its docstring, and stands below the rooms that it imports."""
    rooms = [room for room in ROOMS if room not in ("", "__main__")]
    listed = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("```\n")[1:]
    assert "\n".join(map(_describe, rooms)) + "\n" in listed
    for index, room in enumerate(rooms):
        assert allowed_rooms(room) - {room, ""} <= {*rooms[:index]}, room
