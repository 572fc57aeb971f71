"""The screen of `rlhf run`: on a terminal a few lines that are drawn anew, elsewhere a line for each log of a trainer.

A stage's messages are printed on both; of one that is no news after another stage has said it, the first. What a
stage's process prints is in its log.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from rich.console import Console, Group
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType
from rich.text import Text

from pipeline.launch.log import Watch
from pipeline.records import states
from pipeline.records.progress import Reader
from pipeline.records.states import Chain, State
from pipeline.show.progress import Place, chain_lines, is_alarm, names_of, place_lines, plain_line, width_of
from pipeline.show.screen import say
from pipeline.system.errors import StageFailed

QUIET_SECONDS = 60.0  # without a terminal: after these a line says how far a stage is that has logged nothing


def can_redraw(console: Console) -> bool:
    """Tell whether lines on the screen can be replaced: on a terminal that knows more than to print."""
    return console.is_interactive and not console.is_dumb_terminal and console.file.isatty()


class Screen:
    """Show the chain, and its stage at work while `at_work` lasts, and keep the states in the run folder.

    `shown`: the stages that the command is about.
    """

    def __init__(self, console: Console, chain: Chain, run_dir: Path, shown: list[str]):
        self._console = console
        self._chain = chain
        self._run_dir = run_dir
        self._shown = shown
        self._is_written = False  # what an earlier run has left does not count
        self._name = ""
        self._said: dict[str, str] = {}  # what need not be said again -> the stage that said it first
        self._place = Place()
        self._reader: Reader | None = None
        self._drawn: list[Text] = []
        self._width = console.width
        self._last_line = time.time()
        self._live: Live | None = None
        if can_redraw(console):
            self._live = Live(
                console=console,
                get_renderable=self._renderable,
                auto_refresh=False,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> "Screen":
        if self._live is not None:
            self._live.start()
            self._console.show_cursor(True)  # a launcher that is killed cannot show it again
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):  # the terminal may be gone
                self._live.stop()
                if isinstance(error, StageFailed):  # beside its message, where the run is
                    self._console.print(Group(*self._lines()))

    @contextlib.contextmanager
    def at_work(self, name: str) -> Iterator[Watch]:
        """Show a stage while the block runs it, and say how it ended; yields what `run_stage` takes to be watched."""
        self._name = name
        self._place = Place(names_of(self._chain.types[name]))
        self._last_line = time.time()
        self._set("at work")
        self._draw()
        try:
            yield self._follow
        except BaseException as error:
            self._set("stopped" if isinstance(error, KeyboardInterrupt) else "failed")
            raise
        finally:
            if self._reader is not None:
                self._reader.close()
                self._reader = None
        self._set("finished")
        self._draw()

    def _set(self, state: State) -> None:
        """Change the state of the stage at work, and leave those that another `rlhf run` has changed meanwhile."""
        stored = states.read(self._run_dir) if self._is_written else None
        if stored is not None and stored.types == self._chain.types:
            self._chain.states = stored.states
        self._chain.states[self._name] = state
        self._chain.write(self._run_dir)
        self._is_written = True

    def _follow(self, file: Path, token: str) -> Callable[[], None]:
        self._reader = Reader(file, token)
        return functools.partial(self._look, self._reader)

    def _look(self, reader: Reader) -> None:
        """Show what is new."""
        entries = reader.read()
        with self._console:  # written at once
            for entry in entries:
                figures = self._place.take(entry)
                if entry.said is not None:
                    self._say(entry.said, entry.once)
                elif self._live is None and figures:
                    self._print(figures)
            if self._live is None and time.time() - self._last_line >= QUIET_SECONDS:
                self._print({})
            self._draw()

    def _say(self, message: str, once: bool) -> None:
        """Print a message of the stage at work; with `once` only if no other stage has said the same."""
        first = self._said.setdefault(message.removeprefix(f"{self._name}: "), self._name) if once else self._name
        if first == self._name:
            say(self._console, message, "bold yellow" if is_alarm(message) else "")

    def _print(self, figures: dict[str, float]) -> None:
        """Print how far the stage is, with the figures of a log."""
        self._last_line = time.time()
        say(self._console, plain_line(self._name, self._place, figures, self._last_line))

    def _draw(self) -> None:
        """Draw the lines anew if they have changed."""
        if self._live is None:
            return
        before = self._drawn
        self._drawn = self._lines()
        if self._drawn == before and self._console.width == self._width:
            return
        if self._console.width < self._width:
            self._erase_wrapped(before)
        self._width = self._console.width
        self._live.refresh()

    def _erase_wrapped(self, lines: list[Text]) -> None:
        """Erase what a terminal that became narrow has made of our lines: of some of them two or more."""
        rows = sum(-(-max(line.cell_len, 1) // self._console.width) for line in lines)
        up = [(ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2)] * (rows - len(lines))
        self._console.control(Control((ControlType.ERASE_IN_LINE, 2), *up))

    def _lines(self) -> list[Text]:
        width = width_of(self._console)
        chain: dict[str, State] = {name: self._chain.states[name] for name in self._shown}
        lines = [Text(), *chain_lines(chain, width, self._console.encoding)]
        if self._reader is not None:
            lines += place_lines(self._name, self._place, time.time(), width, self._console.encoding)
        return lines

    def _renderable(self) -> Group:
        for line in self._drawn:
            line.no_wrap = True
        return Group(*self._drawn)
