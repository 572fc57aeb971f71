"""Rules of the package: how its rooms import each other, how long files and functions are, where types are named."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import pipeline
from pipeline.config.stage_types import STAGE_TYPES

PACKAGE = Path(pipeline.__file__).parent
# A room imports only from rooms of lower floors; a door is a module beside the rooms that nothing imports.
FLOORS = (
    ("system",),
    ("config", "shift", "web"),
    ("records",),
    ("base", "tracking"),
    ("data",),
    ("models",),
    ("chain", "launch"),
    ("training",),
    ("show",),
    ("export", "rl"),
    ("chat", "html", "label", "stages"),
)
DOORS = ("cli", "cli_results", "planner", "launcher", "stage", "stage_server", "__main__")
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MAX_LINES = 300  # of a file
MAX_FUNCTION_LINES = 45


def modules() -> dict[str, ast.Module]:
    """Every module of the package: its dotted name and its syntax tree."""
    trees = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = ("pipeline", *path.relative_to(PACKAGE).with_suffix("").parts)
        name = ".".join(part for part in parts if part != "__init__")
        trees[name] = ast.parse(path.read_text(encoding="utf-8"))
    assert len(trees) > 20
    return trees


def imports(tree: ast.AST) -> Iterator[str]:
    """Dotted names that a module imports anywhere, in functions too; `from a import b` gives both a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_of_package(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For each module the modules of the package that it imports."""
    packages = {name for name in trees if name.count(".") < 2} - {f"pipeline.{door}" for door in DOORS}
    return {name: {one for one in imports(tree) if one in trees} - packages for name, tree in trees.items()}


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def arrows(trees: dict[str, ast.Module]) -> list[tuple[str, str]]:
    """Each import from one room, or door, to another."""
    pairs = [(name, other) for name, others in imports_of_package(trees).items() for other in sorted(others)]
    return [(name, other) for name, other in pairs if room_of(name) != room_of(other)]


def upward(pairs: list[tuple[str, str]]) -> list[str]:
    """The imports that do not point to a lower floor, or that come in by a door."""
    faults = []
    for name, other in pairs:
        if room_of(name) in DOORS or name == "pipeline":
            continue
        if room_of(other) in DOORS or FLOOR_OF[room_of(other)] >= FLOOR_OF[room_of(name)]:
            faults.append(f"{name} imports {other}")
    return faults


def test_imports_point_one_way():
    graph = imports_of_package(modules())
    assert sum(map(len, graph.values())) > 50
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError


def test_every_folder_has_its_floor_and_every_other_file_is_a_door():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FLOOR_OF)
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(DOORS)


def test_rooms_import_from_lower_floors_alone():
    pairs = arrows(modules())
    assert len(pairs) > 100
    assert upward(pairs) == []


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("pipeline.data.rows", "pipeline.chain.gate"),
        ("pipeline.chain.gate", "pipeline.launch.process"),
        ("pipeline.config.load", "pipeline.shift.advice"),
        ("pipeline.launch.process", "pipeline.launcher"),
        ("pipeline.stages.ppo", "pipeline.stage"),
    ],
)
def test_an_import_that_points_upward_is_a_fault(importer, imported):
    """To a higher floor, to a room of the same floor, and to a door."""
    trees = {name: ast.parse("") for name in (imported, "pipeline.system.errors")}
    room, module = imported.rpartition(".")[::2]
    trees[importer] = ast.parse(f"def late():\n    from {room} import {module}\nimport pipeline.system.errors\n")
    assert upward(arrows(trees)) == [f"{importer} imports {imported}"]


def test_files_are_short():
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > MAX_LINES} == {}


def test_functions_are_short():
    functions = [
        (f"{name}.{node.name}", node.end_lineno - node.lineno + 1)
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    assert len(functions) > 500
    assert [(name, length) for name, length in functions if length > MAX_FUNCTION_LINES] == []


def names_of_types(tree: ast.AST) -> list[str]:
    """Comparisons of a type's name with words that name stage types: `stage.type == "ppo"`, `kind in ("rloo", "grpo")`.

    A name like `role` may be compared with "reward", which is a role too.
    """
    faults = []
    for node in ast.walk(tree):
        operands = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        if isinstance(node, ast.Match):
            operands = [node.subject, *(case.pattern for case in node.cases)]
        names = {getattr(operand, "attr", getattr(operand, "id", "")) for operand in operands}
        constants = {one.value for operand in operands for one in ast.walk(operand) if isinstance(one, ast.Constant)}
        if names & {"type", "stage_type", "kind"} and constants & STAGE_TYPES.keys():
            faults.append(ast.unparse(node))
    return faults


def test_only_the_table_knows_the_names_of_stage_types():
    trees = modules()
    table = trees.pop("pipeline.config.stage_types")
    assert [key for node in ast.walk(table) if isinstance(node, ast.Dict) for key in node.keys]
    faults = {name: names_of_types(tree) for name, tree in trees.items() if room_of(name) != "stages"}
    assert {name: comparisons for name, comparisons in faults.items() if comparisons} == {}


def test_a_comparison_with_the_name_of_a_type_is_a_fault():
    for text in (
        'stage.type == "ppo"',
        '"dpo" != record.type',
        'stage_type in ("rloo", "grpo")',
        'stage.type in {"sft"}',
    ):
        assert len(names_of_types(ast.parse(text))) == 1, text
    for text in ("stage.type == other", 'role == "reward"', 'output.kind == "full"'):
        assert names_of_types(ast.parse(text)) == [], text


def test_one_module_imports_trl_experimental():
    users = [name for name, tree in modules().items() if any(i.startswith("trl.experimental") for i in imports(tree))]
    allowed = ["pipeline.training.trainers"]
    assert [name for name in users if name not in allowed and not only_for_types(modules()[name])] == []
    assert set(allowed) <= set(users)


def only_for_types(tree: ast.Module) -> bool:
    """Whether a module imports trl.experimental only for the type checker."""
    guarded = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    rest = ast.Module(body=[node for node in tree.body if node not in guarded], type_ignores=[])
    return not any(name.startswith("trl.experimental") for name in imports(rest))


def test_one_module_makes_consoles():
    """So all of them are without rich's markup, which would read a user's names and rows as instructions."""

    def makes(tree: ast.AST) -> bool:
        calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
        return any(isinstance(called, ast.Name) and called.id == "Console" for called in calls)

    trees = modules()
    assert [name for name, tree in trees.items() if makes(tree)] == ["pipeline.show.screen"]
    assert [name for name, tree in trees.items() if "rich.markup" in imports(tree)] == []


NO_VERBS = {"a", "an", "all", "every", "how", "one", "the", "what", "whether", "where", "which", "why"}


def test_docstrings_of_functions_begin_with_a_verb():
    found = []
    looked_at = 0
    for name, tree in modules().items():
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef) else None
            if text is not None:
                looked_at += 1
                found += [f"{name}.{node.name}"] if text.split()[0].lower() in NO_VERBS else []
    assert looked_at > 300
    assert found == []


def test_one_assignment_a_line():
    """`a, b = x, y` of values that do not belong together is harder to read than two lines."""
    found = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
    ]
    assert found == []
