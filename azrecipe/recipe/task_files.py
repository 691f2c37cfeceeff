"""Read task files of lm-evaluation-harness; run nothing that they name."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from azrecipe.errors import Problem, SourceLocation

FUNCTION_TAG = "!function"
CODE_MESSAGE = (
    "{}, which is code that would run on this machine: azrecipe runs it only with --allow-code (for a SageMaker job: allow_code: true in the "
    "settings). Allow it only for task files of people whom you trust"
)


@dataclass
class TaskFiles:
    """A task file with what it includes.

    Attributes:
        files: The task file and the files that it includes, by `include`, in the order of reading.
        data_files: The local data files that they name.
        functions: The places that name code, each with its message.
        modules: The Python files beside them that functions come from.
        problems: What is wrong with the files themselves.
    """

    files: list[Path] = field(default_factory=list)
    data_files: list[Path] = field(default_factory=list)
    functions: list[Problem] = field(default_factory=list)
    modules: list[Path] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_task_files(path: Path) -> TaskFiles:
    """Read a task file and what it includes."""
    result = TaskFiles()
    _read_file(path, path.parent, SourceLocation(str(path)), result)
    return result


def _read_file(path: Path, task_folder: Path, named_at: SourceLocation, result: TaskFiles) -> None:
    """Read one file and, below it, what it includes.

    Args:
        path: The file.
        task_folder: The folder of the task file, which data files are relative to.
        named_at: Where the file is named.
        result: What is found is added to it.
    """
    if any(_is_same(path, known) for known in result.files):
        return
    result.files.append(path)
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        result.problems.append(Problem(named_at, f"{path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8'}"))
        return
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = SourceLocation(str(path), mark.line + 1, mark.column + 1) if mark else SourceLocation(str(path))
        result.problems.append(Problem(place, f"not valid YAML: {getattr(error, 'problem', None) or 'nested too deeply'}"))
        return
    if not isinstance(root, yaml.MappingNode):
        result.problems.append(Problem(SourceLocation(str(path), 1, 1), "a task file is a mapping of keys"))
        return
    for node in _walk(root, set()):
        _collect_code(node, path, result)
    for node in _list_scalars(_get(root, "include")):
        _read_file(_join(path.parent, node.value), task_folder, _locate(node, path), result)
    for node in _list_scalars(_get(_get(root, "dataset_kwargs"), "data_files")):
        if "://" not in node.value:
            result.data_files.append(_join(task_folder, node.value))


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _join(folder: Path, name: str) -> Path:
    """Return a path below a folder, without `..`."""
    return Path(os.path.normpath(folder / name))


def _locate(node: yaml.Node, path: Path) -> SourceLocation:
    return SourceLocation(str(path), node.start_mark.line + 1, node.start_mark.column + 1)


def _get(node: yaml.Node | None, key: str) -> yaml.Node | None:
    """Return the value of a key of a mapping node, or None."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    return next((value for name, value in pairs if isinstance(name, yaml.ScalarNode) and name.value == key), None)


def _list_scalars(node: yaml.Node | None) -> Iterator[yaml.ScalarNode]:
    """Yield a scalar, or those in a list or mapping."""
    if isinstance(node, yaml.ScalarNode):
        yield node
    elif isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from _list_scalars(inner)
    elif isinstance(node, yaml.MappingNode):
        for _, inner in node.value:
            yield from _list_scalars(inner)


def _walk(node: yaml.Node, visited: set[int]) -> Iterator[yaml.Node]:
    """Yield a node and all below it, each once.

    Aliases may go in a circle.
    """
    if id(node) in visited:
        return
    visited.add(id(node))
    yield node
    if isinstance(node, yaml.SequenceNode):
        for inner in node.value:
            yield from _walk(inner, visited)
    elif isinstance(node, yaml.MappingNode):
        for key, inner in node.value:
            yield from _walk(key, visited)
            yield from _walk(inner, visited)


def _collect_code(node: yaml.Node, path: Path, result: TaskFiles) -> None:
    """Collect what runs code: functions, other tags, metrics of the hub."""
    if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.startswith("tag:yaml.org,2002:python"):
        name = f"{node.tag} {node.value}" if isinstance(node, yaml.ScalarNode) else node.tag
        result.functions.append(Problem(_locate(node, path), CODE_MESSAGE.format(f"{name} names a function")))
        if node.tag == FUNCTION_TAG and isinstance(node, yaml.ScalarNode):
            module = path.parent / f"{node.value.rpartition('.')[0].replace('.', '/')}.py"
            if module.is_file():
                result.modules.append(module)
    hub_metric = _get(node, "hf_evaluate")
    if isinstance(hub_metric, yaml.ScalarNode) and hub_metric.value.lower() not in ("false", "no", "off"):
        message = "hf_evaluate: true downloads a metric of the Hugging Face hub"
        result.functions.append(Problem(_locate(hub_metric, path), CODE_MESSAGE.format(message)))
