"""Tell the process of a stage what its launcher knows, and tell the launcher why the stage stopped.

The launcher sets environment variables. The stage answers by a file in a temporary folder: the run folder may lie on
the full disk that the answer is about, and what a killed launcher leaves there cannot be taken for another answer.
"""

import contextlib
import os
import time
from pathlib import Path

import psutil

LAUNCHER = "RLHF_LAUNCHER_PID"  # a stage watches this process and ends with it
REDO = "RLHF_REDO"  # set for a stage that is to begin anew, whatever checkpoints it has
REASON = "RLHF_REASON"  # why the stage runs, for its record
ERRORS = "RLHF_ERROR_FOLDER"  # the folder for the user's error that stops the stage
_SUFFIX = ".txt"


def report_error(message: str) -> None:
    """Leave a user's error to the launcher, if there is one. Any process of the stage may be the one that met it."""
    folder = os.environ.get(ERRORS)
    if folder is None:
        return
    partial = Path(folder) / f"{os.getpid()}.partial"
    with contextlib.suppress(OSError):  # the log has the message too
        partial.write_text(message, encoding="utf-8", errors="backslashreplace")
        partial.replace(partial.with_suffix(_SUFFIX))  # in one step: the other processes' launcher may kill this one


def error_in(folder: str | Path) -> str | None:
    """Return the first error that the processes of a stage have left in a folder, or None."""
    files = Path(folder).glob(f"*{_SUFFIX}")
    first = min(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    return None if first is None else first.read_text(encoding="utf-8")


def end_with_launcher() -> None:
    """End this process when the `rlhf run` that started it is gone, so that a killed run leaves nothing training."""
    number = os.environ.get(LAUNCHER)
    if number is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(int(number))
        # A killed process keeps its number until its own parent has asked how it ended.
        while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os._exit(1)
