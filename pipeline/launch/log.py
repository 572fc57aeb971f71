"""Show what a stage's process prints, and keep it in the stage's log."""

import collections
import os
from pathlib import Path
from types import TracebackType
from typing import IO

from rich.console import Console

NUM_KEPT_LINES = 1000


class StageLog:
    """Write a stage's log file, and keep its last lines in memory.

    A disk that is full does not end the stage: the stage itself will say so.
    """

    def __init__(self, path: Path, console: Console):
        self.path = path
        self.lines: collections.deque[str] = collections.deque(maxlen=NUM_KEPT_LINES)
        self._console = console
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> "StageLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, text: str) -> None:
        """Add whole lines."""
        self.lines.extend(text.splitlines())
        if self._file.closed:
            return
        try:
            self._file.write(text.encode(errors="backslashreplace"))
        except OSError as error:
            self._file.close()
            say_last(self._console, f"{self.path}: cannot be written any more ({error.strerror}); the stage goes on")


def relay(stream: IO[bytes], log: StageLog, console: Console) -> None:
    """Show a stage's output as it comes, progress bars redrawn in place on a terminal; log its finished lines."""
    pending = b""
    while chunk := os.read(stream.fileno(), 65536):
        *lines, pending = (pending + chunk).split(b"\n")
        finished = "".join(line.decode(errors="replace").rstrip("\r").split("\r")[-1] + "\n" for line in lines)
        log.write(finished)
        console.file.write(chunk.decode(errors="replace") if console.is_terminal else finished)
        console.file.flush()
    if pending:
        log.write(pending.decode(errors="replace").split("\r")[-1] + "\n")


def say_last(console: Console, text: str) -> None:
    """Print, where there may be no terminal any more, or nobody who reads."""
    try:
        console.print(text, soft_wrap=True)
    except (OSError, SystemExit):  # rich ends the process when a pipe is closed
        with Path(os.devnull).open("w") as nowhere:  # or python would fail when it writes the rest at its end
            os.dup2(nowhere.fileno(), console.file.fileno())
