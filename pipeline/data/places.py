"""Find the files of a dataset: resolve paths, globs, folders and splits, and name the loader that reads them."""

import glob
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config.schema import Data, Source
from pipeline.system.errors import UserError

LOADERS = {
    ".json": "json",
    ".jsonl": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".txt": "text",
}
# Compressed files, and the package that opens them where Python's own library does not.
COMPRESSIONS = {".gz": None, ".bz2": None, ".xz": None, ".zip": None, ".zst": "zstandard", ".lz4": "lz4"}
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")  # of `save_to_disk`, and of clones from the hub
_METADATA = (*_SAVED, "dataset_infos.json")


@dataclass(frozen=True)
class Part:
    """Hold one source of a dataset with its place resolved.

    `kind` is a loader of the datasets library, `saved` (by `save_to_disk`, at `files[0]`) or `hub` (no files).
    """

    dataset: str
    spec: Source
    kind: str
    files: tuple[Path, ...] = ()

    @property
    def label(self) -> str:
        """Name the source in messages: its only file, or its dataset."""
        if len(self.files) == 1:
            return _tidied(self.files[0])
        return f"dataset {self.dataset!r} ({self.spec.path})"


def find(name: str, dataset: Data, folder: Path) -> list[Part]:
    """Resolve the paths of a dataset against `folder`, the config's.

    Raises:
        UserError: if a path looks like a file and is not there, or is of a kind that cannot be read.
    """
    specs: dict[str, Source] = {f"data.{name}.path": dataset}
    if dataset.sources:
        specs = {f"data.{name}.sources.{i}.path": spec for i, spec in enumerate(dataset.sources)}
    parts = {key: _resolve(folder, name, spec, key) for key, spec in specs.items()}
    for key, part in parts.items():
        _check_files(part, key)
    return list(parts.values())


def _check_files(part: Part, key: str) -> None:
    """Refuse what is neither a file nor a folder: reading a pipe would wait for ever."""
    for file in part.files:
        if not file.exists():
            raise UserError(f"{key}: {file} is a link to a file that does not exist; mend or remove the link")
        if not file.is_file() and not file.is_dir():
            raise UserError(f"{key}: {file} is no file but a pipe, a socket or a device; expected a file of rows")


def _resolve(base: Path, name: str, spec: Source, key: str) -> Part:
    """Tell what the path of a source names: files, a folder of splits, a folder of `save_to_disk`, or a hub id."""
    path = spec.path
    matches = _matches(base, path)
    if not matches and _is_local(path):
        raise UserError(f"{key}: no such file: {(base / Path(path).expanduser()).resolve()}")
    if not matches:
        return Part(name, spec, "hub")
    is_folder = len(matches) == 1 and matches[0].is_dir()
    _refuse_hub_fields(spec, is_folder, key)
    if is_folder:
        return _from_folder(name, spec, matches[0], key)
    files: list[Path] = []
    for match in matches:
        files += _data_files(match) if match.is_dir() else [match]
    kind = _one_kind(files, key, base / Path(path).expanduser())
    return Part(name, spec, kind, tuple(dict.fromkeys(files)))


def _tidied(file: Path) -> str:
    """Show a path without `..`, where it names the same file then: behind a link it may name another."""
    short = Path(os.path.normpath(file))
    return str(short if short.exists() and file.exists() and short.samefile(file) else file)


def _matches(folder: Path, path: str) -> list[Path]:
    """Return the files and folders that a path or a glob names, sorted; an empty list if nothing is there."""
    literal = folder / Path(path).expanduser()
    if literal.exists():  # a name may hold the characters of a glob
        return [literal.absolute()]
    pattern = os.path.expanduser(path)  # noqa: PTH111 (a slash at the end of a glob stays: it takes folders alone)
    names = glob.glob(pattern, root_dir=folder, recursive=True)  # noqa: PTH207
    return [(folder / name).absolute() for name in sorted(names)]


