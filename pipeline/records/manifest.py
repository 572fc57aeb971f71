"""Read and write the manifest of a run folder: which stages are finished, from what, and what they put out.

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

from pipeline.config.schema import MANIFEST, Dtype
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.values import NAME
from pipeline.records import metrics
from pipeline.records.metrics import Fault
from pipeline.system.digests import file_digest
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

SCHEMA_VERSION = 1
FILE = MANIFEST
PARTIAL = f"{FILE}.tmp"
NOT_FINISHED = "not finished yet"  # the reason of a stage that had no record
_LOCK = ".manifest.lock"
_MEND = "Restore it from a copy, or move the run folder away to start anew; nothing was changed"


class Frozen(BaseModel):
    """Refuse unknown fields and changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Output(Frozen):
    """Say what a stage hands on: a full model, one adapter, or a report. Paths are relative to the run folder.

    `full` is the folder of the full weights that an adapter belongs to; None stands for the run's base model. `files`
    has the checksum of every file.
    """

    kind: Literal["full", "adapter", "report"]
    path: str
    full: str | None = None
    files: dict[str, str]


class Origin(Frozen):
    """Say which stage of another run a stage was taken from.

    `run` is what the config says, `path` the folder that was there, `name` the name of that run. `stages` are the
    records there of the stage and of all that it was made from, ancestors first.
    """

    run: str
    path: str
    name: str
    stage: str
    stages: "dict[str, Record]"

    def __str__(self) -> str:
        return f"{self.stage} of {self.run}"


class Record(Frozen):
    """Say how a finished stage was made and what it measured. The duration is in seconds.

    `inputs` has the fingerprints of its datasets and of the base model, and digests of its parents' outputs and of the
    user's functions. `tokenizer` is the fingerprint of the run's tokenizer. `origin`: it was taken from another run.
    """

    type: str
    parents: dict[str, str]
    config: JsonObject
    config_digest: str
    inputs: dict[str, str]
    datasets: dict[str, JsonObject]
    output: Output
    tokenizer: str
    metrics: JsonObject
    parameters: dict[str, int]
    seed: int
    versions: dict[str, str]
    world_size: int
    started: str
    duration: FiniteFloat
    resumed_from_step: int | None = None
    git_revision: str | None = None
    reason: str | None = None  # why the stage ran, in words; records of earlier versions lack it
    origin: Origin | None = None


class TokenizerRecord(Frozen):
    """Say what the run's tokenizer was made from, and which fingerprint every stage must agree with."""

    source: str
    fingerprint: str
    pad_token: str
    eos_token: str
    template: str


class Base(BaseModel):
    """Check what is read again of a manifest's `model`: the config's section, and the commit that was loaded."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)

    path: str | None = None
    dtype: Dtype = "float32"
    revision: str | None = None
    commit: str | None = None
    trust_remote_code: bool = False
    quantization: JsonObject | None = None


class Manifest(Frozen):
    """Hold the records of a run's finished stages, its base model and its tokenizer."""

    schema_version: int = SCHEMA_VERSION
    name: str
    model: JsonObject = {}
    tokenizer: TokenizerRecord | None = None
    stages: dict[str, Record] = {}

    def without(self, stages: Collection[str]) -> "Manifest":
        """Return the manifest without the records of these stages."""
        others = {name: record for name, record in self.stages.items() if name not in stages}
        return self.model_copy(update={"stages": others})


def is_run(folder: Path) -> bool:
    """Tell whether a run has written a manifest here; other programs have files of that name."""
    try:
        return read(folder) is not None
    except UserError:
        return False


def read(run_dir: Path) -> Manifest | None:
    """Read the manifest of a run folder; None if there is none yet.

    Raises:
        UserError: if the file is damaged or of another schema.
    """
    path = run_dir / FILE
    try:
        content = json.loads(path.read_bytes())
        version = content["schema_version"]
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be read as a run folder: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: expected a manifest in JSON, got {error}. {_MEND}") from None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise UserError(f"{path}: has schema version {version}, this version reads {SCHEMA_VERSION}. {_MEND}")
    try:
        manifest = Manifest.model_validate(content, strict=True)
    except ValidationError as error:
        raise _damaged(path, metrics.first_fault(error)) from None
    if fault := _fault_of(manifest):
        raise _damaged(path, fault)
    return manifest


def _damaged(path: Path, fault: Fault) -> UserError:
    loc, words = fault
    return UserError(f"{path}: damaged at {'.'.join(map(str, loc))}: {words}. {_MEND}")


