"""Talk in a terminal: questions are typed, answers stand side by side where there is room. A pipe gets plain text."""

import contextlib
import dataclasses
import math
import sys
from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.segment import Segment
from rich.table import Table as Grid
from rich.text import Text

from pipeline.chat.session import Answer, Session, Settings
from pipeline.show.screen import say
from pipeline.system.errors import UserError
from pipeline.system.signals import Interrupted
from pipeline.system.streams import printable

PROMPT = "> "
LEAST = 36  # columns of an answer that stands beside others
GAP = 2
ECHO = 3  # columns that stay free at the right, where the terminal shows Ctrl-C: a new line would upset the display
HELP = """\
/stages A B      talk to these stages; a new one begins its dialogue here
/temperature X   0 takes the likeliest token, 1 samples as evaluations do
/reset           begin all dialogues anew
/quit            leave; Ctrl-D does so too
Ctrl-C           stop, and take the question back; at the prompt: leave"""


class _Left(Exception):
    """Report that the user wants to leave."""


def answer_lines(session: Session, settings: Settings, console: Console) -> None:
    """Answer each line of standard input, as the turns of one dialogue. Empty lines count for nothing."""
    _tolerate_bytes()
    for line in sys.stdin or ():  # it may be closed
        if not line.strip():
            continue

        def tell(name: str, answer: Answer, is_complete: bool) -> None:
            if is_complete:
                parts = [f"{name} ({answer.figures})", answer.text, ""]
                print(printable("\n".join(parts), console.encoding), flush=True)

        session.ask(line.rstrip("\n"), settings, tell)


def talk(session: Session, settings: Settings, console: Console) -> None:
    """Hold a dialogue until the user leaves it."""
    _tolerate_bytes()
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  - lets `input` edit the line, and keep those before it

    say(
        console,
        f"Answers have at most {settings.max_new_tokens} tokens (`--max-new-tokens`). /help shows the commands.",
        "dim",
    )
    while True:
        try:
            line = input(f"\n{PROMPT}").strip()
        except Interrupted:
            raise
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        try:
            if line.startswith("/"):
                settings = _command(line, session, settings, console)
            elif line:
                _ask(line, session, settings, console)
        except _Left:
            return
        except UserError as error:
            say(console, str(error), "red")
        except Interrupted:  # by another signal than that of Ctrl-C
            raise
        except KeyboardInterrupt:
            say(console, "Stopped: the question is taken back, and the dialogue is as it was before.", "yellow")


def _tolerate_bytes() -> None:
    """Read bytes that are no text as marks in their place."""
    with contextlib.suppress(AttributeError):
        sys.stdin.reconfigure(errors="replace")  # pyright: ignore[reportAttributeAccessIssue]


def _command(line: str, session: Session, settings: Settings, console: Console) -> Settings:
    """Do what a line that begins with a slash says; return the settings from then on.

    Raises:
        UserError: if there is no such command, or it cannot be done.
        _Left: if the user wants to leave.
    """
    name, *words = line.split()
    if name == "/quit" and not words:
        raise _Left
    if name == "/help" and not words:
        say(console, HELP)
    elif name == "/reset" and not words:
        session.reset()
        say(console, "All dialogues begin anew.", "dim")
    elif name == "/stages":
        if words:
            session.choose([word.rstrip(",") for word in words])
        say(console, f"Answering: {', '.join(session.names)}.")
        others = [one for one in session.run.policies if one not in session.names]
        if others:
            say(console, f"Also there: {', '.join(others)}.")
        for note in session.notes():
            say(console, note, "dim")
    elif name == "/temperature":
        settings = dataclasses.replace(settings, temperature=_temperature(words))
        say(console, f"Temperature {settings.temperature:g}.", "dim")
    else:
        raise UserError(f"there is no command {line!r}; /help shows them")
    return settings


def _temperature(words: Sequence[str]) -> float:
    """Read a temperature.

    Raises:
        UserError: if it is none.
    """
    with contextlib.suppress(ValueError):
        (word,) = words
        value = float(word)
        if value >= 0 and math.isfinite(value):
            return value
    raise UserError(f"/temperature: expected one number, 0 or more, got {' '.join(words) or 'nothing'}")


def _ask(line: str, session: Session, settings: Settings, console: Console) -> None:
    """Show the answers as they come, and at the end as they are kept."""
    answers: dict[str, Answer] = {}
    complete: set[str] = set()
    is_stopped = True
    try:
        with Live(console=console, transient=True, refresh_per_second=10, vertical_overflow="crop") as live:

            def tell(name: str, answer: Answer, is_complete: bool) -> None:
                answers[name] = answer
                if is_complete:
                    complete.add(name)
                is_first = len(answer.ids) == 1
                live.update(_Tail(_laid_out(session.names, answers, complete, "...", console)), refresh=is_first)

            session.ask(line, settings, tell)
        is_stopped = False
    finally:
        if answers:
            console.print(_laid_out(session.names, answers, complete, "stopped" if is_stopped else "", console))


@dataclasses.dataclass
class _Tail:
    """Show the last lines of what is taller than the screen."""

    whole: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for line in console.render_lines(self.whole, options, pad=False)[-(console.height - 1) :]:
            yield from line
            yield Segment.line()


def _laid_out(
    names: Sequence[str], answers: dict[str, Answer], complete: set[str], state: str, console: Console
) -> RenderableType:
    """Put the answers side by side if every one has LEAST columns, else one below the other.

    `state` stands below an answer that is not complete.
    """
    parts = []
    for name in names:
        answer = answers.get(name, Answer("", []))
        figures = answer.figures if name in complete else state
        texts = [(name, "bold"), (answer.text.strip("\n"), ""), (figures, "dim")]
        parts.append([Text(printable(text, console.encoding), style, overflow="fold") for text, style in texts])
    room = (console.width - ECHO + GAP) // len(parts) - GAP
    if room < LEAST or len(parts) == 1:
        return Group(*(Group(name, text, figures, Text()) for name, text, figures in parts[:-1]), *parts[-1])
    grid = Grid.grid(padding=(0, GAP, 0, 0))
    for _ in parts:
        grid.add_column(width=room)
    for row in zip(*parts, strict=True):
        grid.add_row(*row)
    return grid