def _is_local(path: str) -> bool:
    """Say whether a path can only be one of files: a hub id is `name` or `owner/name`, without a data file's suffix."""
    has_suffix = _kind(Path(path)) is not None
    return has_suffix or path.startswith((".", "/", "~")) or "*" in path or path.count("/") > 1


def _refuse_hub_fields(spec: Source, is_folder: bool, key: str) -> None:
    """Refuse what says something of a hub dataset only; a folder may have splits too."""
    for field in sorted(spec.model_fields_set & {"name", "revision", "split"}):
        if field != "split" or not is_folder:
            raise UserError(f"{key.removesuffix('path')}{field}: has no effect on files; leave it out")


def _from_folder(name: str, spec: Source, folder: Path, key: str) -> Part:
    """Return the source in a folder: a dataset of `save_to_disk`, or the files of one split."""
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return Part(name, spec, "saved", (folder,))
    return _split_of_folder(name, spec, folder, key)


def _split_of_folder(name: str, spec: Source, folder: Path, key: str) -> Part:
    """Return the files of one split of a folder, told by their names as the datasets library does it."""
    from datasets import load_dataset_builder

    remaining = {file.resolve(): file for file in _data_files(folder)}
    kind = _one_kind(list(remaining.values()), key, folder)
    loader, _ = loader_of(kind)
    splits = load_dataset_builder(loader, data_dir=glob.escape(str(folder))).config.data_files or {}
    files_of: dict[str, list[Path]] = {}
    for split, files in splits.items():
        targets = [Path(file).resolve() for file in files]
        files_of[str(split)] = [remaining.pop(target) for target in targets if target in remaining]
    if not files_of.get(spec.split):
        raise UserError(f"{key}: {folder} has no split {spec.split!r}, its files' names give {', '.join(files_of)}")
    if remaining:
        stray = min(remaining.values())
        raise UserError(f"{key}: {stray} belongs to no split of the folder; give the files as a glob")
    return Part(name, spec, kind, tuple(files_of[spec.split]))


def _data_files(folder: Path) -> list[Path]:
    """Return the files below a folder that can hold rows: no hidden files, no metadata."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in _METADATA]
    visible = [path for path in files if not any(part[0] in "._" for part in path.relative_to(folder).parts)]
    return [path for path in visible if _kind(path) is not None]


def _kind(file: Path) -> str | None:
    """Return the loader for a file by its suffix, also under a suffix of compression; None if there is no loader."""
    is_compressed = file.suffix.lower() in COMPRESSIONS
    name = Path(file.stem) if is_compressed else file
    kind = LOADERS.get(name.suffix.lower())
    if is_compressed and kind in ("parquet", "arrow"):  # they are compressed inside
        return None
    return kind


def _one_kind(files: list[Path], key: str, where: Path) -> str:
    """Return the kind that all files are of; `where` names them in messages."""
    expected = f"expected {', '.join(LOADERS)}; text formats may be compressed ({', '.join(COMPRESSIONS)})"
    if not files:
        raise UserError(f"{key}: no file in {where} can be read; {expected}")
    kinds: set[str] = set()
    for file in files:
        kind = _kind(file)
        package = COMPRESSIONS.get(file.suffix.lower())
        if kind is None:
            raise UserError(f"{key}: cannot read {file}; {expected}")
        if package is not None and importlib.util.find_spec(package) is None:
            raise UserError(f"{key}: reading {file} needs another package: pip install {package}")
        kinds.add(kind)
    if len(kinds) > 1:
        names = ", ".join(sorted(kinds))
        raise UserError(f"{key}: files of different kinds ({names}); list them under `sources`")
    return kinds.pop()


def loader_of(kind: str) -> tuple[str, dict[str, Any]]:
    """Return the loader of the datasets library for a kind of file, and its options."""
    if kind == "json":
        return kind, {"parse_agent_traces": False}  # it takes rows with a `messages` and a `source` column for such
    if kind not in ("csv", "tsv"):
        return kind, {}
    return "csv", {"sep": "\t" if kind == "tsv" else ",", "keep_default_na": False}
