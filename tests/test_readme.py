"""README.md against the code: commands, configs and files it names exist, and its tables are the schema's."""

import contextlib
import json
import math
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tiny
from pydantic import BaseModel
from rich.console import Console
from ruamel.yaml import YAML

from pipeline.config import options, schema, stage_types
from pipeline.config.load import load
from pipeline.data import formats, run_tokenizer
from pipeline.rl.healthy_ranges import HEALTHY, Range
from pipeline.shift.advice import RULES
from pipeline.show import check_data
from pipeline.system.errors import UserError

REPO = Path(__file__).resolve().parent.parent
README = (REPO / "README.md").read_text(encoding="utf-8")
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
    return {prefix + name: default for name, default in own.items()}


# One stage type for each thing that a stage may want of a dataset.
STAGE_FOR = {"pretrain": "text", "sft": "demonstrations", "reward": "comparisons", "evaluate": "prompts"}
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
}


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
    for kind in (*stage_types.STAGE_TYPES, "lora", "quantization"):
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


def test_the_table_of_healthy_ranges_is_the_code():
    def bound(value: float, healthy: Range) -> str:
        return f"{value:.3g}{' x first' if healthy.of_first else ''}" if math.isfinite(value) else "-"

    shown = [(key_of(row[0]), *row[1:4]) for row in table("healthy")]
    assert shown == [(r.measure, bound(r.low, r), bound(r.high, r), str(r.patience)) for r in HEALTHY]


def test_every_prompt_baseline_is_explained():
    kinds = schema.Ppo.model_fields["prompt_baseline"].annotation.__args__
    assert [kind for kind in kinds if f"| `{kind}` | " not in README] == []


def test_the_experiment_is_that_of_its_results(monkeypatch, capsys, tmp_path):
    """The table is what the benchmark prints of the results that are kept, and the figure is beside them."""
    monkeypatch.syspath_prepend(REPO / "tests" / "benchmarks")
    import shift
    from shift_report import report

    report(shift.read(shift.RESULTS), tmp_path / "figure.png", shift.SHIFTS, shift.LABELS)
    assert capsys.readouterr().out.strip() in README
    figure = shift.RESULTS.with_suffix(".png")
    assert figure.is_file() and f"({figure.relative_to(REPO).as_posix()})" in README


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
    stages = {want: {"type": name, "data": "example"} for name, want in STAGE_FOR.items()}
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
    (quickstart,) = fences("command: quickstart")
    (tests,) = fences("command: tests")
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


def test_every_rlhf_command_is_valid(monkeypatch):
    from pipeline.cli import cli

    monkeypatch.chdir(REPO)
    commands = [words[1:] for words in _shell_lines() if words[0].endswith("rlhf")]
    assert {words[0] for words in commands} == set(cli.commands)
    for name, *arguments in commands:
        given = cli.commands[name].make_context(name, arguments).params
        if "config" in given:
            config = load(given["config"], given["overrides"])
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
    templates = [path.stem for path in (REPO / "pipeline" / "data" / "templates").glob("*.jinja")]
    assert templates and all(f"`{name}`" in README for name in templates)
