"""What a report knows of a run, in plain values."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.type_row import Makes
from pipeline.records.last_run import LastRun
from pipeline.records.manifest import Manifest, Record
from pipeline.system.json_object import JsonObject

# `held`: the gate stopped it. `interrupted`: it was stopped, or nobody saw its end. `stale`: it has a record, and must
# run again. `waiting`: it waits for other stages. `not begun`: nothing is in its way.
State = Literal["finished", "running", "failed", "held", "interrupted", "stale", "waiting", "not begun"]
Entry = dict[str, Any]  # what a trainer logged at a step
Found = tuple[str, str]  # the stage to mend, and what a rule says of it


class Verdict(TypedDict):
    """A verdict of the gate on a stage, as `chain/gate.py` keeps it; `passed` is None where it was not measured."""

    stage: str
    what: str
    passed: bool | None
    seen: str
    mend: str


@dataclass(frozen=True)
class Samples:
    """The prompts of an evaluation with each policy's completion; `total` prompts are in the file."""

    prompts: list[JsonObject]
    total: int


@dataclass(frozen=True)
class Stage:
    """A stage of a run: how it stands, and all that is kept of it.

    `why`: words about its state, empty where there is nothing to say. `error`: the message with which it ended.
    `history`: what its trainer logged so far. `log`: the last lines of the log of a stage that did not finish. `plots`:
    PNG files by name.
    """

    name: str
    type: str
    parents: dict[str, str]
    state: State
    why: str = ""
    error: str = ""
    record: Record | None = None
    gate: list[Verdict] = field(default_factory=list)
    history: list[Entry] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    plots: dict[str, bytes] = field(default_factory=dict)
    samples: Samples | None = None

    @property
    def makes(self) -> Makes | None:
        """Return what it hands on; None: its type is not known."""
        return STAGE_TYPES[self.type].makes if self.type in STAGE_TYPES else None

    @property
    def metrics(self) -> JsonObject:
        """Return what was measured; empty where it did not finish."""
        return {} if self.record is None else self.record.metrics


@dataclass(frozen=True)
class Run:
    """A run folder. `stages` are in the order of the chain. `last` is what the last `rlhf run` set out to do."""

    path: Path
    name: str
    recorded: Manifest
    last: LastRun | None
    stages: dict[str, Stage]

    def finished(self, *makes: Makes) -> Iterator[Stage]:
        """Yield the stages with a record that hand on one of these."""
        return (stage for stage in self.stages.values() if stage.record is not None and stage.makes in makes)

    def fails_gate(self, stage: str, what: str) -> bool:
        """Tell whether the gate finds this figure of a stage wanting."""
        verdicts = [verdict for one in self.stages.values() for verdict in one.gate]
        return any((one["stage"], one["what"], one["passed"]) == (stage, what, False) for one in verdicts)
