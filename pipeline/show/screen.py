"""What is printed, on any screen: tables that become blocks where they do not fit, and text that can be printed.

A cell is text, or parts of text with a style each. Nothing is ever read as rich's markup: names and rows are a user's.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from pipeline.system import streams

WIDTH = 160  # of a pipe or a file, which have none
LEAST = 20  # columns; a terminal that says less does not know its width
MAX_HEIGHT = 6  # lines of a cell; a taller one is read more easily in a block
Part = tuple[str, str]  # text and its style
Cell = str | Sequence[Part]


@dataclass
class Table:
    """A title, the names of the columns, and rows of as many cells; with `right` numbers stand at the right."""

    title: str
    columns: Sequence[str]
    right: bool = False
    rows: list[Sequence[Cell]] = field(default_factory=list)

    def add(self, *cells: Cell) -> None:
        assert len(cells) == len(self.columns)
        self.rows.append(cells)


def open_console(width: int | None = None) -> Console:
    """Return the console of a command. Without a terminal it is WIDTH columns wide, whatever COLUMNS says.

    GNU readline exports COLUMNS, so that every program that a Python session starts has it.
    """
    console = Console(width=width, markup=False, emoji=False, highlight=False)
    columns = streams.columns_asked()
    if width is None and not console.file.isatty():
        console.width = WIDTH
    elif width is None and columns is not None:  # rich looks in the environment of its import
        console.width = columns
    if console.width < LEAST:
        console.width = LEAST  # rich prints nothing at a width of 0
    return console


def say(console: Console, text: Cell, style: str = "") -> None:
    """Print prose: wrapped at words on a screen, unwrapped in a pipe, where lines are searched. Commands stay whole."""
    whole = _text(text, console, style)
    width = _width(console) if console.is_terminal else None
    for line in whole.split("\n", allow_blank=True):
        _lay(line, "", "", None if streams.is_command(line.plain) else width, console)


def _width(console: Console) -> int:
    return max(console.width, LEAST)


def show(table: Table, console: Console) -> None:
    """Print a table if every word of it fits into the console's width, else a block of `name: value` for each row."""
    heads = [_text(name, console, "bold") for name in table.columns]
    rows = [[_text(cell, console) for cell in row] for row in table.rows]
    _lay(_text(table.title, console, "bold"), "", "", _width(console), console)
    widths = _widths([heads, *rows], _width(console))
    if widths is None:
        _blocks(heads, rows, console)
        console.print()
    else:
        _grid(heads, rows, widths, table.right, console)


def _text(cell: Cell, console: Console, style: str = "") -> Text:
    parts = [(cell, style)] if isinstance(cell, str) else cell
    return Text.assemble(*((streams.printable(text, console.encoding), style) for text, style in parts))


def _widths(rows: list[list[Text]], width: int) -> list[int] | None:
    """Return the width of each column without a word broken, or None where that is too much, or a cell too tall."""
    columns = list(zip(*rows, strict=True))
    least = [max(_longest(cell.plain.split()) for cell in column) for column in columns]
    most = [max(_longest(cell.plain.splitlines()) for cell in column) for column in columns]
    spare = width - (3 * len(columns) + 1) - sum(least)  # a line and two spaces for each, and the last line
    if spare < 0:
        return None
    widths = list(least)
    # Those that lack least are served first: a short column is not to be wrapped in favour of a long one.
    waiting = sorted(range(len(columns)), key=lambda i: most[i] - least[i])
    for served, i in enumerate(waiting):
        extra = min(most[i] - least[i], spare // (len(waiting) - served))
        widths[i] += extra
        spare -= extra
    for column, room in zip(columns, widths, strict=True):
        for cell in column[1:]:
            lines = cell.plain.splitlines()
            if sum(-(-cell_len(line) // max(room, 1)) for line in lines) > max(MAX_HEIGHT, len(lines)):
                return None
    return widths


def _longest(texts: list[str]) -> int:
    return max(map(cell_len, texts), default=0)


def _grid(heads: list[Text], rows: list[list[Text]], widths: list[int], right: bool, console: Console) -> None:
    grid = Grid(box=box.HEAVY_HEAD)
    for number, (head, width) in enumerate(zip(heads, widths, strict=True)):
        justify = "right" if right and number else "left"
        grid.add_column(head, width=width, justify=justify)
    for row in rows:
        grid.add_row(*row)
    console.print(grid)


def _blocks(heads: list[Text], rows: list[list[Text]], console: Console) -> None:
    """Print the first cell of a row as its heading, then a line for each other cell that is not empty."""
    width = _width(console)
    for heading, *cells in rows:
        heading.stylize("bold")
        _lay(heading, "- ", "  ", width, console)
        for head, cell in zip(heads[1:], cells, strict=True):
            if not cell.plain.strip():
                continue
            name = Text(f"{head.plain}:", "dim")
            first, *more = cell.split("\n")
            if more:  # several lines stand below the name
                _lay(name, "  ", "    ", width, console)
                for line in (first, *more):
                    _lay(line, "    ", "      ", width, console)
            else:
                _lay(Text.assemble(name, " ", first), "  ", "    ", width, console)


def _lay(line: Text, first: str, then: str, width: int | None, console: Console) -> None:
    """Print a line between words; no word or path is ever cut, so that it can be copied.

    `first` stands before the first piece and `then` before the others. rich itself would cut what is too long.
    """
    breaks = []
    used = cell_len(first)
    for word in re.finditer(r"\S+\s*", line.plain):
        size = cell_len(word.group().rstrip())
        if width is not None and used + size > width and word.start() > 0:
            breaks.append(word.start())
            used = cell_len(then)
        used += cell_len(word.group())
    for number, piece in enumerate(line.divide(breaks)):
        if breaks:
            piece.rstrip()
        console.print(Text.assemble(then if number else first, piece), soft_wrap=True)
