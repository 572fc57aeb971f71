"""Keep what the last `rlhf run` set out to do, and how its stages ended.

The manifest knows finished stages only. What failed, was stopped, or waits is told from this file. No decision
depends on it: whoever deletes it loses words of the report.
"""

import contextlib
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from pipeline.config.values import Name
from pipeline.system.errors import StageFailed

FILE = "last_run.json"
_REFUSED = 2  # the exit code of what a user can mend


def _printable(value: object) -> object:
    """Escape what is no Unicode, as in the name of a file in another encoding; other values are left to be refused."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


Words = Annotated[str, BeforeValidator(_printable)]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)


class Planned(_Frozen):
    """Say of a stage of the config what it waits for, and why it was to run; `reason` is None where it was current."""

    type: str
    parents: dict[str, str]
    reason: Words | None = None


class Attempt(_Frozen):
    """Say how a stage ended that was started; `started` stays where nobody saw the end.

    `refused`: the stage found something that the user can mend, the gate's verdicts among them.
    """

    state: Literal["started", "finished", "failed", "refused", "stopped"]
    at: str
    message: Words = ""


class LastRun(_Frozen):
    """Hold a command, the folder it was given in, the text of its config, all stages of the config, and attempts.

    `attempts` are of this command and of earlier ones: the last one of each stage.
    """

    started: str
    command: list[Words]
    folder: Words
    config: Words
    stages: dict[Name, Planned]
    attempts: dict[Name, Attempt] = {}


def now() -> str:
    """Return the time as records hold it: UTC, in seconds."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def read(run_dir: Path) -> LastRun | None:
    """Read the file; None if there is none, or it is damaged."""
    try:
        return LastRun.model_validate_json((run_dir / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


@contextlib.contextmanager
def attempt(run_dir: Path, planned: LastRun, stage: str) -> Iterator[None]:
    """Keep that a stage is started in the block, and how it ends."""
    _keep(run_dir, planned, stage, Attempt(state="started", at=now()))
    try:
        yield
    except StageFailed as error:
        state = "refused" if error.exit_code == _REFUSED else "failed"
        _keep(run_dir, planned, stage, Attempt(state=state, at=now(), message=str(error)))
        raise
    except BaseException:
        _keep(run_dir, planned, stage, Attempt(state="stopped", at=now()))
        raise
    _keep(run_dir, planned, stage, Attempt(state="finished", at=now()))


def settle(run_dir: Path, planned: LastRun) -> bool:
    """Forget of stages that are current all the same how they ended and why they were to run; tell if there were any.

    A stage that was stopped or refused before it began anew has kept its record. Undo the change, and it is current.
    """
    before = read(run_dir)
    if before is None:
        return False
    attempts = _standing(before.attempts, planned)
    if attempts == before.attempts and not any(_is_taken_back(name, before, planned) for name in planned.stages):
        return False
    _write(run_dir, planned.model_copy(update={"attempts": attempts}))
    return True


def _is_taken_back(name: str, before: LastRun, planned: LastRun) -> bool:
    """Tell whether a stage is current that the last command was to run, and did not finish."""
    if planned.stages[name].reason is not None or name not in before.stages or before.stages[name].reason is None:
        return False
    last = before.attempts.get(name)
    return last is None or last.state != "finished" or last.at < before.started


def _standing(attempts: dict[str, Attempt], planned: LastRun) -> dict[str, Attempt]:
    """Leave out how stages ended that are current: what went wrong there is over."""
    current = {name for name, stage in planned.stages.items() if stage.reason is None}
    return {name: one for name, one in attempts.items() if name not in current or one.state == "finished"}


def _keep(run_dir: Path, planned: LastRun, stage: str, last: Attempt) -> None:
    before = read(run_dir)
    attempts = {} if before is None else _standing(before.attempts, planned)
    _write(run_dir, planned.model_copy(update={"attempts": attempts | {stage: last}}))


def _write(run_dir: Path, value: LastRun) -> None:
    """Replace the file in one step; a disk that refuses it does not end the run."""
    temporary = run_dir / f"{FILE}.tmp"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        # In ASCII: a path or message may hold what is no UTF-8.
        temporary.write_text(json.dumps(value.model_dump(), indent=1) + "\n", encoding="ascii")
        temporary.replace(run_dir / FILE)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
