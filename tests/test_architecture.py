"""Rules of the package: imports point one way, and one module is the door to trl.experimental."""

import ast
import graphlib
from pathlib import Path

import pipeline

PACKAGE = Path(pipeline.__file__).parent


def modules():
    """Every module of the package: its dotted name and its syntax tree."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("pipeline", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(part for part in parts if part != "__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    assert len(found) > 20
    return found


def imports(tree):
    """Dotted names that a module imports anywhere, in functions too; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_imports_point_one_way():
    trees = modules()
    packages = {"pipeline", "pipeline.stages"}  # `from pipeline import data` is an import of pipeline.data
    graph = {name: {i for i in imports(tree) if i in trees} - packages for name, tree in trees.items()}
    assert sum(map(len, graph.values())) > 50
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_one_module_imports_trl_experimental():
    users = [name for name, tree in modules().items() if any(i.startswith("trl.experimental") for i in imports(tree))]
    assert users == ["pipeline.training.trainers"]


def test_one_module_makes_consoles():
    """So all of them are without rich's markup, which would read a user's names and rows as instructions."""

    def makes(tree):
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        return any(isinstance(called, ast.Name) and called.id == "Console" for called in calls)

    trees = modules()
    assert [name for name, tree in trees.items() if makes(tree)] == ["pipeline.show.screen"]
    assert [name for name, tree in trees.items() if "rich.markup" in imports(tree)] == []
