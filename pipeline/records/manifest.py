"""The manifest of a run folder: which stages are finished, from what, and what they put out.

A record in `manifest.json` means that its stage is finished. It is written last and atomically; there is no status
field that could go stale, and nothing is guessed from which files exist.
"""

import json
import os
import re
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from filelock import FileLock
from pydantic import BaseModel, ConfigDict, FiniteFloat, ValidationError

from pipeline.config.schema import Dtype
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.values import NAME
from pipeline.records import metrics
from pipeline.system.digests import file_digest
from pipeline.system.errors import UserError

SCHEMA_VERSION = 1
FILE = "manifest.json"
PARTIAL = f"{FILE}.tmp"
Fault = tuple[tuple[str | int, ...], str]  # the place of a value and what is wrong with it


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
    duration: FiniteFloat
    resumed_from_step: int | None = None
    git_revision: str | None = None
    reason: str | None = None  # why the stage ran, in words; records of earlier versions lack it


class TokenizerRecord(Frozen):
    """The run's tokenizer: what it was made from, and the fingerprint every stage must agree with."""

    source: str
    fingerprint: str
    pad_token: str
    eos_token: str
    template: str


class Base(BaseModel):
    """What is read again of a manifest's `model`: the config's section, and the commit that was loaded."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    path: str | None = None
    dtype: Dtype = "float32"
    revision: str | None = None
    commit: str | None = None
    trust_remote_code: bool = False
    quantization: dict[str, Any] | None = None


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
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: expected a manifest in JSON, got {error}. {mend}") from None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(f"{path}: has schema version {version}, this version reads {SCHEMA_VERSION}. {mend}")
    try:
        manifest = Manifest.model_validate(raw, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        fault = first["loc"], metrics.in_words(first)
    else:
        fault = _odd(manifest)
    if fault is not None:
        where, words = fault
        raise UserError(f"{path}: damaged at {'.'.join(map(str, where))}: {words}. {mend}")
    return manifest


def _odd(manifest: Manifest) -> Fault | None:
    """The first value that has the right form and yet cannot be: its place and what is wrong with it."""
    if re.fullmatch(NAME, manifest.name) is None:
        return ("name",), f"expected letters, digits, `_`, `.` and `-`, got {metrics.shown(manifest.name)}"
    try:
        Base.model_validate(manifest.model)
    except ValidationError as error:
        first = error.errors()[0]
        return ("model", *first["loc"]), metrics.in_words(first)
    for name, record in manifest.stages.items():
        fault = _odd_record(name, record, manifest)
        if fault is not None:
            where, words = fault
            return ("stages", name, *where), words
    return None


def _odd_record(name: str, record: Record, manifest: Manifest) -> Fault | None:
    if re.fullmatch(NAME, name) is None:
        return (), f"expected a name of letters, digits, `_`, `.` and `-`, got {metrics.shown(name)}"
    if record.type not in STAGE_TYPES:
        return ("type",), f"expected one of {', '.join(sorted(STAGE_TYPES))}, got {metrics.shown(record.type)}"
    if STAGE_TYPES[record.type].makes == "shift report" and "reward" not in record.parents:
        return ("parents", "reward"), "expected the name of the reward model's stage, got none"
    output = record.output
    for key, path in (("path", output.path), ("full", output.full), *(("files", file) for file in output.files)):
        if path is not None and not _is_inside(path):
            return ("output", key), f"expected a path inside the run folder, relative to it, got {metrics.shown(path)}"
    if output.kind == "adapter" and output.full is None and not manifest.model.get("path"):
        return (
            "output",
            "full",
        ), "expected the folder of the adapter's full weights, since model.path is empty, got null"
    fault = metrics.check(record.type, record.metrics)
    if fault is not None:
        where, words = fault
        return ("metrics", *where), words
    return None


def _is_inside(path: str) -> bool:
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path


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
