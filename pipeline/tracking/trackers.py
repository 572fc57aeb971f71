"""Open the trackers of a stage, hand on what the stage logs, and close them."""

import contextlib
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.config.schema import RunConfig, TrainingStage
from pipeline.config.trackers import trackers_of
from pipeline.records.figures import Figures, figures_of
from pipeline.system.errors import reason_of
from pipeline.system.json_object import JsonObject
from pipeline.tracking.attempt import Attempt
from pipeline.tracking.tracker import Cell, Tracked, Tracker

NUM_ROWS = 2000  # of a table, so that logs stay small


class Trackers:
    """All trackers of a stage. There are none, and nothing happens, but in `following`."""

    def __init__(self) -> None:
        self._trackers: list[Tracker] = []
        self._attempt: Attempt | None = None
        self._step = 0
        self._seen: set[str] = set()  # the curves that have their point at this step

    def begin(self, step: int, history: Iterable[tuple[int, Mapping[str, object]]]) -> None:
        """Go on after a step. `history` is what was logged until then: a tracker gets what is not in its files."""
        for tracker in self._trackers:
            tracker.begin(step)
        for logged_at, values in history:
            self.log(values, logged_at)

    def log(self, values: Mapping[str, object], step: int) -> None:
        """Add the numbers among these to their curves; a curve has one point for a step, the first."""
        if step != self._step:
            self._step = step
            self._seen = set()
        figures = {name: value for name, value in figures_of(values).items() if name not in self._seen}
        self._seen |= figures.keys()
        for tracker in self._trackers:
            if figures and step > tracker.last_step:
                tracker.log(figures, step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> None:
        """Keep the first rows of a table."""
        for tracker in self._trackers:
            tracker.table(name, columns, rows[:NUM_ROWS], self._step)

    def image(self, name: str, path: Path) -> None:
        """Keep a picture (PNG)."""
        for tracker in self._trackers:
            tracker.image(name, path, self._step)

    def summarise(self, figures: Figures) -> None:
        """Keep what the finished stage has on record."""
        named = {f"final/{name}": value for name, value in figures.items()}
        for tracker in self._trackers:
            tracker.summarise(named, self._step)

    def finish(self) -> None:
        """Say that the curves are whole. Call it before the stage is on record, or it would seem to go on."""
        if self._attempt is not None:
            self._attempt.finish()

    @contextlib.contextmanager
    def following(self, config: RunConfig, stage: str, identity: str, values: JsonObject) -> Iterator[None]:
        """Report to the trackers of a stage until the context ends; an exception closes them as failed.

        `identity` is the digest of what the stage's result depends on, `values` are its config, flat.

        Raises:
            UserError: if a tracker cannot start.
        """
        names = trackers_of(config, stage)
        if not names:
            yield
            return
        folder = config.run_path / stage
        section = config.stages[stage]
        attempt = Attempt(folder, identity, resumes=isinstance(section, TrainingStage))
        self._attempt = attempt
        with contextlib.ExitStack() as stack:
            for name in names:
                tracked = Tracked(config.name, stage, section.type, folder, attempt.id, attempt.is_new, values)
                tracker = _open(name, tracked)
                stack.push(functools.partial(_close, tracker))
                self._trackers.append(tracker)
            yield
        self._trackers.clear()
        self._attempt = None


def _close(tracker: Tracker, kind: type[BaseException] | None, *_: object) -> None:
    """Close a tracker when its stage ends; `kind` is the exception that ends it."""
    try:
        tracker.close(is_finished=kind is None)
    except Exception as error:
        if kind is None:  # else the stage's own exception is the one to tell
            print(f"a tracker could not be closed: {reason_of(error)}", flush=True)


def _open(name: str, tracked: Tracked) -> Tracker:
    """Make a tracker; its package is imported here, by those who ask for it."""
    if name == "tensorboard":
        from pipeline.tracking.event_files import EventFiles

        return EventFiles(tracked)
    if name == "wandb":
        from pipeline.tracking.wandb_run import WandbRun

        return WandbRun(tracked)
    from pipeline.tracking.trackio_run import TrackioRun

    return TrackioRun(tracked)
