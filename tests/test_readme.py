"""All README files against the code: commands, configs, files and links exist, and tables are the schema's.

What is tested is found by a marker, `<!-- marker -->`, whichever of the files it stands in.
"""

import ast
import contextlib
import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import BaseModel
from rich.console import Console
from ruamel.yaml import YAML

import pipeline
from pipeline.config import options, schema, stage_types
from pipeline.config.load import load
from pipeline.data import formats, run_tokenizer
from pipeline.export import limits
from pipeline.html import rules as report_rules
from pipeline.records import manifest
from pipeline.rl.healthy_ranges import HEALTHY, Range
from pipeline.shift.advice import RULES
from pipeline.show import check_data, notes
from pipeline.system.errors import UserError

REPO = Path(__file__).resolve().parent.parent
PACKAGE = REPO / "pipeline"
FRONT = "README.md"
BENCHMARKS = "tests/benchmarks/README.md"
FOLDERS = ("accelerate_configs", "configs", "pipeline", "tests")
FILES = [REPO / FRONT, *(path for folder in FOLDERS for path in sorted((REPO / folder).rglob("README.md")))]
READMES = {path.relative_to(REPO).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
README = "\n".join(READMES.values())
LONGEST = 230  # lines of the front page
ALL, TRAINING = "all", "training"  # groups in the column "in" of the stages' table
# Defaults that users see and pydantic does not: a stage's section is filled in before it is parsed.
SEEN_DEFAULTS = {"type": "its name", "lora": "the run's"}


def fences(marker: str) -> list[str]:
    """The fenced blocks that directly follow `<!-- marker -->`."""
    return re.findall(rf"^<!-- {re.escape(marker)} -->\n```\w+\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def table(marker: str) -> list[list[str]]:
    """The rows of the table that directly follows `<!-- marker -->`, without its head."""
    found = re.findall(rf"^<!-- {re.escape(marker)} -->\n((?:\|.*\n)+)", README, re.MULTILINE)
    assert len(found) == 1, f"README: expected one table marked {marker!r}, found {len(found)}"
    rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in found[0].splitlines()]
    assert len({len(row) for row in rows[:1] + rows[2:]}) == 1, f"README: ragged rows in the table marked {marker!r}"
    return rows[2:]


def in_backticks(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def key_of(cell: str) -> str:
    (key,) = in_backticks(cell)
    assert cell == f"`{key}`"
    return key


def in_yaml(value: Any) -> str:
    """A default as a user would write it into the file."""
    return value if isinstance(value, str) else json.dumps(value)


def shown_default(field: Any) -> str:
    if field.is_required():
        return "required"
    return f"`{in_yaml({} if isinstance(field.default, BaseModel) else field.default)}`"


def fields_of(model: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """{key: default as README shows it} of one of our sections."""
    own = {name: shown_default(field) for name, field in model.model_fields.items()}
    if model is schema.RunConfig:
        del own["source"]  # the file itself
    if model is schema.Taken:
        own = {name: own[name] for name in ("run", "stage")}  # the rest is found in the other run
    return {prefix + name: default for name, default in own.items()}


# One stage type for each kind of row: the first that reads it, and of prompts the one that needs no reward.
STAGE_FOR = {row.rows: name for name, row in reversed(stage_types.STAGE_TYPES.items())} | {"prompts": "evaluate"}
SECTIONS = {
    "keys: RunConfig": [("", schema.RunConfig)],
    "keys: Model, scratch: Scratch, scratch.tokenizer: ScratchTokenizer": [
        ("", schema.Model),
        ("scratch.", schema.Scratch),
        ("scratch.tokenizer.", schema.ScratchTokenizer),
    ],
    "keys: Tokenizer": [("", schema.Tokenizer)],
    "keys: Data": [("", schema.Data)],
    "keys: Checks": [("", schema.Checks)],
    "keys: GateLimits": [("", schema.GateLimits)],
    "keys: Taken": [("", schema.Taken)],
}
# Every other marker that a test looks for.
MARKERS = {
    "baselines",
    "citation",
    "command: quickstart",
    "command: tests",
    "commands: own data",
    "config",
    "config: second round",
    "data",
    "defaults",
    "experiment",
    "failures",
    "healthy",
    "keys by type",
    "notes",
    "limits",
    "output: quickstart",
    "output: sample",
    "owned",
    "precision",
    "private names",
    "record",
    "report rules",
    "rows",
    "rules",
    "tree",
}


def test_every_marker_is_found_once():
    found = re.findall(r"^<!-- (.*?) -->$", README, re.MULTILINE)
    assert Counter(found) == Counter([*SECTIONS, *MARKERS])


@pytest.mark.parametrize("marker", SECTIONS)
def test_tables_of_keys_are_the_schema(marker):
    expected = {key: default for prefix, model in SECTIONS[marker] for key, default in fields_of(model, prefix).items()}
    assert {key_of(row[0]): row[1] for row in table(marker)} == expected


def test_every_section_of_the_schema_has_a_table():
    covered = {model for parts in SECTIONS.values() for _, model in parts} | {
        row.section for row in stage_types.STAGE_TYPES.values()
    }
    sections = {
        kind
        for kind in vars(schema).values()
        if isinstance(kind, type) and issubclass(kind, schema.Strict) and not kind.__subclasses__()
    }
    assert sections and sections <= covered


@pytest.mark.parametrize("stage_type", stage_types.STAGE_TYPES)
def test_the_table_of_stages_is_the_schema(stage_type):
    stage_class = stage_types.STAGE_TYPES[stage_type].section
    groups = {stage_type, ALL} | ({TRAINING} if issubclass(stage_class, schema.TrainingStage) else set())
    rows = table("keys by type")
    unknown = {name for row in rows for name in row[2].split(", ")} - {ALL, TRAINING, *stage_types.STAGE_TYPES}
    assert not unknown
    shown = {key_of(row[0]): row[1] for row in rows if groups & set(row[2].split(", "))}
    expected = fields_of(stage_types.STAGE_TYPES[stage_type].section)
    assert shown == expected | {key: default for key, default in SEEN_DEFAULTS.items() if key in expected}


def test_the_table_of_our_defaults_is_the_code():
    shown = {(row[0], key_of(row[1]), key_of(row[2])) for row in table("defaults")}
    expected = {
        (stage, key, in_yaml(value)) for stage, section in options.DEFAULTS.items() for key, value in section.items()
    }
    assert shown == expected


def test_the_table_of_owned_options_is_the_code():
    shown: dict[str, list[str]] = {}
    for section, names, _ in table("owned"):
        shown.setdefault(section, []).extend(in_backticks(names))
    expected = {TRAINING: options.OWNED}
    for kind in (*stage_types.KINDS, "lora", "quantization"):
        # A stage type's own, without those that every `training:` section has.
        own = {key: reason for key, reason in options.owned_by(kind).items() if options.OWNED.get(key) != reason}
        expected |= {kind: own} if own else {}
    assert {section: sorted(names) for section, names in shown.items()} == {
        section: sorted(names) for section, names in expected.items()
    }


def test_example_configs_load(tmp_path):
    examples = fences("config")
    assert examples
    for number, text in enumerate(examples):
        path = tmp_path / f"example{number}.yaml"
        path.write_text(text, encoding="utf-8")
        assert load(path).stages


def test_the_table_of_rules_is_the_code():
    assert [key_of(row[0]) for row in table("rules")] == [rule.name for rule in RULES]


def test_the_table_of_notes_is_the_code():
    assert [key_of(row[0]) for row in table("notes")] == [rule.name for rule in notes.RULES]


def test_the_table_of_the_report_s_rules_is_the_code():
    assert [key_of(row[0]) for row in table("report rules")] == [rule.name for rule in report_rules.RULES]


def test_the_table_of_healthy_ranges_is_the_code():
    def bound(value: float, healthy: Range) -> str:
        return f"{value:.3g}{' x first' if healthy.of_first else ''}" if math.isfinite(value) else "-"

    shown = [(key_of(row[0]), *row[1:4]) for row in table("healthy")]
    assert shown == [(r.measure, bound(r.low, r), bound(r.high, r), str(r.patience)) for r in HEALTHY]


def test_the_table_of_limits_is_the_code():
    shown = [(key_of(row[0]), *map(float, row[1:])) for row in table("limits")]
    columns = [limits.LIMITS[dtype] for dtype in ("float32", "float16", "bfloat16")] + [limits.AS_USED]
    assert shown == [(name, *(getattr(limit, name) for limit in columns)) for name in vars(limits.AS_USED)]


def test_every_prompt_baseline_is_explained():
    kinds = schema.Ppo.model_fields["prompt_baseline"].annotation.__args__
    assert [key_of(row[0]) for row in table("baselines")] == list(kinds)


def test_the_experiment_is_that_of_its_results(monkeypatch, capsys, tmp_path):
    """The table is what the benchmark prints of the results that are kept, and the figure is beside them."""
    monkeypatch.syspath_prepend(REPO / "tests" / "benchmarks")
    import shift
    from shift_report import report

    report(shift.read(shift.RESULTS), tmp_path / "figure.png", shift.SHIFTS, shift.LABELS)
    assert f"<!-- experiment -->\n{capsys.readouterr().out}" in READMES[BENCHMARKS]
    figure = shift.RESULTS.with_suffix(".png")
    assert f"]({figure.name})" in READMES[BENCHMARKS]
    assert f"]({figure.relative_to(REPO).as_posix()})" in READMES[FRONT]


WANTS = {row.rows for row in stage_types.STAGE_TYPES.values()}


def rows_of(want: str) -> str:
    """The kind of row of a stage type, or the kind of row itself."""
    return stage_types.STAGE_TYPES[want].rows if want in stage_types.STAGE_TYPES else want


def example_rows() -> list[tuple[str, dict[str, Any], set[str]]]:
    """(format, row, what it fits) of each row of the table."""
    return [
        (key_of(shape), json.loads(key_of(row)), {rows_of(want) for want in fits.split(", ")})
        for shape, row, fits in table("rows")
    ]


def test_example_rows_show_every_format():
    formats = set(schema.Source.model_fields["format"].annotation.__args__) - {"auto"}
    assert {shape for shape, _, _ in example_rows()} == formats


@pytest.mark.parametrize(("shape", "row", "fits"), example_rows())
def test_example_row_goes_into_the_stages_it_fits(tmp_path, shape, row, fits):
    """As a file of a run: told its format, accepted by the stages named, refused by the others."""
    assert formats.detect(row) == shape
    tiny.write_rows(tmp_path / "example.jsonl", [row])
    stages = {want: {"type": name, "data": "example"} for want, name in STAGE_FOR.items()}
    stages["prompts"] |= {"baseline": "demonstrations", "policies": [], "max_prompt_length": 1024}
    data_of = {"example": {"path": "example.jsonl"}}
    settings = {"chat_template": "hermes"} if "tools" in row else {}
    config = load(tiny.make_run(tmp_path, stages, data=data_of, tokenizer=settings))
    # Each stage alone: together they would evaluate on what they train on.
    accepted = set()
    for want in WANTS:
        alone = config.model_copy(update={"stages": {want: config.stages[want]}})
        tokenizer = run_tokenizer.build(alone)
        with contextlib.suppress(UserError):
            prepared = tiny.StageRows(alone, tokenizer).prepare(want, "data")
            assert (len(prepared.rows), prepared.audit.num_dropped) == (1, 0)
            accepted.add(want)
    assert accepted == fits


def test_example_data_sections_load(tmp_path):
    (example,) = fences("data")
    names = YAML(typ="safe").load(example)["data"]
    path = tiny.make_run(tmp_path, {"pretrain": {"data": "corpus", "training": {"max_steps": 1}}})
    tiny.edit(path, {"data": names})
    config = load(path)
    assert config.data["mixed"].sources[0].weight == 3
    assert config.data["corpus"].streaming


def test_the_sample_is_that_of_the_quickstart(monkeypatch, capsys, tmp_path):
    (shown,) = fences("output: sample")
    config = load(REPO / "configs" / "quickstart.yaml", (f"run_dir={tmp_path}",))
    check_data.run(config, ["sft"], 2, Console(width=160))
    assert shown.strip() in capsys.readouterr().out


def test_both_marked_commands_exist():
    """On the front page, where `.ci/run` looks for the one of the tests too."""
    (quickstart,) = fences("command: quickstart")
    (tests,) = fences("command: tests")
    assert quickstart in READMES[FRONT]
    assert tests in READMES[FRONT]
    for command in (quickstart, tests):
        assert len(command.splitlines()) == 1
        assert command.startswith("python3 -m venv .venv && .venv/bin/pip install -e ")
    assert quickstart.strip().endswith("&& .venv/bin/rlhf run configs/quickstart.yaml")
    assert tests.strip().endswith("&& .venv/bin/pytest -n 2")


def test_ci_installs_as_readme_says():
    (tests,) = fences("command: tests")
    (install,) = [part.strip() for part in tests.split("&&") if "pip install" in part]
    unquoted = (REPO / ".ci" / "run").read_text(encoding="utf-8").replace("'", "").replace('"', "")
    assert install.removeprefix(".venv/bin/").replace("'", "") in unquoted


def test_the_quickstart_output_is_that_of_its_config():
    (output,) = fences("output: quickstart")
    config = load(REPO / "configs" / "quickstart.yaml")
    (evaluate,) = [stage for stage in config.stages.values() if stage.type == "evaluate"]
    shown = [line.split("│")[1].strip() for line in output.splitlines() if line.startswith("│")]
    assert shown == ["base", evaluate.baseline, *evaluate.policies]
    assert f"on {evaluate.num_prompts} held-out prompts" in output


def _shell_lines() -> list[list[str]]:
    blocks = re.findall(r"^```bash\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
    parts = [part for block in blocks for line in block.splitlines() for part in line.split("&&")]
    return [shlex.split(part, comments=True) for part in parts]


def test_every_rlhf_command_is_valid(monkeypatch, tmp_path):
    from pipeline.cli import cli

    monkeypatch.chdir(REPO)
    own = tmp_path / "my-run.yaml"  # in the README the user has written it
    own.write_text(fences("config")[0], encoding="utf-8")
    commands = [words[1:] for words in _shell_lines() if words[0].endswith("rlhf")]
    assert {words[0] for words in commands} == set(cli.commands)
    for name, *arguments in commands:
        given = cli.commands[name].make_context(name, arguments).params
        if given.get("accelerate_config"):
            assert (REPO / given["accelerate_config"]).is_file()
        if "config" in given:
            config = load(own if given["config"] == own.name else given["config"], given.get("overrides", ()))
            stages = {given.get("until"), given.get("only"), *given.get("redo", ()), *given.get("stages", ())} - {None}
            assert stages <= config.stages.keys()


def test_the_command_by_hand_names_what_exists():
    commands = [words for words in _shell_lines() if words[0] == "accelerate"]
    assert commands
    for words in commands:
        *_, file, dash_m, module, config, stage = words
        assert (dash_m, module) == ("-m", "pipeline.stage")
        assert (REPO / file).is_file()
        assert stage in load(REPO / config).stages


def test_every_shipped_file_is_named():
    shipped = [f"configs/{path.name}" for path in sorted((REPO / "configs").glob("*.yaml"))]
    shipped += [path.name for path in sorted((REPO / "accelerate_configs").glob("*.yaml"))]
    assert len(shipped) > 8
    assert [name for name in shipped if f"`{name}`" not in README] == []
    templates = [path.stem for path in PACKAGE.rglob("*.jinja")]
    assert templates and all(f"`{name}`" in README for name in templates)


def test_every_benchmark_is_named_and_its_commands_are_valid():
    commands = [words for words in _shell_lines() if words[0] == "python"]
    assert commands
    for _, script, *arguments in commands:
        source = (REPO / script).read_text(encoding="utf-8")
        options = [word for word in arguments if word.startswith("--")]
        assert [option for option in options if f'add_argument("{option}"' not in source] == []
    scripts = {path.name for path in (REPO / "tests" / "benchmarks").glob("*.py")}
    assert [name for name in sorted(scripts) if name not in READMES[BENCHMARKS]] == []


def test_the_front_page_is_short():
    assert len(READMES[FRONT].splitlines()) <= LONGEST


@pytest.mark.parametrize("name", sorted(READMES.keys() - {FRONT}))
def test_a_folders_page_begins_with_what_goes_in_and_out(name):
    """In three sentences: what the folder is for, what comes in, what goes out."""
    title, first, *_ = READMES[name].split("\n\n")
    assert title.startswith("# ")
    sentences = re.split(r"(?<=[.?!])\s+", first.strip())
    assert len(sentences) == 3
    assert sentences[1].startswith("What comes in")
    assert sentences[2].startswith("What goes out")


def _without_fences(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", _without_fences(text), re.MULTILINE):
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        assert anchor not in anchors, f"two headings {heading!r}: GitHub would number the second"
        anchors.add(anchor)
    return anchors


def _links(text: str) -> list[str]:
    """The targets of a page's links and pictures that are not on the web."""
    prose = re.sub(r"`[^`\n]*`", "", _without_fences(text))
    return [target for target in re.findall(r"\]\(([^)\s]+)\)", prose) if "://" not in target]


@pytest.mark.parametrize("name", READMES)
def test_links_lead_to_files_and_headings(name):
    for target in _links(READMES[name]):
        place, _, anchor = target.partition("#")
        path = (REPO / name).parent / place if place else REPO / name
        assert path.exists(), target
        if anchor:
            page = path.resolve().relative_to(REPO).as_posix()
            assert anchor in _anchors(READMES[page]), target


def test_every_page_is_linked_from_the_front_page():
    linked = {target.partition("#")[0] for target in _links(READMES[FRONT])}
    assert sorted(READMES.keys() - {FRONT} - linked) == []


def _tree() -> Iterator[str]:
    """The paths that the tree names: files, and folders with a slash at their end."""
    (text,) = fences("tree")
    above: list[str] = []
    for line in filter(None, text.splitlines()):
        name, *description = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        above = above[:depth]
        yield "".join([*above, name])
        if name.endswith("/"):
            above.append(name)
        else:
            assert description, f"{line!r} says nothing of the file"


def test_the_tree_is_the_package():
    """Every module once; `__init__.py` of a folder is the folder's own line."""
    expected = Counter()
    for path in PACKAGE.rglob("*.py"):
        relative = path.relative_to(REPO).as_posix()
        if path.name == "__init__.py":
            expected[f"{relative.removesuffix('__init__.py')}"] += 1
        if path.name != "__init__.py" or path.parent == PACKAGE:
            expected[relative] += 1
    assert Counter(_tree()) == expected


def test_the_table_of_the_record_is_the_code():
    rows = table("record")
    assert sorted(name for row in rows for name in in_backticks(row[0])) == sorted(manifest.Record.model_fields)
    (output,) = [row[1] for row in rows if row[0] == "`output`"]
    assert in_backticks(output) == list(manifest.Output.model_fields)


def test_the_citation_is_of_this_version():
    (text,) = fences("citation")
    assert f"version = {{{pipeline.__version__}}}" in text


def _syntax_trees() -> dict[str, ast.Module]:
    """The syntax tree of every module, by its path in the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    return {path.relative_to(PACKAGE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}


def _private_names(trees: dict[str, ast.Module]) -> set[str]:
    """The private attributes that the package reads or sets and does not define itself."""
    own: set[str] = set()
    used: set[str] = set()
    for node in (node for tree in trees.values() for node in ast.walk(tree)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            own.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif isinstance(node, ast.Assign):
            own |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            holder = node.value.id if isinstance(node.value, ast.Name) else ""
            if holder in ("self", "cls"):
                own.add(node.attr)
            elif holder != "os":
                used.add(node.attr)
    return used - own


def test_the_private_names_are_those_of_the_code():
    rows = [(key_of(row[0]), key_of(row[2])) for row in table("private names")]
    for name, file in rows:
        assert name in (PACKAGE / file).read_text(encoding="utf-8"), f"{file} does not use {name}"
    assert _private_names(_syntax_trees()) <= {name for name, _ in rows}


def _texts(trees: dict[str, ast.Module]) -> set[str]:
    """The texts of the package without backticks; of an f-string the parts between its values."""
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    return {
        node.value.replace("`", "") for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_messages_of_failures_are_those_of_the_code():
    """What is left of a message without the package's own texts are values: a name, a number, a few words at most."""
    texts = [text for text in _texts(_syntax_trees()) if len(text) >= 4]
    rows = table("failures")
    assert len(rows) >= 10
    for cell, _ in rows:
        message = in_backticks(cell)[0]
        covered = [False] * len(message)
        for text in texts:
            start = message.find(text)
            while start >= 0:
                covered[start : start + len(text)] = [True] * len(text)
                start = message.find(text, start + 1)
        rest = "".join("\0" if of_ours else letter for letter, of_ours in zip(message, covered, strict=True))
        values = [part.strip() for part in rest.split("\0")]
        assert [value for value in values if len(value.split()) > 4] == [], cell
