"""Turn what a disk refuses into a message: the path, the reason and the mend."""

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from pipeline.system import streams
from pipeline.system.errors import UserError

_ROOM = "Make room, then give the same command again: what is finished stays"
_ALLOW = "Allow writing there, or give another `{}`, then give the same command again"
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
# Errors that writing gives, if they name no file.
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_IN_TEXT = re.compile(r"\(os error (\d+)\)")  # what libraries written in Rust make of an error's number
# torch's writer says only that the file is shorter than what was written.
_TORCH_WRITER = re.compile(r"unexpected pos \d+ vs \d+|PytorchStreamWriter failed writing")
_LITTLE = 64 * 2**20  # bytes; a disk with more is not full


@contextlib.contextmanager
def reported(folder: Path, option: str = "run_dir") -> Iterator[None]:
    """Turn what the disk refuses in the block into one message; `folder` is where the block writes.

    `option` is what names the folder, as a user knows it.

    Raises:
        UserError: in the place of the system's error.
    """
    try:
        yield
    except Exception as error:
        user_error = refusal(error, folder, option)
        is_about_stdout = isinstance(error, OSError) and streams.refuses_stdout(error)
        if user_error is None or is_about_stdout or isinstance(error, UserError):
            raise
        raise user_error from error


def refusal(error: BaseException, folder: Path, option: str = "run_dir") -> UserError | None:
    """Return the message for an error that comes from the disk below `folder`; None for other errors, such as bugs."""
    for cause in _chain(error):
        number = _number(cause)
        if number not in _REFUSALS or not _is_of(cause, number, folder):
            continue
        path = getattr(cause, "filename", None) or folder
        fault, mend = _REFUSALS[number]
        if mend == _ROOM:
            fault += f" ({_free(folder) / 2**20:.1f} MiB free)"
        return UserError(f"{path}: {fault}. {mend.format(option)}")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that it was raised from on purpose, the outermost first."""
    while error is not None:
        yield error
        error = error.__cause__


def _number(error: BaseException) -> int | None:
    """Return the number of the system's error, which some libraries put in their text."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    if _TORCH_WRITER.search(str(error)):
        return errno.ENOSPC
    match = _IN_TEXT.search(str(error))
    return int(match[1]) if match else None


def _is_of(error: BaseException, number: int, folder: Path) -> bool:
    """Say whether an error is about a file below `folder`, or about writing one."""
    name = getattr(error, "filename", None)
    if not isinstance(name, (str, Path)):
        return number in _OF_WRITING and (number != errno.ENOSPC or _free(folder) < _LITTLE)
    path = Path(name).absolute()
    if folder not in (path, *path.parents) and path not in folder.parents:
        return False
    return number != errno.EEXIST or path.is_file()


def _free(folder: Path) -> int:
    """Return the number of free bytes where `folder` is, or would be."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(existing).free
