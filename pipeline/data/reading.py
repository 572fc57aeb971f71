"""Set how the datasets library reads: how it parses JSON, what it may print, how it keeps images, audio and video."""

import contextlib
import dataclasses
import io
import logging
import re
from collections.abc import Iterator
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.json
from datasets import Dataset, IterableDataset, LargeList, List
from datasets.packaged_modules.json import json as json_module

# What becomes of files of JSON, in words. With another text they are read anew, not from the library's cache.
VERSION = "dates are text, null is null"
# A line that begins with `null`; pyarrow crashes where a block of lines begins with one.
_NULL_LINE = re.compile(rb"(?m)^([ \t\r]*)null")
_NULL_AT_START = re.compile(rb"\A(\s*)null")
# A line that begins with anything but `null` or an object: values go over several lines.
_OTHER_LINE = re.compile(rb"(?m)^[ \t\r]*(?:[^\s{n]|n(?!ull))")


class _Json:
    """Stand in for pyarrow.json in the datasets library, with two differences.

    A line that is `null` becomes a row without values; within a value that goes over several lines it stays null.
    What looks like a date stays text.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(pyarrow.json, name)

    def read_json(self, file: io.BytesIO, read_options: Any = None) -> pa.Table:
        lines = file.getvalue()
        if _NULL_LINE.search(lines):
            if _OTHER_LINE.search(lines):
                lines = _NULL_AT_START.sub(rb"\1{}", lines)
                read_options = pyarrow.json.ReadOptions(block_size=len(lines) + 1)  # so that no other block begins
            else:
                lines = _NULL_LINE.sub(rb"\1{}", lines)
        table = pyarrow.json.read_json(io.BytesIO(lines), read_options=read_options)
        schema = pa.schema([(field.name, _without_dates(field.type)) for field in table.schema])
        if schema.equals(table.schema):
            return table
        options = pyarrow.json.ParseOptions(explicit_schema=schema)
        return pyarrow.json.read_json(io.BytesIO(lines), read_options=read_options, parse_options=options)


def _without_dates(kind: pa.DataType) -> pa.DataType:
    """Return a type with text in the place of dates and times, at any depth."""
    if pa.types.is_temporal(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _without_dates(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(_without_dates(kind.value_type))
    return kind


def use_our_json() -> None:
    """Let the datasets library parse JSON with _Json from now on: a stream is read long after it was opened."""
    if not isinstance(json_module.paj, _Json):
        json_module.paj = _Json()


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Let the datasets library log nothing: its errors come to us as exceptions, and our message says them once."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)


def without_decoding(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the rows with images, audio and video as they are stored: nothing here looks at them."""
    for column, feature in (rows.features or {}).items():
        stored = _undecoded(feature)
        if stored != feature:
            rows = rows.cast_column(column, stored)
    return rows


def _undecoded(feature: Any) -> Any:  # features are dictionaries and lists of features, which have no common class
    if isinstance(feature, dict):
        return {name: _undecoded(inner) for name, inner in feature.items()}
    if isinstance(feature, (List, LargeList)):
        return dataclasses.replace(feature, feature=_undecoded(feature.feature))
    if isinstance(feature, (datasets.Image, datasets.Audio, datasets.Video)):
        return dataclasses.replace(feature, decode=False)
    return feature