def _fault_of(manifest: Manifest) -> Fault | None:
    """Find the first value that has the right form and yet cannot be."""
    if re.fullmatch(NAME, manifest.name) is None:
        return ("name",), f"expected letters, digits, `_`, `.` and `-`, got {metrics.as_json(manifest.name)}"
    try:
        Base.model_validate(manifest.model)
    except ValidationError as error:
        loc, words = metrics.first_fault(error)
        return ("model", *loc), words
    for name, record in manifest.stages.items():
        fault = _fault_of_record(name, record, manifest)
        if fault is not None:
            loc, words = fault
            return ("stages", name, *loc), words
    return None


def _fault_of_record(name: str, record: Record, manifest: Manifest) -> Fault | None:
    if re.fullmatch(NAME, name) is None:
        return (), f"expected a name of letters, digits, `_`, `.` and `-`, got {metrics.as_json(name)}"
    if record.type not in STAGE_TYPES:
        return ("type",), f"expected one of {', '.join(sorted(STAGE_TYPES))}, got {metrics.as_json(record.type)}"
    if STAGE_TYPES[record.type].makes == "shift report" and "reward" not in record.parents:
        return ("parents", "reward"), "expected the name of the reward model's stage, got none"
    if fault := _fault_of_output(record.output, manifest):
        loc, words = fault
        return ("output", *loc), words
    return _fault_of_metrics(record)


def _fault_of_metrics(record: Record) -> Fault | None:
    """Look also at what is on record of the other run that a stage was taken from."""
    if fault := metrics.check(record.type, record.metrics):
        loc, words = fault
        return ("metrics", *loc), words
    for name, other in ({} if record.origin is None else record.origin.stages).items():
        loc = ("origin", "stages", name)
        if other.type not in STAGE_TYPES:
            return (*loc, "type"), f"expected a type of stage, got {metrics.as_json(other.type)}"
        if fault := _fault_of_metrics(other):
            return (*loc, *fault[0]), fault[1]
    return None


def _fault_of_output(output: Output, manifest: Manifest) -> Fault | None:
    paths = [("path", output.path), ("full", output.full), *(("files", file) for file in output.files)]
    for key, path in paths:
        if path is not None and not _is_inside(path):
            return (key,), f"expected a path inside the run folder, relative to it, got {metrics.as_json(path)}"
    if output.kind == "adapter" and output.full is None and not manifest.model.get("path"):
        return ("full",), "expected the folder of the adapter's full weights, since model.path is empty, got null"
    return None


def _is_inside(path: str) -> bool:
    """Say whether a path stays in the run folder that it is relative to."""
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
        with FileLock(run_dir / _LOCK):
            (run_dir / PARTIAL).unlink(missing_ok=True)


def update(run_dir: Path, name: str, **changes: Any) -> Manifest:
    """Change top-level fields of the manifest under its lock. A first manifest gets the `name` of the config."""
    run_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(run_dir / _LOCK):
        manifest = (read(run_dir) or Manifest(name=name)).model_copy(update=changes)
        write(run_dir, manifest)
    return manifest


def commit(run_dir: Path, stage: str, record: Record) -> None:
    """Add a stage's record. This is the last thing a stage does."""
    with FileLock(run_dir / _LOCK):
        manifest = read(run_dir)
        assert manifest is not None, "the tokenizer is recorded before any stage"
        write(run_dir, manifest.model_copy(update={"stages": manifest.stages | {stage: record}}))


def drop(run_dir: Path, stages: Collection[str]) -> None:
    """Forget stages that will run again. Their files stay until the new output replaces them."""
    with FileLock(run_dir / _LOCK):
        manifest = read(run_dir)
        if manifest is not None and not manifest.stages.keys().isdisjoint(stages):
            write(run_dir, manifest.without(stages))


def verify(run_dir: Path, stage: str, record: Record) -> None:
    """Compare a finished stage's files with their recorded checksums.

    Raises:
        UserError: naming the first file that is gone or changed.
    """
    for name, expected in record.output.files.items():
        verify_file(run_dir / name, expected, f"make it again with `--redo {stage}`")


def verify_file(path: Path, expected: str, again: str) -> None:
    """Compare a file of a finished stage with its checksum. `again`: how it is made again.

    Raises:
        UserError: if it is gone or changed.
    """
    mend = f"Restore the file, or {again}"
    if not path.is_file():
        raise UserError(f"{path} is missing. {mend}")
    if file_digest(path) != expected:
        raise UserError(f"{path} has changed since the stage finished (its checksum differs). {mend}")
