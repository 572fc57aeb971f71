"""A kind of row is one class: what reads, encodes, measures, cuts, counts and shows rows asks it for all it knows."""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import pytest
import tiny
from datasets import List, Value
from rich.console import Console

from pipeline.config.load import load
from pipeline.config.requests import request
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.data import run_tokenizer
from pipeline.data.convert import to_messages
from pipeline.data.prepare import Datasets
from pipeline.data.rows import ROWS, Answers
from pipeline.show import check_data
from pipeline.show.screen import show
from pipeline.system.errors import UserError


class Labelled(Answers):
    """An answer that is labelled good or bad, as KTO learns from."""

    name = "labelled"
    columns: ClassVar[Mapping[str, List]] = dict.fromkeys(("prompt_ids", "completion_ids"), List(Value("int32")))
    extras: ClassVar[Mapping[str, Value | List]] = {"label": Value("bool")}
    sides = ("completion",)
    lengths = ("prompt", "completion")
    findings: ClassVar[Mapping[str, str]] = {"undesirable": "are labelled false"}

    def is_served_by(self, shape, columns):
        return shape == "unpaired"

    def convert(self, row, shape):
        return to_messages(row, shape)

    def encode(self, tokenizer, rows):
        encoded = super().encode(tokenizer, rows)
        return [ids | {"label": row["label"]} for row, ids in zip(rows, encoded, strict=True)]

    def marks(self, row):
        return [str(row["label"])]

    def find(self, rows):
        return {"undesirable": ~rows["label"]}

    def fault_of_all(self, num_rows, findings):
        return "all rows are labelled true" if findings["undesirable"] == 0 else None

    def parts(self, row, trains_on, masked):
        return [*super().parts(row, trains_on, masked), ("label", [(str(row["label"]).lower(), False)])]


@pytest.fixture
def labelled(tmp_path, monkeypatch):
    """`labelled(rows, **changes)`: what a stage gets that asks for labelled answers, with changes to what it asks."""
    monkeypatch.setitem(ROWS, "labelled", Labelled())

    def prepare(rows, **changes):
        tiny.write_rows(tmp_path / "rows.jsonl", rows)
        data = {"rows": {"path": "rows.jsonl"}}
        config = load(tiny.make_run(tmp_path, {"sft": {"data": "rows", "init": "base"}}, data=data))
        read = tiny.StageRows(config, run_tokenizer.build(config))
        asked = dataclasses.replace(request(config, "sft", "data"), rows="labelled", **changes)
        return read, Datasets.prepare(read, asked)

    return prepare


ROWS_OF_A_FILE = [
    {"prompt": "Say tea.", "completion": "Tea.", "label": True},
    {"prompt": "Say tea.", "completion": "Tea.", "label": False},
    {"prompt": "Say rain.", "completion": "Sun.", "label": False},
    {"prompt": "Say rain.", "completion": "Sun.", "label": None},
    {"prompt": "Say rain.", "completion": "Rain. " * 40, "label": True},
]


def test_a_new_kind_is_one_class(labelled):
    read, prepared = labelled(ROWS_OF_A_FILE, max_length=60)
    rows, audit = prepared.rows, prepared.audit
    assert rows.column_names == ["prompt_ids", "completion_ids", "label"]
    assert rows["label"][:] == [True, False, False]
    text = [[read.tokenizer.decode(ids) for ids in row.values() if isinstance(ids, list)] for row in rows]
    assert text == [
        ["<user>Say tea.<assistant>", "Tea.<eos>"],
        ["<user>Say tea.<assistant>", "Tea.<eos>"],
        ["<user>Say rain.<assistant>", "Sun.<eos>"],
    ]
    assert audit.dropped["malformed"].rows == (3,)
    assert audit.dropped["too_long"].rows == (4,)
    assert audit.noticed["undesirable"].count == 2
    assert audit.noticed["contradictory"].rows == (0, 1)  # one answer with both labels
    assert audit.noticed["duplicate"].count == 0
    assert audit.tokens == sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows)


def test_a_new_kind_says_what_rows_lack_together(labelled):
    _, one_sided = labelled(ROWS_OF_A_FILE[:1])
    assert [problem.rpartition(": ")[2] for problem in one_sided.audit.problems({})] == ["all rows are labelled true"]
    _, both = labelled(ROWS_OF_A_FILE[:2])
    assert both.audit.problems({}) == []


def test_check_data_shows_a_new_kind(labelled):
    read, prepared = labelled(ROWS_OF_A_FILE[:3])
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    for table in check_data.tables({"sft": {"data": prepared.audit}}, {}):
        show(table, console)
    shown = console.export_text()
    assert "are labelled false" in shown
    assert "completion " in shown
    parts = check_data.parts_of(prepared.rows[1], ROWS["labelled"], read.config.stages["sft"], read.tokenizer)
    assert [label for label, _ in parts] == ["prompt", "completion", "label"]
    assert parts[-1] == ("label", [("false", False)])


def test_a_new_kind_is_truncated(labelled):
    rows = [{"prompt": "I like tea and rain. " * 10, "completion": "Tea.", "label": True}]
    _, whole = labelled(rows, max_length=1000, truncates=True)
    length = whole.audit.lengths["row"][-1]
    _, cut = labelled(rows, max_length=length - 7, truncates=True)
    assert cut.rows["prompt_ids"][0] == whole.rows["prompt_ids"][0][7:]
    assert cut.rows["completion_ids"][0] == whole.rows["completion_ids"][0]
    assert cut.audit.noticed["truncated"].count == 1


def test_a_dataset_that_does_not_serve_it_is_refused(labelled):
    with pytest.raises(UserError, match=r"holds prompt_completion rows .* expected labelled"):
        labelled([{"prompt": "Say tea.", "completion": "Tea."}])


def test_every_stage_type_reads_a_kind_that_there_is():
    assert {stage_type.rows for stage_type in STAGE_TYPES.values()} == set(ROWS)
    assert all(ROWS[name].name == name for name in ROWS)
