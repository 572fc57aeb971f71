"""What a disk refuses, as a message: the path, the reason and the mend."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline import streams
from pipeline.errors import UserError

_ROOM = "Make room, then give the same command again: finished stages stay, and the others go on from a checkpoint"
_ALLOW = "Allow writing there, or give another `run_dir`, then give the same command again"
_ODD = "Remove it or move it away, then give the same command again"
_SHORTER = "Give a shorter path or name"
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("the quota of the disk is used up", _ROOM),
    errno.EFBIG: ("a file may not become larger there", _ROOM),
    errno.EROFS: ("the disk is read-only", _ALLOW),
    errno.EACCES: ("writing or reading is not allowed", _ALLOW),
    errno.EPERM: ("writing is not allowed", _ALLOW),
    errno.EIO: ("the disk has an input/output error", "Look at the disk"),
    errno.ENOTDIR: ("a file is where a folder is expected", _ODD),
    errno.EISDIR: ("a folder is where a file is expected", _ODD),
    errno.EEXIST: ("a file is where a folder is expected", _ODD),
    errno.ELOOP: ("a link leads back to itself", _ODD),
    errno.ENAMETOOLONG: ("a name is too long for the disk", _SHORTER),
}
_IN_TEXT = re.compile(r"\(os error (\d+)\)|\[Errno (\d+)\]")  # what libraries of Rust and C++ make of an error's number
# torch's writer says only that the file is shorter than what was written.
_TORCH_WRITER = re.compile(r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing")


@contextlib.contextmanager
def reported(folder: Path) -> Iterator[None]:
    """Make one message of what the disk refuses in the block; `folder` is where the block writes.

    Raises:
        UserError: in the place of the system's error.
    """
    try:
        yield
    except Exception as error:
        message = refusal(error, folder)
        about_stdout = isinstance(error, OSError) and streams.refuses_stdout(error)
        if message is None or about_stdout or isinstance(error, UserError):
            raise
        raise message from error


def refusal(error: BaseException, folder: Path) -> UserError | None:
    """The message for an error that comes from the disk below `folder`; None for any other error."""
    for one in _chain(error):
        number = _number(one)
        if number not in _REFUSALS:
            continue
        path = getattr(one, "filename", None) or folder
        seen, mend = _REFUSALS[number]
        free = f" ({_free(folder)} free)" if mend == _ROOM else ""
        return UserError(f"{path}: {seen}{free}. {mend}")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it was raised from, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _number(error: BaseException) -> int | None:
    """The number of the system's error; libraries put it in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if _TORCH_WRITER.search(str(error)):
        return errno.ENOSPC
    if type(error).__module__.split(".")[0] not in ("safetensors", "tokenizers", "pyarrow", "builtins"):
        return None
    match = _IN_TEXT.search(str(error))
    return int(match[1] or match[2]) if match else None


def _free(folder: Path) -> str:
    """The room that is left where `folder` is, or would be."""
    place = next(path for path in (folder, *folder.parents) if path.exists())
    return f"{shutil.disk_usage(place).free / 2**20:.1f} MiB"
