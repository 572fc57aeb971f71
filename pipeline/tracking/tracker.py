"""Say what every tracker can do, and what it is told of the stage that it follows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

Cell = str | float | None  # of a table
PROJECT = "rlhf-pipeline"  # all runs, where the tracker has projects


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told of a stage; its files lie in `folder`, the stage's.

    `id` is the tracker's name for the curve, the same when the stage resumes. `is_new` says that the curve begins: what
    an earlier try has logged belongs to another one. `config` is flat: {"training.learning_rate": 1e-4, ...}.
    """

    run: str
    stage: str
    stage_type: str
    folder: Path
    id: str
    is_new: bool
    config: Mapping[str, object]

    @property
    def name(self) -> str:
        return f"{self.run}/{self.stage}"


class Tracker(Protocol):
    """Keep the curves, tables and pictures of one stage. Steps are the training's; where nothing trains, 0.

    `last_step` is the last step that processes before this one have left in the tracker's files; -1: none. A process
    that was killed may have logged more.
    """

    last_step: int

    def begin(self, step: int) -> None:
        """Hear, before anything is logged, that the training goes on after this step; it may be before `last_step`."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Add points to curves, for steps after `last_step` that never go back."""

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        """Keep a table."""

    def image(self, name: str, path: Path, step: int) -> None:
        """Keep a copy of a picture (PNG)."""

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        """Keep what the finished stage has on record; `step` is its last one."""

    def close(self, is_finished: bool) -> None:
        """Write all that is left. A stage that is not finished counts as failed, where the tracker can say so."""
