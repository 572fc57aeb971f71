"""Where rows come from: local files of any kind, folders, datasets saved to disk, the hub; resolved and read."""

import contextlib
import functools
import glob
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

from pipeline import schema
from pipeline.errors import UserError, nearest, reason_of
from pipeline.manifest import digest, file_digest
from pipeline.schema import RunConfig

_SUFFIXES = {"json": ".json .jsonl", "csv": ".csv", "tsv": ".tsv", "parquet": ".parquet", "arrow": ".arrow"}
_SUFFIXES |= {"text": ".txt"}
LOADERS = {suffix: loader for loader, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# Compressed files, and the package that opens them where Python's own library does not.
COMPRESSIONS = {".gz": None, ".bz2": None, ".xz": None, ".zip": None, ".zst": "zstandard", ".lz4": "lz4"}
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `save_to_disk`, and of clones from the hub
_METADATA = (*_SAVED, "dataset_infos.json")
_LARGE = 1 << 30  # bytes; larger sources are fingerprinted by samples
_SAMPLE = 1 << 20  # bytes
_NUM_SAMPLES = 64
NUM_LOOKED_AT = 100  # rows that tell a source's format


@dataclass(frozen=True)
class Part:
    """One source of a dataset with its place resolved.

    `kind` is a loader of the datasets library, `saved` (by `save_to_disk`, at `files[0]`) or `hub` (no files).
    """

    dataset: str
    spec: schema.Source
    kind: str
    files: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        return str(self.files[0]) if len(self.files) == 1 else f"dataset {self.dataset!r} ({self.spec.path})"


def find(config: RunConfig, name: str) -> list[Part]:
    """Resolve the paths of a dataset against the config's folder.

    Raises:
        UserError: if a path looks like a file and is not there, or is of a kind that cannot be read.
    """
    dataset = config.data[name]
    specs = dataset.sources or [dataset]
    keys = [f"data.{name}.sources.{i}.path" for i in range(len(specs))] if dataset.sources else [f"data.{name}.path"]
    return [_resolve(config, name, spec, key) for spec, key in zip(specs, keys, strict=True)]


def _resolve(config: RunConfig, name: str, spec: schema.Source, key: str) -> Part:
    pattern, literal = str(config.folder / Path(spec.path).expanduser()), config.folder / Path(spec.path).expanduser()
    inside = glob.escape(f"{config.folder}/") + spec.path if pattern.startswith(f"{config.folder}/") else pattern
    found = sorted(glob.glob(inside, recursive=True))  # noqa: PTH207
    matches = [literal.absolute()] if literal.exists() else [Path(match).absolute() for match in found]
    local = _kind(Path(spec.path)) is not None or spec.path.startswith((".", "/", "~")) or "*" in spec.path
    if not matches and (local or spec.path.count("/") > 1):
        raise UserError(f"{key}: no such file: {pattern}")
    if not matches:
        return Part(name, spec, "hub")
    folder = len(matches) == 1 and matches[0].is_dir()
    for field in sorted(spec.model_fields_set & {"name", "revision", "split"}):
        if field != "split" or not folder:
            raise UserError(f"{key.removesuffix('path')}{field}: has no effect on files; leave it out")
    if folder:
        saved = [matches[0] / "dataset_dict.json", matches[0] / "state.json"]
        if any(file.is_file() for file in saved):
            return Part(name, spec, "saved", (matches[0],))
        return _folder(name, spec, matches[0], key)
    files = [file for match in matches for file in (_data_files(match) if match.is_dir() else [match])]
    return Part(name, spec, _one_kind(files, key, pattern), tuple(dict.fromkeys(files)))


def _folder(name: str, spec: schema.Source, folder: Path, key: str) -> Part:
    """The files of one split of a folder, told by their names as the datasets library does it."""
    listed = {file.resolve(): file for file in _data_files(folder)}
    kind = _one_kind(list(listed.values()), key, folder)
    loader, _ = _loader(kind)
    splits = load_dataset_builder(loader, data_dir=glob.escape(str(folder))).config.data_files
    found: dict[str, list[Path]] = {}
    for split, files in splits.items():
        places = [Path(file).resolve() for file in files]
        found[str(split)] = [listed.pop(place) for place in places if place in listed]
    if not found.get(spec.split):
        raise UserError(f"{key}: {folder} has no split {spec.split!r}, its files' names give {', '.join(found)}")
    if listed:
        raise UserError(f"{key}: {min(listed.values())} belongs to no split of the folder; give the files as a glob")
    return Part(name, spec, kind, tuple(found[spec.split]))


def _data_files(folder: Path) -> list[Path]:
    """The files below a folder that can hold rows: no hidden files, no metadata."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _METADATA]
    visible = [path for path in files if not any(part[0] in "._" for part in path.relative_to(folder).parts)]
    return [path for path in visible if _kind(path) is not None]


def _kind(file: Path) -> str | None:
    compressed = file.suffix.lower() in COMPRESSIONS
    kind = LOADERS.get((Path(file.stem) if compressed else file).suffix.lower())
    return None if compressed and kind in ("parquet", "arrow") else kind  # they are compressed inside


def _one_kind(files: list[Path], key: str, where: Any) -> str:
    """The kind that all files are of."""
    expected = f"expected {', '.join(LOADERS)}; text formats may be compressed ({', '.join(COMPRESSIONS)})"
    if not files:
        raise UserError(f"{key}: no file in {where} can be read; {expected}")
    for file in files:
        package = COMPRESSIONS.get(file.suffix.lower())
        if _kind(file) is None:
            raise UserError(f"{key}: cannot read {file}; {expected}")
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"{key}: reading {file} needs another package: pip install {package}")
    kinds = sorted({_kind(file) for file in files})
    if len(kinds) > 1:
        raise UserError(f"{key}: files of different kinds ({', '.join(kinds)}); list them under `sources`")
    return kinds[0]


def _loader(kind: str) -> tuple[str, dict[str, Any]]:
    """The loader of the datasets library, and its options."""
    if kind not in ("csv", "tsv"):
        return kind, {}
    return "csv", {"sep": "\t" if kind == "tsv" else ",", "keep_default_na": False}


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
    state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    return [folder / "state.json", *(folder / file["filename"] for file in state["_data_files"])]


@functools.lru_cache(maxsize=256)
def _hub_hash(path: str, name: str | None, revision: str | None) -> str:
    return load_dataset_builder(path, name=name, revision=revision).hash


def fingerprint_of(config: RunConfig, name: str) -> str:
    """Digest of what a dataset holds, and of what else decides which rows are read and how."""
    dataset = config.data[name]
    settings = [dataset.shuffle_buffer] if dataset.streaming else []
    parts = find(config, name)
    return digest([*map(fingerprint, parts), [part.spec.weight for part in parts], *settings])


def _from_hub(part: Part, load: Callable[..., Any], **options: Any) -> Any:
    spec = part.spec
    try:
        return load(spec.path, name=spec.name, revision=spec.revision, **options)
    except (OSError, ValueError, RuntimeError, DatasetGenerationError) as error:
        what = f"cannot load {spec.path!r} from the hub, nor is it a file"
        raise UserError(f"data.{part.dataset}: {what}: {reason_of(error)}") from None


def cache_folder() -> Path:
    """Where prepared data is kept from run to run."""
    return Path(datasets.config.HF_DATASETS_CACHE) / "rlhf-pipeline"


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
    if part.kind == "hub":
        return _from_hub(part, load_dataset, split=part.spec.split, streaming=streaming)
    if part.kind != "saved" and not any(file.stat().st_size for file in part.files):
        raise _empty(part)
    with readable(part):
        if part.kind == "saved":
            rows = load_from_disk(str(part.files[0]))
            if isinstance(rows, DatasetDict):
                if part.spec.split not in rows:
                    raise UserError(f"{part.label}: has no split {part.spec.split!r}, only {', '.join(rows)}")
                rows = rows[part.spec.split]
            elif "split" in part.spec.model_fields_set:
                raise UserError(f"{part.label}: was saved without splits; leave out `split`")
            rows = rows.to_iterable_dataset() if streaming else rows
        else:
            loader, options = _loader(part.kind)
            # The library takes paths for patterns.
            files = [glob.escape(str(file)) for file in part.files]
            size = sum(file.stat().st_size for file in part.files)
            if loader == "csv":
                # Every cell is text: a column of answers such as "2" must not become numbers.
                first = next(iter(load_dataset(loader, data_files=files, split="train", streaming=True, **options)))
                options["features"] = Features(dict.fromkeys(first, Value("string")))
            if not streaming:  # the library's own cache goes by paths and times
                options["cache_dir"] = str(cache_folder() / "raw" / digest(_contents(part))[:32])
            with progress_bar(size >= _LARGE // 10):
                rows = load_dataset(loader, data_files=files, split="train", streaming=streaming, **options)
    if not streaming and not len(rows):
        raise _empty(part)
    return rows


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
    return UserError(f"{part.label}: is empty; expected at least one row")


@contextlib.contextmanager
def readable(part: Part) -> Iterator[None]:
    """Errors of the datasets library while it reads a source, in our words."""
    try:
        yield
    except UserError:
        raise
    except StopIteration:
        raise _empty(part) from None
    except (DatasetGenerationError, ValueError, OSError, EOFError, LZMAError, BadZipFile) as error:
        reason = [type(error).__name__, *str(error.__cause__ or error).strip().splitlines()][-1]
        if "corresponds to no data" in reason or "No columns to parse" in reason:
            raise _empty(part) from None
        raise UserError(f"{part.label}: cannot be read: {reason}") from None


def locate(part: Part, index: int) -> str:
    """Where a row of a source is: the file, and the row in it, both counted from 0."""
    if part.kind not in ("hub", "saved") and len(part.files) > 1:
        for file in part.files:
            count = len(_read(Part(part.dataset, part.spec, part.kind, (file,)), streaming=False))
            if index < count:
                return f"{file}: row {index}"
            index -= count
    return f"{part.label}: row {index}"
