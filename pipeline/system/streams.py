"""Let the standard streams take any text; a stream that cannot be written ends the command in one message.

Nothing here imports rich, so that `--help` answers at once.
"""

import contextlib
import errno
import io
import os
import re
import shutil
import sys
import textwrap
from typing import TextIO

# Numbers of the errors that the writing of a stream can end with.
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EPIPE, errno.EBADF)
MIN_WIDTH = 20  # columns; narrower terminals wrap what we print themselves
# Characters that move the cursor, change colours, reverse the order of what follows or end a line.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def prepare() -> None:
    """Make stdout and stderr take any text, and open the null device in the place of a stream that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # else the next file that is opened would get this number, and whatever is printed
            os.open(os.devnull, os.O_RDWR)
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def printable(text: str, encoding: str) -> str:
    r"""Escape everything in a text that the encoding lacks or that would control the terminal.

    >>> printable("caf\xe9 \u2192 \x1b[31m", "latin-1")
    'caf\xe9 \\u2192 \\x1b[31m'
    """
    return _CONTROL.sub(_escaped, text).encode(encoding, "backslashreplace").decode(encoding)


def _escaped(match: re.Match[str]) -> str:
    character = match.group()
    if "\udc80" <= character <= "\udcff":  # a byte of a file's name that the locale cannot read
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode()


def either(preferred: str, plain: str, encoding: str) -> str:
    """Return `preferred`, or `plain` where the encoding lacks one of its characters."""
    return preferred if printable(preferred, encoding) == preferred else plain


def columns_asked() -> int | None:
    """Return the width that the variable COLUMNS asks for; None if it asks for none."""
    value = os.environ.get("COLUMNS", "")
    return int(value) if value.isdecimal() and int(value) > 0 else None


def error(message: str) -> None:
    """Print an error on stderr; on a terminal its lines are wrapped at words.

    COLUMNS counts on a terminal only: GNU readline exports it, so every program that a Python session starts has it.
    """
    stream = sys.stderr
    text = printable(f"error: {message}", stream.encoding or "utf-8")
    if stream.isatty():
        text = wrapped(text, columns_asked() or shutil.get_terminal_size().columns)
    with contextlib.suppress(OSError):  # there is nowhere left to say it
        print(text, file=stream, flush=True)


def wrapped(text: str, width: int) -> str:
    """Wrap the text's lines at spaces, with their indentation and two spaces more.

    Words and paths stay whole, and so do commands: half of one would be another command.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if is_command(line):
            lines.append(line)
            continue
        indentation = line[: len(line) - len(line.lstrip())]
        pieces = textwrap.wrap(
            line,
            width=max(width, MIN_WIDTH),
            break_long_words=False,
            break_on_hyphens=False,
            subsequent_indent=f"{indentation}  ",
        )
        lines += pieces or [""]
    return "\n".join(lines)


def is_command(line: str) -> bool:
    """Tell whether a line of a message is a command, to be copied."""
    return line.lstrip().startswith("rlhf ")


def refuses_stdout(error: OSError) -> bool:
    """Say whether an error is about stdout: it has no file's name, and stdout cannot be written now either."""
    if error.errno not in _WRITING or error.filename is not None:
        return False
    try:
        sys.stdout.write("\n")
        sys.stdout.flush()
    except OSError:
        return True
    return False


def give_up(stream: TextIO) -> None:
    """Point a stream at the null device; else Python would write to it again at its end, and complain."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
