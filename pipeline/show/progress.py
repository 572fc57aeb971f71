"""How far a run is, as lines of text: the chain with its states, the stage at work, and its figures as they move."""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from pipeline.config.logged_figures import LOSSES, Ours, in_our_words
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.records import states
from pipeline.records.progress import LOADING, TRAINING, Entry, Reader
from pipeline.records.stage_folder import PROGRESS
from pipeline.records.states import State
from pipeline.show.screen import say
from pipeline.show.tables import duration
from pipeline.system.streams import either

MAX_WIDTH = 80
MAX_CHAIN = 3  # lines; a longer chain is counted
BAR = (8, 40)  # columns of a bar, at least and at most
LOSS = LOSSES["loss"][0]
SUMMARY = "train_runtime"  # among the last figures of a training, which Trainer logs without a loss
ALARMS = ("watchdog: ", ": FAILED: ")  # in a message that must not be overlooked
STYLES: Mapping[State, str] = {
    "finished": "green",
    "at work": "bold cyan",
    "waiting": "dim",
    "failed": "bold red",
    "stopped": "yellow",
}
SIGNS = "✓●·✗■"
PLAIN_SIGNS = "+>.x!"


def names_of(stage_type: str) -> Mapping[str, Ours]:
    """Return which figures of a trainer's log are shown, and our names for them."""
    return STAGE_TYPES[stage_type].shown if stage_type in STAGE_TYPES else {}


@dataclass
class Place:
    """Gather where a stage is; `names` are those of `names_of` its type."""

    names: Mapping[str, Ours] = field(default_factory=dict)
    entry: Entry | None = None  # the latest that says where it is
    starts: dict[str, Entry] = field(default_factory=dict)  # the first of each phase
    _latest: dict[str, Entry] = field(default_factory=dict)  # of each phase
    first: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def take(self, entry: Entry) -> dict[str, float]:
        """Add an entry; returns the figures in it that are shown. Those at the end of a training get its last loss."""
        if entry.said is not None:
            self.said.append(entry.said)
        if entry.phase is not None:
            before = self._latest.get(entry.phase)
            again = entry.step is None and self.entry is not None and self.entry.phase != entry.phase
            if before is None or again or (entry.step or 0) < (before.step or 0):  # an evaluation may come again
                self.starts[entry.phase] = entry
            self._latest[entry.phase] = entry
            self.entry = entry
        figures = in_our_words(self.names, entry.logs)
        self.first = figures | in_our_words(self.names, entry.first) | self.first
        if figures.get("margin") == 0 and "accuracy" not in figures:
            self.last.pop("accuracy", None)  # it is no longer so
        self.last |= figures
        if figures and SUMMARY in entry.logs and LOSS in self.last:
            figures[LOSS] = self.last[LOSS]
            figures = {label: figures[label] for label, _ in self.names.values() if label in figures}
        return figures

    def seconds_left(self, now: float) -> float | None:
        """Return how long the phase will take, as long a step as so far; None: nothing is known yet."""
        entry = self.entry
        if entry is None or entry.phase is None or entry.step is None or entry.of is None:
            return None
        start = self.starts[entry.phase]
        steps = entry.step - (start.step or 0)
        if steps <= 0 or entry.of <= entry.step:
            return None
        left = (entry.of - entry.step) * (entry.time - start.time) / steps
        return max(left - max(now - entry.time, 0), 0)


def place_of(folder: Path, stage_type: str) -> Place:
    """Read where the stage of this folder is."""
    place = Place(names_of(stage_type))
    reader = Reader(folder / PROGRESS)
    for entry in reader.read():
        place.take(entry)
    reader.close()
    return place


def chain_lines(chain: Mapping[str, State], width: int, encoding: str) -> list[Text]:
    """Return the stages with a sign for the state of each; of a chain that is too long, how many are in each state."""
    signs = dict(zip(STYLES, either(SIGNS, PLAIN_SIGNS, encoding), strict=True))
    lines = _joined([Text(f"{signs[state]} {name}", STYLES[state]) for name, state in chain.items()], width)
    if len(lines) <= MAX_CHAIN:
        return lines
    parts: list[Text] = []
    for state, style in STYLES.items():
        names = [name for name, own in chain.items() if own == state]
        if names and state in ("finished", "waiting"):
            parts.append(Text(f"{signs[state]} {len(names)} {state}", style))
        else:
            parts += [Text(f"{signs[state]} {name}", style) for name in names]
    return _joined(parts, width)


