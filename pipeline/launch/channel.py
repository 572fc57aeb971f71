"""Tell the process of a stage what its launcher knows, and tell the launcher why the stage stopped.

Both leave files in a temporary folder, which one environment variable names. The run folder may lie on the full disk
that an answer is about, and what a killed launcher leaves there cannot be taken for another answer. A stage takes the
variable away: a run that a user's function starts is not the launcher's.
"""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from pipeline.system.errors import UserError

FOLDER = "RLHF_LAUNCH_FOLDER"  # the variable that names the folder
_LAUNCH = "launch.json"
_SUFFIX = ".txt"


@dataclass(frozen=True)
class Launch:
    """Hold what a launcher tells a stage; of a stage that is started by hand nothing is known.

    `launcher`: the number of the launcher's process, with which the stage ends.
    `reason`: why the stage runs, for its record.
    `redo`: whether the stage begins anew, whatever checkpoints it has.
    `token`: tells the progress file of this launch from that of an earlier one.
    """

    launcher: int | None = None
    reason: str | None = None
    redo: bool = False
    token: str | None = None


@contextlib.contextmanager
def opened(launch: Launch, spare: Path) -> Iterator[str]:
    """Make the folder and leave in it what the stage must know; `spare` takes it if there is no temporary folder."""
    try:
        folder = tempfile.TemporaryDirectory(prefix="rlhf-", ignore_cleanup_errors=True)
        _write(folder.name, launch)
    except OSError:
        folder = tempfile.TemporaryDirectory(prefix="launch-", dir=spare, ignore_cleanup_errors=True)
        _write(folder.name, launch)
    with folder:
        yield folder.name


def _write(folder: str, launch: Launch) -> None:
    (Path(folder) / _LAUNCH).write_text(json.dumps(asdict(launch)), encoding="utf-8")


def received() -> tuple[Launch, Path | None]:
    """Take what the launcher has left for this process, and the folder for its answer; processes within get neither.

    Raises:
        UserError: if the folder is gone: its launcher has ended.
    """
    folder = os.environ.pop(FOLDER, None)
    if folder is None:
        return Launch(), None
    os.environ.pop("PYTHONSAFEPATH", None)  # it was for this process, not for what a user's function starts
    try:
        said = json.loads((Path(folder) / _LAUNCH).read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"the `rlhf run` that starts this stage has ended ({FOLDER}={folder} is gone)") from None
    return Launch(**said), Path(folder)


def report_error(folder: Path | None, message: str) -> None:
    """Leave a user's error to the launcher, if there is one. Any process of the stage may be the one that met it."""
    if folder is None:
        return
    partial = folder / f"{os.getpid()}.partial"
    with contextlib.suppress(OSError):  # the log has the message too
        partial.write_text(message, encoding="utf-8", errors="backslashreplace")
        partial.replace(partial.with_suffix(_SUFFIX))  # in one step: the other processes' launcher may kill this one


def error_in(folder: str | Path) -> str | None:
    """Return the first error that the processes of a stage have left in a folder, or None."""
    files = Path(folder).glob(f"*{_SUFFIX}")
    first = min(files, key=lambda file: file.stat().st_mtime_ns, default=None)
    return None if first is None else first.read_text(encoding="utf-8")


def wait_until_gone(number: int, interval: float) -> None:
    """Wait for the end of a process that is no child of this one; `interval`: seconds between two looks."""
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(number)
        # A killed process keeps its number until its own parent has asked how it ended.
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(interval)


def end_with_launcher(number: int, folder: Path) -> None:
    """End this process when the `rlhf run` that started it is gone, so that a killed run leaves nothing training."""
    wait_until_gone(number, 1)
    shutil.rmtree(folder, ignore_errors=True)  # the launcher could not
    os._exit(1)
