"""Find in another run what the config must know of a stage that is taken from there: its type, and where weights lie.

The manifest is read here as plain JSON, and only as far as needed. `chain/other_run.py` checks all of it before
anything is taken. A stage that this run has taken already is known from the run's own manifest where the other run is
gone, or has not finished that stage again.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config.document import Problems
from pipeline.config.schema import LOCK, MANIFEST, Options, RunConfig, Taken
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.type_row import POLICIES, REWARD_MODELS
from pipeline.system import locks
from pipeline.system.errors import UserError, reason_of, unknown


def fill_in(config: RunConfig, problems: Problems) -> RunConfig:
    """Fill in the stages that are taken from other runs; add a problem for each that cannot be."""
    stages = dict(config.stages)
    for name, stage in config.stages.items():
        if isinstance(stage, Taken):
            try:
                stages[name] = _found(config, name, stage)
            except UserError as error:
                problems.add(str(error), "stages", name, "run")
    return config.model_copy(update={"stages": stages})


def is_current(config: RunConfig) -> bool:
    """Tell whether the other runs still say what a config was filled in with."""
    problems = Problems()
    return fill_in(config, problems) == config and not problems


def folder_of(config: RunConfig, stage: Taken) -> Path:
    """Return the other run's folder; a relative path starts at the config's folder, as that of data."""
    return (config.folder / Path(stage.run).expanduser()).resolve()


def stage_of(stage: Taken) -> str:
    """Return the stage's name in the other run."""
    assert stage.stage is not None, "the config's reader fills in the stage's own name"
    return stage.stage


def _found(config: RunConfig, name: str, stage: Taken) -> Taken:
    """Return the section with all that follows from the other run, or else from the stage's own record.

    Raises:
        UserError: if neither has a finished stage that can be taken.
    """
    folder = folder_of(config, stage)
    if folder == config.run_path:
        raise UserError(f"{folder} is the folder of this run itself; give that of another run")
    try:
        record = _record(folder, stage_of(stage))
    except UserError:
        folder = config.run_path
        record = _taken_already(folder, name, stage)
        if record is None:
            raise
    return stage.model_copy(update=_understood(record, folder, lambda full: _is_base(config, folder / full)))


def _taken_already(run_dir: Path, name: str, stage: Taken) -> dict[str, Any] | None:
    """Return the record of a stage that this run has taken from where its section says; None: it has not."""
    try:
        record = _record(run_dir, name)
        origin = record["origin"]
        is_the_same = (origin["run"], origin["stage"]) == (stage.run, stage_of(stage))
    except (UserError, KeyError, TypeError):
        return None
    return record if is_the_same else None


def _record(folder: Path, stage: str) -> dict[str, Any]:
    """Return a finished stage's record, as plain JSON.

    Raises:
        UserError: if there is none, with what is there instead.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a run folder, relative to the config's folder")
    try:
        stages = json.loads(path.read_bytes())["stages"]
        record = stages.get(stage)
    except FileNotFoundError:
        raise UserError(f"{folder} is no run folder: there is no {MANIFEST} in it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: damaged: expected a manifest in JSON, got {reason_of(error)}") from None
    if record is None:
        raise UserError(_why_not(folder, stage, list(stages)))
    return record


def _why_not(folder: Path, stage: str, finished: list[str]) -> str:
    """Say why a run has no finished stage of this name."""
    if not (folder / stage / LOCK).is_file():
        return f"{folder}: {unknown('finished stage', stage, finished)}"
    if locks.is_held(folder / stage / LOCK):
        return f"{folder}: stage {stage!r} is being run right now; wait for it"
    return f"{folder}: stage {stage!r} is not finished; run it there first"


def _understood(record: dict[str, Any], folder: Path, is_base: Callable[[str], bool]) -> dict[str, Any]:
    """Return a record's type, LoRA options and place of weights.

    Raises:
        UserError: if it is no record of a model.
    """
    try:
        kind = record["type"]
        makes = STAGE_TYPES[kind].makes
        output = record["output"]
        full = output["full"]
        lora = _lora(record["config"]) if output["kind"] == "adapter" else None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / MANIFEST}: damaged: a record lacks {error}") from None
    if makes not in (*POLICIES, *REWARD_MODELS):
        raise UserError(f"{folder}: a stage of type {kind} puts out no model (it makes: {makes}); name another")
    weights = "full"
    if output["kind"] == "adapter":
        weights = "on base" if full is None or is_base(full) else "with base"
    return {"type": kind, "lora": lora, "weights": weights}


def _lora(config: dict[str, Any]) -> Options:
    """Return the LoRA options in a record's config, which has no nesting: `lora.r`, `lora.rank_pattern.LAYER`."""
    options: Options = {}
    for key, value in config.items():
        section, _, option = key.partition(".")
        if section != "lora" or not option:
            continue
        outer, _, inner = option.partition(".")
        if inner:
            options.setdefault(outer, {})[inner] = value
        else:
            options[outer] = value
    return options


def _is_base(config: RunConfig, full: Path) -> bool:
    """Tell whether full weights of the other run are this run's base model."""
    return config.model.path is not None and Path(config.resolve(config.model.path)) == full.resolve()