def place_lines(name: str, place: Place, now: float, width: int, encoding: str) -> list[Text]:
    """Return a line with a bar, how far the stage is and the time left, and its figures, first and now."""
    head, count, left = _parts(name, place, now)
    tail = ", ".join(filter(None, (count, left)))
    spare = width - cell_len(head) - cell_len(tail) - 2
    line = Text(head, "bold cyan")
    entry = place.entry
    if entry is not None and entry.step is not None and entry.of and spare >= BAR[0]:
        line.append_text(Text(" ")).append_text(_bar(entry.step / entry.of, min(spare, BAR[1]), encoding))
        line.append(f" {tail}")
    elif tail:
        line.append(f" {tail}")
    line.truncate(width, overflow="ellipsis" if either("…", "", encoding) else "crop")
    arrow = either("→", "->", encoding)
    figures = []
    for label, value in place.last.items():
        before = place.first.get(label, value)
        moved = f"{figure(before)}{arrow}{figure(value)}"
        is_short = cell_len(f"{label} {moved}") <= width
        shown = moved if is_short and figure(before) != figure(value) else figure(value)
        figures.append(Text.assemble((f"{label} ", "dim"), shown))
    return [line, *_joined(figures, width)]


def plain_line(name: str, place: Place, figures: Mapping[str, float], now: float) -> str:
    """Return how far a stage is in one line: `sft: step 20/60, 12s left: loss 0.512`."""
    head, count, left = _parts(name, place, now)
    if figures and not count:  # of an evaluation after the training
        left = ""
    where = f"{head}{' ' if ':' in head else ': '}{', '.join(filter(None, (count, left)))}".rstrip(": ")
    values = ", ".join(f"{label} {figure(value)}" for label, value in figures.items())
    return f"{where}: {values}" if values else where


def _parts(name: str, place: Place, now: float) -> tuple[str, str, str]:
    """Return what a stage does, how much of it is done, and the time left, or so far if nothing can be counted."""
    entry = place.entry
    phase = LOADING if entry is None or entry.phase is None else entry.phase
    if entry is None or entry.step is None or entry.of is None:
        begun = place.starts.get(phase)
        return f"{name}: {phase}", "", "" if begun is None else f"for {duration(now - begun.time)}"
    seconds = place.seconds_left(now)
    left = "" if seconds is None else f"{duration(seconds)} left"
    if phase == TRAINING:
        return name, f"step {entry.step}/{entry.of}", left
    return f"{name}: {phase}", f"{entry.step}/{entry.of}", left


def figure(value: float) -> str:
    """Show a figure in three digits, or in one where it is almost 0."""
    if 0 < abs(value) < 1e-3:
        return f"{value:.0e}"
    if abs(value) >= 999.5:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def _bar(share: float, width: int, encoding: str) -> Text:
    done = round(min(max(share, 0), 1) * width)
    full, empty = either("━─", "#-", encoding)
    return Text.assemble((full * done, "cyan"), (empty * (width - done), "dim"))


def is_alarm(message: str) -> bool:
    """Tell whether a message of a stage must not be overlooked."""
    return any(word in message for word in ALARMS)


def _joined(parts: Iterable[Text], width: int) -> list[Text]:
    """Put parts into lines, with two spaces between; a part that is longer than a line is cut."""
    lines: list[Text] = []
    for part in parts:
        part.truncate(width)
        if lines and lines[-1].cell_len + 2 + part.cell_len <= width:
            lines[-1].append("  ").append_text(part)
        else:
            lines.append(Text("").append_text(part))
    return lines


def width_of(console: Console) -> int:
    """Return the columns that may be filled; with the last one filled, some terminals go on in the next line."""
    return min(console.width - 1, MAX_WIDTH)


def show_unfinished(run_dir: Path, finished: Mapping[str, str], console: Console) -> bool:
    """Show the chain of a run that is not finished, where the stages at work are, and their alarms.

    `finished`: the finished stages, each with the time of its start. Returns False if nothing is known of such a run.
    """
    chain = states.read(run_dir)
    if chain is None:
        return False
    now = states.now(chain, run_dir, finished)
    if all(state == "finished" for state in now.values()):
        return False
    width = width_of(console)
    at_work: dict[str, Place] = {}
    for name in [name for name, state in now.items() if state == "at work"]:
        # Before the stage has its lock the file is of an earlier attempt.
        has_begun = states.is_locked(run_dir / name)
        kind = chain.types[name]
        at_work[name] = place_of(run_dir / name, kind) if has_begun else Place(names_of(kind))
    console.print()
    for message in [message for place in at_work.values() for message in place.said if is_alarm(message)]:
        say(console, message, "bold yellow")
    if console.is_terminal:
        for line in chain_lines(now, width, console.encoding):
            console.print(line, soft_wrap=True)
    else:
        words = [(state, [name for name, own in now.items() if own == state]) for state in STYLES]
        say(console, "; ".join(f"{state}: {', '.join(names)}" for state, names in words if names))
    for name, place in at_work.items():
        if console.is_terminal:
            for line in place_lines(name, place, time.time(), width, console.encoding):
                console.print(line, soft_wrap=True)
        else:
            say(console, plain_line(name, place, place.last, time.time()))
    return True
