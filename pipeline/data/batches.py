"""Turn a batch of raw rows into columns: converted, tokenised and measured, one row in, one row out.

A row that does not fit gets the number of its fault (`_fault`, 0 for no fault) and the reason (`_why`).
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Features, Value
from transformers import PreTrainedTokenizerFast

from pipeline.data.convert import to_messages
from pipeline.data.encode import special_tokens
from pipeline.data.faults import FAULTS, Row, RowFault
from pipeline.data.heldout import key
from pipeline.data.joints import begins_with, eos_id
from pipeline.data.row_kind import RowKind
from pipeline.data.rows import ROWS
from pipeline.data.tools import as_text, refuse_tools
from pipeline.system.digests import hash64

FAULT_KINDS = list(FAULTS)  # number n in `_fault` is the n-th of them, counted from 1
NO_KEY = 0  # of a row without a prompt
# What is noticed of single rows: 0 or 1, and `truncated` the number of tokens that are cut.
NOTICED = ("special_tokens", "eos", "no_bos", "other_tokens", "truncated")

Batch = dict[str, list[Any]]


@dataclass(frozen=True)
class _Marks:
    """The tokens of a tokenizer that are looked for: its eos, the BOS it begins with (or None), all special ones."""

    eos: int
    bos: int | None
    special: re.Pattern[str]


def _rows_of(batch: Batch) -> list[Row]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _columns_of(rows: list[Row], features: Features) -> dict[str, Any]:
    """Return rows as columns. Where a row lacks a value it is 0 in a column of numbers, or null."""
    columns: dict[str, Any] = {}
    for name, feature in features.items():
        if isinstance(feature, Value) and feature.dtype != "string":
            columns[name] = np.array([row.get(name, 0) for row in rows], feature.dtype)
        else:
            columns[name] = [row.get(name) for row in rows]
    return columns


def _as_row(fault: RowFault) -> Row:
    """Return the row of a fault; what it holds nevertheless has a prompt whose key counts."""
    row = {"_fault": FAULT_KINDS.index(fault.kind) + 1, "_why": str(fault)}
    return row if fault.row is None else row | {"_key": key(fault.row)}


@dataclass(frozen=True)
class PromptKeys:
    """Find the key of each row's prompt, which decides its side of the split."""

    shape: str

    def features(self) -> Features:
        return Features({"_fault": Value("int8"), "_why": Value("string"), "_key": Value("uint64")})

    def __call__(self, batch: Batch) -> dict[str, Any]:
        return _columns_of([self._row(row) for row in _rows_of(batch)], self.features())

    def _row(self, row: Row) -> Row:
        try:
            converted = ROWS["text"].convert(row, "text") if self.shape == "text" else to_messages(row, self.shape)
        except RowFault as fault:
            return _as_row(fault)
        return {"_key": key(converted)}


@dataclass(frozen=True)
class TokenIds:
    """Convert, tokenise and measure rows of a format as a kind of row.

    `max_length`: longer prompts lose their start; None: they stay as they are.
    `takes_tools`: whether what reads the rows can read tools.
    """

    shape: str
    kind: RowKind
    tokenizer: PreTrainedTokenizerFast
    max_length: int | None = None
    takes_tools: bool = True

    def features(self) -> Features:
        """Return the types of the columns: the token ids, and columns with a leading underscore for what is measured.

        `_key` is the prompt's, `_digest` the whole row's, `_pair` the same for a pair of answers in either order.
        """
        types: dict[str, Any] = dict.fromkeys(("_key", "_digest", "_pair"), Value("uint64"))
        types["_why"] = Value("string")
        types |= dict.fromkeys(("_fault", *(f"_{name}" for name in NOTICED)), Value("int8"))
        types["_truncated"] = Value("int32")
        types |= {f"_{name}": Value("int32") for name in self.kind.lengths}
        return Features(types | dict(self.kind.columns) | dict(self.kind.extras))

    def __call__(self, batch: Batch) -> dict[str, Any]:
        converted = [self._convert(row) for row in _rows_of(batch)]
        rows = [row for row in converted if not isinstance(row, RowFault)]
        encoded = iter(self.kind.encode(self.tokenizer, rows))
        marks = _Marks(eos_id(self.tokenizer), begins_with(self.tokenizer), special_tokens(self.tokenizer))
        finished: list[Row] = []
        for row in converted:
            ids = row if isinstance(row, RowFault) else next(encoded)
            if isinstance(row, RowFault) or isinstance(ids, RowFault):
                assert isinstance(ids, RowFault)
                finished.append(_as_row(ids))
            else:
                finished.append(self._measure(row, ids, marks))
        return _columns_of(finished, self.features())

    def _convert(self, row: Row) -> Row | RowFault:
        try:
            converted = self.kind.convert(row, self.shape)
            if not self.takes_tools:
                refuse_tools(converted)
        except RowFault as fault:
            return fault
        return converted

    def _measure(self, row: Row, ids: Row, marks: _Marks) -> Row:
        """Return the ids of a row, its prompt cut to `max_length`, with what is measured of it."""
        texts = [as_text(message) for message in row.get("prompt", ())]
        texts += [json.dumps(tool, ensure_ascii=False) for tool in row.get("tools", ())]
        sides = [as_text(row[side]) for side in self.kind.sides]
        ends_early = self.kind.ends_early(row, ids, marks.eos)
        first_column = next(iter(self.kind.columns))
        begins_with_bos = ids[first_column][:1] == [marks.bos]
        num_cut = 0
        if self.max_length is not None:
            num_cut = self.kind.truncate(ids, int(begins_with_bos), self.max_length)
        lengths = {f"_{name}": length for name, length in self.kind.measure(ids).items()}
        measured = {
            "_key": key(row),
            "_digest": hash64(*texts, "", *sides, *self.kind.marks(row)),
            "_pair": hash64(*texts, "", *sorted(sides)),
            "_special_tokens": int(any(map(marks.special.search, [*texts, *sides]))),
            "_eos": int(ends_early),
            "_no_bos": int(marks.bos is not None and not begins_with_bos),
            "_truncated": num_cut,
        }
        return measured | lengths | ids
