"""Rules of the package: imports point one way, one door to trl.experimental, small enough to read."""

import ast
import graphlib
import io
import tokenize
from pathlib import Path

import pipeline

PACKAGE = Path(pipeline.__file__).parent
MAX_LINES = 5400
LAYOUT = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


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
    assert users == ["pipeline.trainers"]


def num_code_lines(source):
    """Lines that are neither blank nor comments nor docstrings."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    lines = {n for t in tokens if t.type not in LAYOUT for n in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


SAMPLE = '''"""Docstring,
of two lines."""

import os  # counts

# does not
def f():
    """Nor does this."""
    return """a

b"""
'''


def test_code_lines_are_counted_right():
    assert num_code_lines(SAMPLE) == 5


def test_package_is_small():
    sizes = {
        str(path.relative_to(PACKAGE)): num_code_lines(path.read_text(encoding="utf-8"))
        for path in PACKAGE.rglob("*.py")
    }
    assert sum(sizes.values()) <= MAX_LINES, sizes
