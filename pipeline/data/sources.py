"""Where rows come from: local files of any kind, folders, datasets saved to disk, the hub; read and fingerprinted."""

import contextlib
import errno
import functools
import glob
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from lzma import LZMAError
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    Value,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError
from filelock import FileLock
from pyarrow import ArrowException

from pipeline.config.schema import Data
from pipeline.data import reading
from pipeline.data.places import Part, find, loader_of
from pipeline.system.cache import cache_folder
from pipeline.system.digests import digest, file_digest
from pipeline.system.errors import UserError, nearest, reason_of

_LARGE = 1 << 30  # bytes; larger sources are fingerprinted by samples
_SAMPLE = 1 << 20  # bytes
_NUM_SAMPLES = 64
# What a damaged file of `save_to_disk` can raise.
_DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # errors that no reading gives
_ALLOWING = (errno.EACCES, errno.EPERM)
NUM_LOOKED_AT = 100  # rows that tell a source's format


@functools.lru_cache(maxsize=65536)
def _content(file: Path, size: int, _mtime: float, num_samples: int | None) -> str:
    """Digest of a file, or of its size and of samples spread over it."""
    if num_samples is None or size <= num_samples * _SAMPLE:
        return file_digest(file)
    sums = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for i in range(num_samples):
            opened.seek(i * (size - _SAMPLE) // (num_samples - 1))
            sums.update(opened.read(_SAMPLE))
    return sums.hexdigest()


def fingerprint(part: Part) -> str:
    """Digest of what a source holds and of how it is read; local files count by content, not by path.

    Of sources larger than 1 GiB the files' sizes and samples count, 64 or more in all and at least 4 of a file.
    """
    spec = part.spec
    if part.kind == "hub":
        content: Any = [spec.path, spec.name, spec.split, _from_hub(part, _hub_hash)]
    else:
        content = _contents(part)
    return digest([part.kind, content, spec.format, spec.columns, spec.limit])


def _contents(part: Part) -> list[str]:
    """Digests of a source's files, in order."""
    files = list(part.files)
    try:
        if part.kind == "saved":
            files = _saved_files(part)
        sizes = [file.stat().st_size for file in files]
        samples = max(4, _NUM_SAMPLES // len(files)) if sum(sizes) > _LARGE else None
        both = zip(files, sizes, strict=True)
        return [_content(file, size, file.stat().st_mtime, samples) for file, size in both]
    except OSError as error:
        raise UserError(f"{part.label}: cannot be read: {error}") from None


def _saved_files(part: Part) -> list[Path]:
    """The files that hold the rows of a dataset written by `save_to_disk`; others beside them are caches."""
    folder = part.files[0]
    folder = folder / part.spec.split if (folder / "dataset_dict.json").is_file() else folder
    if not (folder / "state.json").is_file():
        raise UserError(f"{part.label}: has no split {part.spec.split!r}")
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [file["filename"] for file in state["_data_files"]]
    except _DAMAGED as error:
        raise _damaged(part, folder / "state.json", error) from None
    return [folder / "state.json", *(folder / name for name in names)]


def _damaged(part: Part, where: Path, error: Exception) -> UserError:
    what = f"{where} cannot be read ({type(error).__name__}: {reason_of(error)})"
    return UserError(f"{part.label}: {what}; write the folder again with save_to_disk")


@functools.lru_cache(maxsize=256)
def _hub_hash(path: str, name: str | None, revision: str | None) -> str:
    return load_dataset_builder(path, name=name, revision=revision).hash


def fingerprint_of(name: str, dataset: Data, folder: Path) -> str:
    """Digest of what a dataset holds, and of what else decides which rows are read and how."""
    settings = [dataset.shuffle_buffer] if dataset.streaming else []
    parts = find(name, dataset, folder)
    return digest([*map(fingerprint, parts), [part.spec.weight for part in parts], *settings])


def _from_hub(part: Part, load: Callable[..., Any], **options: Any) -> Any:
    spec = part.spec
    try:
        return load(spec.path, name=spec.name, revision=spec.revision, **options)
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        what = f"cannot load {spec.path!r} from the hub, nor is it a file"
        raise UserError(f"data.{part.dataset}: {what}: {reason_of(error)}") from None


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Write in a folder as the only process, after the temporary files of killed ones were removed from it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a cache that can only be read
            stack.enter_context(FileLock(folder / ".lock"))
            for left in folder.glob("tmp*"):
                left.unlink()
        yield


def load(part: Part, streaming: bool = False) -> Dataset | IterableDataset:
    """The rows of a source with our column names, cut to its limit; in a stream they are read as they are needed.

    Raises:
        UserError: if the files cannot be read, a mapped column is not there, or no rows are left.
    """
    rows, spec = _read(part, streaming), part.spec
    columns = column_names(part, rows)
    for theirs in spec.columns:
        if theirs not in columns:
            hint = nearest(theirs, columns)
            raise UserError(f"{part.label}: `columns` maps {theirs!r}, which is not a column; {hint}")
    targets = list(spec.columns.values())
    if len(set(targets)) < len(targets):
        raise UserError(f"{part.label}: `columns` maps several columns to one: {', '.join(targets)}")
    if spec.columns:
        replaced = [name for name in targets if name in columns and name not in spec.columns]
        # Through names that no one has, so that two columns may swap theirs.
        aside = {theirs: f"\0{ours}" for theirs, ours in spec.columns.items()}
        rows = rows.remove_columns(replaced).rename_columns(aside)
        rows = rows.rename_columns({name: name[1:] for name in aside.values()})
    if spec.limit is not None:
        rows = rows.take(spec.limit) if streaming else rows.select(range(min(spec.limit, len(rows))))
    return rows


def column_names(part: Part, rows: Dataset | IterableDataset) -> list[str]:
    """The columns of a source's rows; a stream may have to read its first row."""
    with readable(part):
        return rows.column_names or list(next(iter(rows)))


def first_values(part: Part, rows: Dataset | IterableDataset) -> dict[str, Any]:
    """A row with the first value of each column that is not null among a source's first rows."""
    with readable(part):
        head = list(itertools.islice(rows, NUM_LOOKED_AT))
    if not head:
        raise _empty(part)
    return {column: next((row[column] for row in head if row[column] is not None), None) for column in head[0]}


def _read(part: Part, streaming: bool) -> Dataset | IterableDataset:
    reading.use_our_json()
    if part.kind == "hub":
        rows = _from_hub(part, load_dataset, split=part.spec.split, streaming=streaming)
        return reading.without_decoding(rows)
    if part.kind != "saved" and not any(file.stat().st_size for file in part.files):
        raise _empty(part)
    with readable(part):
        rows = _saved(part, streaming) if part.kind == "saved" else _from_files(part, streaming)
        rows = reading.without_decoding(rows)
    if not streaming and not len(rows):
        raise _empty(part)
    return rows


def _saved(part: Part, streaming: bool) -> Dataset | IterableDataset:
    try:
        rows = load_from_disk(str(part.files[0]))
    except _DAMAGED as error:
        raise _damaged(part, part.files[0], error) from None
    if isinstance(rows, DatasetDict):
        if part.spec.split not in rows:
            raise UserError(f"{part.label}: has no split {part.spec.split!r}, only {', '.join(rows)}")
        rows = rows[part.spec.split]
    elif "split" in part.spec.model_fields_set:
        raise UserError(f"{part.label}: was saved without splits; leave out `split`")
    return rows.to_iterable_dataset() if streaming else rows


def _from_files(part: Part, streaming: bool) -> Dataset | IterableDataset:
    loader, options = loader_of(part.kind)
    # The library takes paths for patterns.
    files = [glob.escape(str(file)) for file in part.files]
    size = sum(file.stat().st_size for file in part.files)
    if loader == "csv":
        # Every cell is text: a column of answers such as "2" must not become numbers.
        first = next(iter(load_dataset(loader, data_files=files, split="train", streaming=True, **options)))
        options["features"] = Features(dict.fromkeys(first, Value("string")))
    if not streaming:  # the library's own cache goes by paths and times
        key = digest([*_contents(part), reading.VERSION if loader == "json" else ""])
        options["cache_dir"] = str(cache_folder() / "raw" / key[:32])
    with progress_bar(size >= _LARGE // 10):
        return load_dataset(loader, data_files=files, split="train", streaming=streaming, **options)


@contextlib.contextmanager
def progress_bar(shown: bool) -> Iterator[None]:
    """The bars of the datasets library, for work that takes a while only."""
    before = datasets.are_progress_bars_disabled()
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        yield
    finally:
        (datasets.disable_progress_bars if before else datasets.enable_progress_bars)()


def _empty(part: Part) -> UserError:
    if part.kind == "json" and any(file.stat().st_size for file in part.files):
        return UserError(
            f'{part.label}: is empty, or its rows have no columns; expected rows such as {{"text": "..."}}'
        )
    return UserError(f"{part.label}: is empty; expected at least one row")


@contextlib.contextmanager
def readable(part: Part) -> Iterator[None]:
    """Errors of the datasets library while it reads a source, in our words and in ours alone."""
    try:
        with reading.silence():
            yield
    except UserError:
        raise
    except StopIteration:
        raise _empty(part) from None
    except RecursionError:
        raise UserError(f"{part.label}: cannot be read: a value has too many brackets within brackets") from None
    except (DatasetGenerationError, ArrowException, ValueError, OSError, EOFError, LZMAError, BadZipFile) as error:
        if fault := _fault_of_cache(part, error.__cause__ or error):
            raise UserError(fault) from None
        reason = [type(error).__name__, *str(error.__cause__ or error).strip().splitlines()][-1]
        if "corresponds to no data" in reason or "No columns to parse" in reason:
            raise _empty(part) from None
        raise UserError(f"{part.label}: cannot be read: {reason}") from None


def _fault_of_cache(part: Part, error: BaseException) -> str | None:
    """What to say of an error that comes from writing the cache, not from reading the source; None for others."""
    if not isinstance(error, OSError):
        return None
    place = Path(error.filename) if isinstance(error.filename, str) else None
    reason = error.strerror
    if str(error).startswith("Not enough disk space"):  # the datasets library looks before it writes
        reason = "No space left on device"
    elif error.errno not in _WRITING and (place is None or place in part.files or error.errno not in _ALLOWING):
        return None
    seen = f"{place or cache_folder()}: the cache of prepared data cannot be written ({reason})"
    return f"{seen}; make room or allow writing there, or set HF_HOME to another folder"


def locate(part: Part, index: int) -> str:
    """Where a row of a source is: the file, and the row in it, both counted from 0."""
    if part.kind not in ("hub", "saved") and len(part.files) > 1:
        for file in part.files:
            count = len(_read(Part(part.dataset, part.spec, part.kind, (file,)), streaming=False))
            if index < count:
                return f"{file}: row {index}"
            index -= count
    return f"{part.label}: row {index}"
