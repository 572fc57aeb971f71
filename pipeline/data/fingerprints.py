"""Take fingerprints of datasets: digests of what their sources hold and of how they are read.

Files of rows are hashed without the datasets library, which takes a second to import.

A stage's record holds them. A stage runs again if one of them has changed.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.config.schema import Data
from pipeline.data.places import Part, find
from pipeline.system.digests import digest, file_digest
from pipeline.system.errors import UserError

_LARGE = 1 << 30  # bytes; larger sources are fingerprinted by samples
_SAMPLE = 1 << 20  # bytes
_NUM_SAMPLES = 64  # of a source
_MIN_SAMPLES = 4  # of a file


def of_dataset(name: str, dataset: Data, folder: Path) -> str:
    """Return the digest of what a dataset holds, and of what else decides which rows are read and how."""
    parts = find(name, dataset, folder)
    weights = [part.spec.weight for part in parts]
    settings = [dataset.shuffle_buffer] if dataset.streaming else []
    return digest([*map(of_source, parts), weights, *settings])


def of_source(part: Part) -> str:
    """Return the digest of what a source holds and of how it is read; files count by content, not by path.

    Of sources larger than 1 GiB the files' sizes and samples count, 64 or more in all and at least 4 of a file.
    """
    spec = part.spec
    content: list[Any]
    if part.kind == "hub":
        from pipeline.data import unreadable

        content = [spec.path, spec.name, spec.split, unreadable.from_hub(part, _hub_hash)]
    else:
        content = file_digests(part)
    return digest([part.kind, content, spec.format, spec.columns, spec.limit])


@functools.lru_cache(maxsize=256)
def _hub_hash(path: str, name: str | None, revision: str | None) -> str | None:
    from datasets import load_dataset_builder

    return load_dataset_builder(path, name=name, revision=revision).hash


def file_digests(part: Part) -> list[str]:
    """Return the digests of a source's files, in order."""
    try:
        files = _saved_files(part) if part.kind == "saved" else part.files
        states = [file.stat() for file in files]
        num_samples = None
        if sum(state.st_size for state in states) > _LARGE:
            num_samples = max(_MIN_SAMPLES, _NUM_SAMPLES // len(files))
        return [
            _content_digest(file, state.st_size, state.st_mtime, num_samples)
            for file, state in zip(files, states, strict=True)
        ]
    except OSError as error:
        raise UserError(f"{part.label}: cannot be read: {error}") from None


@functools.lru_cache(maxsize=65536)
def _content_digest(file: Path, size: int, _mtime: float, num_samples: int | None) -> str:
    """Return the digest of a file's bytes, or of its size and of samples spread over it."""
    if num_samples is None or size <= num_samples * _SAMPLE:
        return file_digest(file)
    content = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        for i in range(num_samples):
            opened.seek(i * (size - _SAMPLE) // (num_samples - 1))
            content.update(opened.read(_SAMPLE))
    return content.hexdigest()


def _saved_files(part: Part) -> Sequence[Path]:
    """Return the files that hold the rows of a dataset written by `save_to_disk`; others beside them are caches."""
    from pipeline.data import unreadable

    folder = part.files[0]
    if (folder / "dataset_dict.json").is_file():
        folder = folder / part.spec.split
    state_file = folder / "state.json"
    if not state_file.is_file():
        raise UserError(f"{part.label}: has no split {part.spec.split!r}")
    try:
        state = json.loads(state_file.read_text(encoding="utf-8"))
        names = [file["filename"] for file in state["_data_files"]]
    except unreadable.DAMAGES as error:
        raise unreadable.damaged(part, state_file, error) from None
    return [state_file, *(folder / name for name in names)]
