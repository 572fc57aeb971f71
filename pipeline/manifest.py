"""The manifest of a run folder: which stages are finished, from what, and what they put out.

A record in `manifest.json` means that its stage is finished. It is written last and atomically; there is no status
field that could go stale, and nothing is guessed from which files exist.
"""

import hashlib
import json
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.errors import UserError

SCHEMA_VERSION = 1
FILE = "manifest.json"
PARTIAL = f"{FILE}.tmp"


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Output(Frozen):
    """What a stage hands on: a full model, one adapter, or a report. Paths are relative to the run folder.

    `full` is the folder of the full weights an adapter belongs to; None stands for the run's base model.
    """

    kind: Literal["full", "adapter", "report"]
    path: str
    full: str | None = None
    files: dict[str, str]


class Record(Frozen):
    """A finished stage. Durations are seconds; digests are SHA-256."""

    type: str
    parents: dict[str, str]
    config: dict[str, Any]
    config_digest: str
    inputs: dict[str, str]
    datasets: dict[str, dict[str, Any]]
    output: Output
    tokenizer: str
    metrics: dict[str, Any]
    parameters: dict[str, int]
    seed: int
    versions: dict[str, str]
    world_size: int
    started: str
    duration: float
    resumed_from_step: int | None = None
    git_revision: str | None = None


class TokenizerRecord(Frozen):
    """The run's tokenizer: what it was made from, and the fingerprint every stage must agree with."""

    source: str
    fingerprint: str
    pad_token: str
    eos_token: str
    template: str


class Manifest(Frozen):
    schema_version: int = SCHEMA_VERSION
    name: str
    model: dict[str, Any] = {}
    tokenizer: TokenizerRecord | None = None
    stages: dict[str, Record] = {}

    def without(self, stages: Collection[str]) -> "Manifest":
        """The manifest with these stages forgotten."""
        kept = {name: record for name, record in self.stages.items() if name not in stages}
        return self.model_copy(update={"stages": kept})


def digest(value: Any) -> str:
    """SHA-256 of a JSON-like value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checksums(run_dir: Path, folders: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of every file below the folders, by path relative to the run folder."""
    files = sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(run_dir).as_posix(): file_digest(path) for path in files}


def read(run_dir: Path) -> Manifest | None:
    """The manifest of a run folder, or None where there is none yet.

    Raises:
        UserError: if the file is damaged or of another schema.
    """
    path = run_dir / FILE
    mend = "Restore it from a copy, or move the run folder away to start anew; nothing was changed"
    try:
        raw = json.loads(path.read_bytes())
        version = raw["schema_version"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be read as a run folder: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: expected a manifest in JSON, got {error}. {mend}") from None
    if version != SCHEMA_VERSION:
        raise UserError(f"{path}: has schema version {version}, this version reads {SCHEMA_VERSION}. {mend}")
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: damaged at {'.'.join(map(str, first['loc']))}: {first['msg']}. {mend}") from None


def write(run_dir: Path, manifest: Manifest) -> None:
    """Replace the manifest in one step: a reader, or a crash, sees the old one or the new one."""
    run_dir.mkdir(parents=True, exist_ok=True)
    temporary = run_dir / PARTIAL
    with temporary.open("w", encoding="utf-8") as file:
        file.write(manifest.model_dump_json(indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(run_dir / FILE)


def remove_partial(run_dir: Path) -> None:
    """Remove what a process left that was killed while it wrote the manifest."""
    if (run_dir / PARTIAL).exists():
        with FileLock(run_dir / ".manifest.lock"):
            (run_dir / PARTIAL).unlink(missing_ok=True)


def update(run_dir: Path, name: str, **changes: Any) -> Manifest:
    """Change top-level fields of the manifest under its lock; `name` is the config's, for a first manifest."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / ".manifest.lock"):
        manifest = (read(run_dir) or Manifest(name=name)).model_copy(update=changes)
        write(run_dir, manifest)
    return manifest


def commit(run_dir: Path, stage: str, record: Record) -> None:
    """Add a stage's record. This is the last thing a stage does."""
    with FileLock(run_dir / ".manifest.lock"):
        manifest = read(run_dir)
        assert manifest is not None, "the tokenizer is recorded before any stage"
        write(run_dir, manifest.model_copy(update={"stages": manifest.stages | {stage: record}}))


def drop(run_dir: Path, stages: Collection[str]) -> None:
    """Forget stages that will run again. Their files stay until the new output replaces them."""
    with FileLock(run_dir / ".manifest.lock"):
        manifest = read(run_dir)
        if manifest is not None and not manifest.stages.keys().isdisjoint(stages):
            write(run_dir, manifest.without(stages))


def verify(run_dir: Path, stage: str, record: Record) -> None:
    """Compare a finished stage's files with their recorded checksums.

    Raises:
        UserError: naming the first file that is gone or changed.
    """
    for name, expected in record.output.files.items():
        path, mend = run_dir / name, f"Restore the file, or make it again with `--redo {stage}`"
        if not path.is_file():
            raise UserError(f"{path} is missing. {mend}")
        if file_digest(path) != expected:
            raise UserError(f"{path} has changed since the stage finished (its checksum differs). {mend}")
