"""Write tensorboard's event files straight into the stage's folder, so that it calls the stage RUN/STAGE."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import matplotlib.image
from torch.utils.tensorboard.writer import SummaryWriter

from pipeline.tracking.tracker import Cell, Tracked

PATTERN = "events.out.tfevents.*"


class EventFiles:
    """A stage at tensorboard, which calls a curve by its folder.

    What an earlier curve of the stage has left is removed: its points would be those of one curve with ours. Where the
    stage goes on after a step, tensorboard passes over what was logged later (`purge_step`). Logs are flushed at once.
    """

    def __init__(self, tracked: Tracked):
        self.last_step = -1
        self._tracked = tracked
        self._writer: SummaryWriter | None = None
        files = list(tracked.folder.glob(PATTERN))
        self._goes_on = bool(files) and not tracked.is_new
        if tracked.is_new:
            for file in files:
                file.unlink()

    def begin(self, step: int) -> None:
        if self._goes_on and step > 0:
            self.last_step = step

    def _open(self) -> SummaryWriter:
        """Return the writer. It is made at the first log, when it is known where the training goes on."""
        if self._writer is None:
            purge_step = self.last_step + 1 if self._goes_on else None
            if self._goes_on:
                _wait_for_a_later_name(self._tracked.folder)
            self._writer = SummaryWriter(str(self._tracked.folder), purge_step=purge_step)
            if self.last_step < 0:
                config = [(key, str(value)) for key, value in self._tracked.config.items()]
                self._writer.add_text("config", markdown(("key", "value"), config), 0)
        return self._writer

    def log(self, figures: Mapping[str, float], step: int) -> None:
        writer = self._open()
        for name, value in figures.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        self._open().add_text(name, markdown(columns, rows), step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._open().add_image(name, matplotlib.image.imread(path), step, dataformats="HWC")

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        self.log(figures, step)

    def close(self, is_finished: bool) -> None:
        if self._writer is not None:
            self._writer.close()


def _wait_for_a_later_name(folder: Path) -> None:
    """Let the second pass in which the newest file was begun.

    Tensorboard reads files in the order of their names, which begin with that second. After it comes the process's
    number, which would put the file of a stage that goes on at once before the file that it goes on from.
    """
    newest = max(int(file.name.split(".")[3]) for file in folder.glob(PATTERN))
    time.sleep(min(max(newest + 1 - time.time(), 0), 1))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[Cell]]) -> str:
    """Return a table as markdown; nothing in a cell ends it or begins a new line."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())
