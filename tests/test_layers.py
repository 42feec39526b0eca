"""The rooms of the package stand in a row, and imports go one way: to the left in `FLOORS`."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import dwl_plugin

ROOT = Path(dwl_plugin.__file__).parent
FLOORS = (
    ("errors", "yaml_text"),
    ("values", "files"),
    ("yaml_io", "extensions"),
    ("alpha", "classes"),
    ("loss",),
    ("config",),
    ("run",),
    ("hosts",),
    ("cli",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def modules() -> dict[str, ast.Module]:
    """Each module by its dotted name below `dwl_plugin`."""
    found = {}
    for file in sorted(ROOT.rglob("*.py")):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        found[name] = ast.parse(file.read_text(encoding="utf-8"))
    return {name: tree for name, tree in found.items() if name}


def imports(node: ast.AST, names: frozenset[str], *, at_import: bool) -> Iterator[str]:
    """What of this package `node` imports; `at_import`: without what functions and type checkers import."""
    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("dwl_plugin."):
        module = str(node.module).removeprefix("dwl_plugin.")
        for alias in node.names:
            yield f"{module}.{alias.name}" if f"{module}.{alias.name}" in names else module
    elif isinstance(node, ast.ImportFrom) and node.module == "dwl_plugin":
        yield from (alias.name for alias in node.names if alias.name in names)
    elif isinstance(node, ast.Import):
        yield from (alias.name.removeprefix("dwl_plugin.") for alias in node.names if alias.name.startswith("dwl_plugin."))
    skipped = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
        isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    if not (at_import and skipped):
        for child in ast.iter_child_nodes(node):
            yield from imports(child, names, at_import=at_import)


def test_no_import_goes_to_a_higher_room_or_across() -> None:
    trees = modules()
    wrong = []
    for name, tree in trees.items():
        room = name.partition(".")[0]
        for imported in imports(tree, frozenset(trees), at_import=False):
            other = imported.partition(".")[0]
            if other != room and FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{name} -> {imported}")
    assert not wrong


def test_no_circle_at_import() -> None:
    trees = modules()
    graph = {name: set(imports(tree, frozenset(trees), at_import=True)) - {name} for name, tree in trees.items()}
    assert sum(map(len, graph.values())) > len(graph)
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("module", ["dwl_plugin", "dwl_plugin.config", "dwl_plugin.classes", "dwl_plugin.alpha"])
def test_light_rooms_import_no_framework(module: str) -> None:
    code = f"import sys, {module}; print(*sorted({{'torch', 'transformers', 'axolotl'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
