"""Read the rows of a source: local files of any kind, folders, datasets saved to disk, the hub."""

import contextlib
import glob
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast, overload

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    load_dataset,
    load_from_disk,
)
from filelock import FileLock

from pipeline.config.schema import Source
from pipeline.data import fingerprints, reading, unreadable
from pipeline.data.places import Part, loader_of
from pipeline.data.unreadable import readable
from pipeline.system.cache import cache_folder
from pipeline.system.digests import digest
from pipeline.system.errors import UserError, nearest

NUM_LOOKED_AT = 100  # rows that tell a source's format
_SLOW = (1 << 30) // 10  # bytes; reading more shows a progress bar


@overload
def load(part: Part, streaming: Literal[False] = False) -> Dataset: ...
@overload
def load(part: Part, streaming: Literal[True]) -> IterableDataset: ...
@overload
def load(part: Part, streaming: bool) -> Dataset | IterableDataset: ...
def load(part: Part, streaming: bool = False) -> Dataset | IterableDataset:
    """Return the rows of a source with our column names, cut to its limit; a stream reads them as they are needed.

    Raises:
        UserError: if the files cannot be read, a mapped column is not there, or no rows are left.
    """
    spec = part.spec
    rows = _read(part, streaming)
    columns = column_names(part, rows)
    _check_mapping(part, columns)
    if spec.columns:
        rows = _with_our_names(rows, columns, spec)
    if spec.limit is None:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.take(spec.limit)
    return rows.select(range(min(spec.limit, len(rows))))


def _check_mapping(part: Part, columns: list[str]) -> None:
    """Refuse a `columns` that maps a column that is not there, or several to one."""
    mapping = part.spec.columns
    for theirs in mapping:
        if theirs not in columns:
            hint = nearest(theirs, columns)
            raise UserError(f"{part.label}: `columns` maps {theirs!r}, which is not a column; {hint}")
    if len(set(mapping.values())) < len(mapping):
        targets = ", ".join(mapping.values())
        raise UserError(f"{part.label}: `columns` maps several columns to one: {targets}")


def _with_our_names(rows: Dataset | IterableDataset, columns: list[str], spec: Source) -> Dataset | IterableDataset:
    """Rename the mapped columns; a column that has one of the new names already goes."""
    replaced = [name for name in spec.columns.values() if name in columns and name not in spec.columns]
    # Through names that no one has, so that two columns may swap theirs.
    aside = {theirs: f"\0{ours}" for theirs, ours in spec.columns.items()}
    rows = rows.remove_columns(replaced).rename_columns(aside)
    return rows.rename_columns({name: name[1:] for name in aside.values()})


def column_names(part: Part, rows: Dataset | IterableDataset) -> list[str]:
    """Return the columns of a source's rows; a stream may have to read its first row."""
    with readable(part):
        return rows.column_names or list(next(iter(rows)))


def first_values(part: Part, rows: Dataset | IterableDataset) -> dict[str, Any]:
    """Return a row with the first value of each column that is not null among a source's first rows."""
    with readable(part):
        head: list[dict[str, Any]] = list(itertools.islice(rows, NUM_LOOKED_AT))
    if not head:
        raise unreadable.empty(part)
    return {column: next((row[column] for row in head if row[column] is not None), None) for column in head[0]}


def locate(part: Part, index: int) -> str:
    """Return where a row of a source is: the file, and the row in it, both counted from 0."""
    if part.kind not in ("hub", "saved") and len(part.files) > 1:
        for file in part.files:
            rows = _read(Part(part.dataset, part.spec, part.kind, (file,)), streaming=False)
            assert isinstance(rows, Dataset)
            if index < len(rows):
                return f"{file}: row {index}"
            index -= len(rows)
    return f"{part.label}: row {index}"


def _read(part: Part, streaming: bool) -> Dataset | IterableDataset:
    reading.use_our_json()
    if part.kind == "hub":
        rows = unreadable.from_hub(part, load_dataset, split=part.spec.split, streaming=streaming)
        return reading.without_decoding(cast("Dataset | IterableDataset", rows))  # one split, not a dict of them
    if part.kind != "saved" and not any(file.stat().st_size for file in part.files):
        raise unreadable.empty(part)
    with readable(part):
        rows = _saved(part, streaming) if part.kind == "saved" else _from_files(part, streaming)
        rows = reading.without_decoding(rows)
    if isinstance(rows, Dataset) and not len(rows):
        raise unreadable.empty(part)
    return rows


def _saved(part: Part, streaming: bool) -> Dataset | IterableDataset:
    """Read a dataset written by `save_to_disk`, with splits or without."""
    try:
        rows = load_from_disk(str(part.files[0]))
    except unreadable.DAMAGES as error:
        raise unreadable.damaged(part, part.files[0], error) from None
    if isinstance(rows, DatasetDict):
        if part.spec.split not in rows:
            splits = ", ".join(map(str, rows))
            raise UserError(f"{part.label}: has no split {part.spec.split!r}, only {splits}")
        rows = rows[part.spec.split]
    elif "split" in part.spec.model_fields_set:
        raise UserError(f"{part.label}: was saved without splits; leave out `split`")
    return rows.to_iterable_dataset() if streaming else rows


def _from_files(part: Part, streaming: bool) -> Dataset | IterableDataset:
    """Read files with a loader of the datasets library, and keep what it makes of them in our cache."""
    loader, options = loader_of(part.kind)
    # The library takes paths for patterns.
    files = [glob.escape(str(file)) for file in part.files]
    size = sum(file.stat().st_size for file in part.files)
    if loader == "csv":
        # Every cell is text: a column of answers such as "2" must not become numbers.
        head = next(iter(load_dataset(loader, data_files=files, split="train", streaming=True, **options)))
        options["features"] = Features(dict.fromkeys(head, Value("string")))
    if not streaming:  # the library's own cache goes by paths and times
        version = reading.VERSION if loader == "json" else ""
        key = digest([*fingerprints.file_digests(part), version])
        options["cache_dir"] = str(cache_folder() / "raw" / key[:32])
    with progress_bar(size >= _SLOW):
        return load_dataset(loader, data_files=files, split="train", streaming=streaming, **options)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Write in a folder as the only process, after the temporary files of killed ones were removed from it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that can only be read
            stack.enter_context(FileLock(folder / ".lock"))
            for leftover in folder.glob("tmp*"):
                leftover.unlink()
        yield


@contextlib.contextmanager
def progress_bar(is_slow: bool) -> Iterator[None]:
    """Show the bars of the datasets library in the block if its work takes a while, else hide them."""
    were_disabled = datasets.are_progress_bars_disabled()
    if is_slow:
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_disabled:
            datasets.disable_progress_bars()
        else:
            datasets.enable_progress_bars()
