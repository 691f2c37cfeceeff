"""Every place that changes a library from within, or relies on its private methods, is in the table."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

import pytest

from azrecipe.utils.library_patches import PATCHES, generate_document
from tests.test_structure import MODULES, ROOT, read_tree

OUTSIDE = {*sys.stdlib_module_names, "azrecipe"}


def find_library_names(tree: ast.Module) -> dict[str, str]:
    """Every name that a module imports from a library, and what it is there."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {(alias.asname or alias.name).partition(".")[0]: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):  # ring: Any = _attention
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Name):
            names |= {node.target.id: names[node.value.id]} if node.value.id in names else {}
    return {name: origin for name, origin in names.items() if origin.partition(".")[0] not in OUTSIDE}


def find_assignments(tree: ast.Module) -> Iterator[str]:
    """What a module assigns to inside a library's modules and classes, and objects whose class it changes."""
    names = find_library_names(tree)
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else []
        for target in targets:
            place: ast.expr = target
            while isinstance(place, ast.Subscript):
                place = place.value
            root: ast.expr = place
            while isinstance(root, ast.Attribute | ast.Subscript):
                root = root.value
            if isinstance(place, ast.Attribute) and isinstance(root, ast.Name) and (root.id in names or place.attr == "__class__"):
                yield ast.unparse(place)
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr")
        if is_call and isinstance(node.args[0], ast.Name) and node.args[0].id in names:
            yield ast.unparse(node)


def _load(origin: str) -> object | None:
    module, _, name = origin.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


def find_private_overrides(tree: ast.Module) -> Iterator[str]:
    """Private methods of a library's classes that a module's classes override."""
    names = find_library_names(tree)
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        bases = [_load(names[base.id]) for base in node.bases if isinstance(base, ast.Name) and base.id in names]
        for method in node.body:
            if isinstance(method, ast.FunctionDef) and re.match(r"_[^_]", method.name):
                calls_super = f"super().{method.name}(" in ast.unparse(method)
                if calls_super or any(hasattr(base, method.name) for base in bases if base is not None):
                    yield method.name


@pytest.mark.parametrize("module", [module for module in MODULES if module != "azrecipe"])
def test_every_patch_is_in_the_table(module: str) -> None:
    tree = read_tree(module)
    known = {patch.target for patch in PATCHES if f"azrecipe.{patch.module}" == module}
    patches = {*find_assignments(tree), *find_private_overrides(tree)}
    assert patches <= known, f"{module}: add to azrecipe/utils/library_patches.py: {patches - known}"
    source = MODULES[module].read_text(encoding="utf-8")
    private = set(re.findall(r"\btrainer\.(_[a-z]\w*)", source))
    assert private <= known, f"{module}: private attributes of a Trainer: {private - known}"
    for target in known:
        assert target in source, f"{module}: nothing does '{target}' any longer"


def test_every_entry_is_of_a_module() -> None:
    assert {f"azrecipe.{patch.module}" for patch in PATCHES} <= set(MODULES)


@pytest.mark.parametrize("library", sorted({patch.library for patch in PATCHES}))
def test_patches_were_written_for_the_installed_version(library: str) -> None:
    try:
        installed = version(library)
    except PackageNotFoundError:
        pytest.skip(f"{library} is not installed")
    for patch in PATCHES:
        if patch.library == library:
            assert installed.split(".")[:2] == patch.version.split(".")[:2], (
                f"look at {patch.module}: {patch.target}; then change the version"
            )


def test_document_is_current() -> None:
    command = "run: python -m azrecipe.utils.library_patches > docs/library_patches.md"
    assert (ROOT / "docs" / "library_patches.md").read_text(encoding="utf-8") == generate_document(), command
