"""Where the files of a dataset are: paths, globs, folders and splits resolved, and the loader that reads them."""

import glob
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import load_dataset_builder

from pipeline.config import schema
from pipeline.system.errors import UserError

_SUFFIXES = {"json": ".json .jsonl", "csv": ".csv", "tsv": ".tsv", "parquet": ".parquet", "arrow": ".arrow"}
_SUFFIXES |= {"text": ".txt"}
LOADERS = {suffix: loader for loader, suffixes in _SUFFIXES.items() for suffix in suffixes.split()}
# Compressed files, and the package that opens them where Python's own library does not.
COMPRESSIONS = {".gz": None, ".bz2": None, ".xz": None, ".zip": None, ".zst": "zstandard", ".lz4": "lz4"}
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `save_to_disk`, and of clones from the hub
_METADATA = (*_SAVED, "dataset_infos.json")


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


def find(name: str, dataset: schema.Data, folder: Path) -> list[Part]:
    """Resolve the paths of a dataset against `folder`, the config's.

    Raises:
        UserError: if a path looks like a file and is not there, or is of a kind that cannot be read.
    """
    specs = dataset.sources or [dataset]
    keys = [f"data.{name}.sources.{i}.path" for i in range(len(specs))] if dataset.sources else [f"data.{name}.path"]
    parts = [_resolve(folder, name, spec, key) for spec, key in zip(specs, keys, strict=True)]
    for part, key in zip(parts, keys, strict=True):
        _can_be_read(part, key)
    return parts


def _can_be_read(part: Part, key: str) -> None:
    """Every file of a source is one: reading a pipe would wait for ever."""
    for file in part.files:
        if not file.exists():
            raise UserError(f"{key}: {file} is a link to a file that does not exist; mend or remove the link")
        if not file.is_file() and not file.is_dir():
            raise UserError(f"{key}: {file} is no file but a pipe, a socket or a device; expected a file of rows")


def _resolve(base: Path, name: str, spec: schema.Source, key: str) -> Part:
    pattern, literal = str(base / Path(spec.path).expanduser()), base / Path(spec.path).expanduser()
    inside = glob.escape(f"{base}/") + spec.path if pattern.startswith(f"{base}/") else pattern
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
    loader, _ = loader_of(kind)
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


def loader_of(kind: str) -> tuple[str, dict[str, Any]]:
    """The loader of the datasets library, and its options."""
    if kind == "json":
        return kind, {"parse_agent_traces": False}  # it takes rows with a `messages` and a `source` column for such
    if kind not in ("csv", "tsv"):
        return kind, {}
    return "csv", {"sep": "\t" if kind == "tsv" else ",", "keep_default_na": False}
