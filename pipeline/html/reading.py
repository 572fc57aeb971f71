"""Read a run folder, also one that is at work, failed, or was made by an earlier version."""

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

from pipeline.html import states
from pipeline.html.values import Entry, Run, Samples, Stage, Verdict
from pipeline.records import last_run, manifest
from pipeline.records.last_run import Attempt, LastRun, Planned
from pipeline.records.manifest import Manifest, Record
from pipeline.records.stage_folder import CHECKPOINTS, GATE, HISTORY, LOCK, LOG
from pipeline.records.states import is_locked
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

NUM_LINES = 20  # of a log
MOST_BYTES = 3_000_000  # of all completions on a page
_LOG_BYTES = 20_000  # of a log's end that are looked at


def read(run_dir: Path, most_bytes: int = MOST_BYTES) -> Run:
    """Read a run folder; of its completions the first ones, up to `most_bytes`.

    Raises:
        UserError: if it is no run folder, or its manifest is damaged.
    """
    recorded = manifest.read(run_dir)
    last = last_run.read(run_dir)
    if recorded is None and last is None:
        expected = "expected a run folder, as `rlhf run` prints it at its end"
        raise UserError(f"{run_dir}: no {manifest.FILE} here; {expected}")
    path = run_dir.resolve()
    recorded = recorded or Manifest(name=path.name)
    stages: dict[str, Stage] = {}
    try:
        for name in _names(path, recorded, last):
            stages[name] = _stage(path, name, recorded.stages.get(name), last, stages)
    except OSError as error:
        raise UserError(f"{run_dir}: cannot be read: {error.strerror or error}") from None
    return Run(path, recorded.name, recorded, last, _with_samples(path, stages, most_bytes))


def _names(path: Path, recorded: Manifest, last: LastRun | None) -> list[str]:
    """Return the stages in the order of the config, then finished ones, then folders of stages that did not finish."""
    begun = sorted(lock.parent.name for lock in path.glob(f"*/{LOCK}"))
    planned = [] if last is None else list(last.stages)
    return list(dict.fromkeys([*planned, *recorded.stages, *begun]))


def _stage(path: Path, name: str, record: Record | None, last: LastRun | None, before: dict[str, Stage]) -> Stage:
    """Read what is kept of a stage; `before` are the stages that come before it."""
    folder = path / name
    planned = None if last is None else last.stages.get(name)
    attempt = None if last is None else last.attempts.get(name)
    has_begun = (folder / LOG).exists() or (folder / LOCK).exists()
    gate: JsonObject = _json(folder / GATE, {})
    parents: dict[str, str] = {} if planned is None else planned.parents
    if attempt is not None and any(_is_younger(before.get(one), attempt) for one in parents.values()):
        attempt = None  # it was about other parents: it says nothing of the next start
        has_begun = False
        gate = {}
    standing = states.Standing(
        record=record,
        planned=planned,
        started=None if last is None else last.started,
        attempt=attempt,
        is_locked=is_locked(folder),
        has_begun=has_begun,
        is_held=gate.get("stops") is True,
        waits_for=[one for one in parents.values() if one in before and before[one].state != "finished"],
    )
    state, why, error = states.judge(standing)
    if record is not None and (planned is None or state == "stale"):
        parents = record.parents  # those that it was made from
    return Stage(
        name=name,
        type=_type(record, planned),
        parents=parents,
        state=state,
        why=why,
        error=error,
        record=record,
        gate=_verdicts(gate),
        history=_history(folder, is_finished=record is not None),
        log=_last_lines(folder / LOG) if state in ("failed", "interrupted") else [],
        plots=_plots(path / record.output.path) if record is not None else {},
    )


def _type(record: Record | None, planned: Planned | None) -> str:
    """Return the type of a stage; empty where nobody has written it down."""
    if record is not None:
        return record.type
    return "" if planned is None else planned.type


def _is_younger(parent: Stage | None, attempt: Attempt) -> bool:
    """Tell whether a parent was made again after a start of its child had ended."""
    return parent is not None and parent.record is not None and parent.record.started > attempt.at


def _json(path: Path, empty: Any) -> Any:
    """Read a file of JSON; `empty` where there is none, or it is damaged or of another kind."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return empty
    return value if isinstance(value, type(empty)) else empty


def _verdicts(kept: JsonObject) -> list[Verdict]:
    """Return the verdicts of the gate, as far as they are what the gate writes."""
    values = kept.get("verdicts")
    if not isinstance(values, list):
        return []
    return [
        cast(Verdict, one) for one in values if isinstance(one, dict) and one.keys() == Verdict.__annotations__.keys()
    ]


def _history(folder: Path, is_finished: bool) -> list[Entry]:
    """Return what the trainer logged: of a finished stage, or up to its newest checkpoint that can be read.

    A stage that runs again has beside its checkpoints the log of its last time, which tells nothing of this one.
    """
    checkpoints = (folder / CHECKPOINTS).glob("checkpoint-*/trainer_state.json")
    for path in sorted(checkpoints, key=_time, reverse=True):
        history = _json(path, {}).get("log_history")
        if isinstance(history, list):
            return [entry for entry in history if isinstance(entry, dict)]
    if not is_finished:
        return []
    return [entry for entry in _json(folder / HISTORY, []) if isinstance(entry, dict)]


def _time(path: Path) -> float:
    """Return when a file was written; 0 if it has been removed meanwhile."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _last_lines(log: Path) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _LOG_BYTES))
            return file.read().decode(errors="replace").splitlines()[-NUM_LINES:]
    except OSError:
        return []


def _plots(output: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted(output.glob("*.png"))}


def _with_samples(path: Path, stages: dict[str, Stage], most_bytes: int) -> dict[str, Stage]:
    """Add the completions of the evaluations, each with an equal share of the bytes."""
    evaluations = [name for name, stage in stages.items() if stage.makes == "evaluation" and stage.record is not None]
    complete = dict(stages)
    for name in evaluations:
        record = stages[name].record
        assert record is not None, "an evaluation without a record was left out above"
        file = path / record.output.path / "samples.jsonl"
        samples = _samples(file, list(record.metrics["policies"]), most_bytes // len(evaluations))
        complete[name] = dataclasses.replace(stages[name], samples=samples)
    return complete


def _samples(file: Path, policies: list[str], most_bytes: int) -> Samples | None:
    """Read the first prompts of an evaluation; a line that does not fit any more, or is damaged, is left out."""
    prompts: list[JsonObject] = []
    total = 0
    room = most_bytes
    try:
        with file.open("rb") as lines:
            for line in lines:
                total += 1
                if len(line) > room:
                    continue
                row = _row(line, policies)
                if row is not None:
                    prompts.append(row)
                    room -= len(line)
    except OSError:
        return None
    return Samples(prompts, total)


def _row(line: bytes, policies: list[str]) -> JsonObject | None:
    """Read the line of a prompt, if it has its messages and a completion of every policy."""
    try:
        row = json.loads(line)
        row["prompt"] = [{"role": str(one["role"]), "content": str(one["content"])} for one in row["prompt"]]
        is_whole = all(isinstance(row[policy]["completion"], str) for policy in policies)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return row if is_whole else None
