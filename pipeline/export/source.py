"""Find what is taken from a run folder: a stage's weights, checked against the record, and held fast."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.base import base_model
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.type_row import POLICIES, REWARD_MODELS
from pipeline.records.finished import Finished
from pipeline.records.manifest import Record
from pipeline.records.stage_folder import LOCK
from pipeline.show.results import recorded_in
from pipeline.system.errors import UserError, unknown

WAIT = 5  # seconds, for a stage that is at work


@dataclass(frozen=True)
class Source(Finished):
    """A finished stage of a run, as what its model is loaded from."""

    @property
    def scores(self) -> bool:
        return STAGE_TYPES[self.record.type].makes in REWARD_MODELS

    @property
    def dtype(self) -> str:
        return self.recorded.model.get("dtype", "float32")

    @property
    def full(self) -> str:
        """Return the full weights: the stage's own, those below its adapter, or the base model's folder or hub id."""
        output = self.record.output
        if output.kind == "full":
            return str(self.run_dir / output.path)
        return str(self.recorded.model["path"]) if output.full is None else str(self.run_dir / output.full)

    @property
    def adapter(self) -> str | None:
        output = self.record.output
        return str(self.run_dir / output.path) if output.kind == "adapter" else None

    @property
    def needs_base(self) -> bool:
        """Tell whether the stage's weights are an adapter on the base model."""
        return self.adapter is not None and self.record.output.full is None


def find(run_dir: Path, stage: str) -> Source:
    """Find a stage in a run folder.

    Raises:
        UserError: if it is not there, not finished, or puts out no model.
    """
    run_dir = run_dir.expanduser().resolve()
    recorded = recorded_in(run_dir)
    models = []
    for name, record in recorded.stages.items():
        if STAGE_TYPES[record.type].makes in (*POLICIES, *REWARD_MODELS):
            models.append(name)
    if stage not in recorded.stages:
        why = unknown("finished stage", stage, models)
        raise UserError(f"{run_dir}: {why}")
    if stage not in models:
        makes = STAGE_TYPES[recorded.stages[stage].type].makes
        has = f"models are put out by {', '.join(models)}" if models else "no stage of it has put out a model"
        raise UserError(f"{run_dir}: stage {stage!r} puts out no model (it makes: {makes}); {has}")
    return Source(run_dir, recorded, stage)


@contextlib.contextmanager
def held(*sources: Source) -> Iterator[None]:
    """Keep other processes from running the stages again whose files are read. All are stages of one run.

    A run folder that may not be written to cannot be locked, and no stage can run in it.

    Raises:
        UserError: if one of them is at work.
    """
    stages = {stage: source.run_dir for source in sources for stage in (source.stage, source.below) if stage}
    with contextlib.ExitStack() as locks:
        for stage, run_dir in stages.items():
            folder = run_dir / stage
            if not os.access(folder, os.W_OK):
                continue
            try:
                locks.enter_context(FileLock(folder / LOCK).acquire(timeout=WAIT))
            except Timeout:
                why = "is held by another process, a run or an export"
                raise UserError(f"stage {stage!r} {why}; give the same command again afterwards") from None
        yield


def verify(source: Source) -> None:
    """Compare everything that is read with the checksums and the fingerprint on record.

    Raises:
        UserError: naming the first file that is gone or changed, or the base model, if it is another one.
    """
    now = recorded_in(source.run_dir)
    if now.stages.get(source.stage) != source.record:
        raise UserError(f"stage {source.stage!r} has been run again by another process; give the same command again")
    source.verify()
    if source.needs_base and Path(source.full).is_absolute():
        verify_base(Path(source.full), source.record)


def verify_base(folder: Path, record: Record) -> None:
    """Compare a base model in a folder with the one that the stage was trained on.

    Raises:
        UserError: if it is gone, or another one.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: the base model is gone, and the stage is an adapter on it. Restore it")
    expected = record.inputs.get("base model")
    if expected is not None and base_model.fingerprint_of_folder(folder) != expected:
        fault = "has changed since the stage was trained on it"
        raise UserError(f"{folder}: the base model {fault}, so its adapter belongs to other weights. Restore it")
