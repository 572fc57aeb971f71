"""How a stage stands: finished, running, failed, held by the gate, interrupted, stale, waiting or not begun."""

import datetime
from dataclasses import dataclass

from pipeline.html.values import State
from pipeline.records.last_run import Attempt, Planned
from pipeline.records.manifest import Record


@dataclass(frozen=True)
class Standing:
    """What a stage's state is told from.

    `planned` and `started` are what the last `rlhf run` set out to do, and when; `attempt` how the stage's last start
    ended. `is_held`: the gate stopped that start. `waits_for`: the parents that are not finished.
    """

    record: Record | None
    planned: Planned | None
    started: str | None
    attempt: Attempt | None
    is_locked: bool
    has_begun: bool
    is_held: bool
    waits_for: list[str]


def judge(standing: Standing) -> tuple[State, str, str]:
    """Return the state, words about it, and the message with which the stage ended."""
    attempt = standing.attempt
    has_ended = standing.record is not None and attempt is not None and attempt.state == "finished"
    if standing.is_locked and not has_ended:  # an export holds the lock of a finished stage
        return "running", "a process works on it", ""
    has_failed = attempt is not None and attempt.state in ("failed", "refused")
    if has_failed and attempt is not None and not _is_later(standing.record, attempt.at):
        if standing.is_held and attempt.state == "refused":
            return "held", "the gate did not let it start", attempt.message
        # Of a crash the message goes on with the last lines of the log, which are shown anyway.
        return "failed", _first_words(attempt.message), attempt.message if attempt.state == "refused" else ""
    reason = _must_run_again(standing)
    if standing.record is not None:
        return ("finished", "", "") if reason is None else ("stale", reason, "")
    if standing.is_held and attempt is None:  # it was started by hand
        return "held", "the gate did not let it start", ""
    if standing.has_begun and _was_cut_off(standing):
        return "interrupted", "the same command goes on from its last checkpoint, if there is one", ""
    if standing.waits_for:
        return "waiting", f"for {', '.join(dict.fromkeys(standing.waits_for))}", ""
    return "not begun", "", ""


def _first_words(message: str) -> str:
    """Return what a message begins with, up to the lines of the log."""
    return message.partition("\n")[0].partition(". The last lines of ")[0]


def _is_later(record: Record | None, time: str) -> bool:
    """Tell whether a stage was finished by a start after `time`."""
    return record is not None and record.started > time


def _must_run_again(standing: Standing) -> str | None:
    """Say why a finished stage is to run again, as the last `rlhf run` found; None: it is not.

    A record that is younger than that command is of the new run.
    """
    if standing.record is None or standing.planned is None or standing.started is None:
        return None
    begun = datetime.datetime.fromisoformat(standing.record.started)
    ended = begun + datetime.timedelta(seconds=standing.record.duration + 1)  # times are in whole seconds
    is_of_this_run = ended >= datetime.datetime.fromisoformat(standing.started)
    return None if is_of_this_run else standing.planned.reason


def _was_cut_off(standing: Standing) -> bool:
    """Tell whether its last start did not come to an end. A stage that did, and has no record, is to run again."""
    return standing.attempt is None or standing.attempt.state in ("started", "stopped")
