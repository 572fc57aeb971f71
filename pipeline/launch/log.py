"""Keep what a stage's process prints in the stage's log, and let somebody watch meanwhile."""

import collections
import os
import select
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import IO, TypeAlias

from rich.console import Console

NUM_KEPT_LINES = 1000
SECONDS = 0.5  # between two looks at a stage


# Takes the progress file of a stage that is about to start, and the token of its launch; returns what shows its news.
Watch: TypeAlias = Callable[[Path, str], Callable[[], None]]


def nobody(file: Path, token: str) -> Callable[[], None]:
    """Watch nothing."""
    return lambda: None


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


def relay(stream: IO[bytes], log: StageLog, look: Callable[[], None]) -> None:
    """Log the finished lines of a stage's output until it ends, and `look` meanwhile; of a bar that is the last state.

    What a stage prints is not shown: it leaves its messages in its progress file.
    """
    pending = b""
    looked = -SECONDS
    while True:
        is_ready, _, _ = select.select([stream], [], [], SECONDS)
        if time.monotonic() - looked >= SECONDS:
            look()
            looked = time.monotonic()
        if not is_ready:
            continue
        chunk = os.read(stream.fileno(), 65536)
        if not chunk:
            break
        *lines, pending = (pending + chunk).split(b"\n")
        finished = "".join(line.decode(errors="replace").rstrip("\r").split("\r")[-1] + "\n" for line in lines)
        log.write(finished)
    if pending:
        log.write(pending.decode(errors="replace").split("\r")[-1] + "\n")
    look()


def say_last(console: Console, text: str) -> None:
    """Print, where there may be no terminal any more, or nobody who reads."""
    try:
        console.print(text, soft_wrap=True)
    except (OSError, SystemExit):  # rich ends the process when a pipe is closed
        with Path(os.devnull).open("w") as nowhere:  # or python would fail when it writes the rest at its end
            os.dup2(nowhere.fileno(), console.file.fileno())
