"""Say in our words why a source cannot be read: turn the datasets library's errors into a UserError."""

import contextlib
import errno
from collections.abc import Callable, Iterator
from lzma import LZMAError
from pathlib import Path
from typing import Any, TypeVar
from zipfile import BadZipFile

from datasets.exceptions import DatasetGenerationError
from pyarrow import ArrowException

from pipeline.data import reading
from pipeline.data.places import Part
from pipeline.system.cache import cache_folder
from pipeline.system.errors import UserError, reason_of

# What a damaged file of `save_to_disk` can raise.
DAMAGES = (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError)
_FROM_HUB = (OSError, ValueError, RuntimeError, DatasetGenerationError)
_FROM_FILES = (DatasetGenerationError, ArrowException, ValueError, OSError, EOFError, LZMAError, BadZipFile)
_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)  # errors that no reading gives
_ALLOWING = (errno.EACCES, errno.EPERM)

Loaded = TypeVar("Loaded")


def empty(part: Part) -> UserError:
    """Return the error for a source without rows."""
    if part.kind == "json" and any(file.stat().st_size for file in part.files):
        return UserError(
            f'{part.label}: is empty, or its rows have no columns; expected rows such as {{"text": "..."}}'
        )
    return UserError(f"{part.label}: is empty; expected at least one row")


def damaged(part: Part, path: Path, error: Exception) -> UserError:
    """Return the error for a file or folder of `save_to_disk` that cannot be read."""
    fault = f"{path} cannot be read ({type(error).__name__}: {reason_of(error)})"
    return UserError(f"{part.label}: {fault}; write the folder again with save_to_disk")


def from_hub(part: Part, load: Callable[..., Loaded], **options: Any) -> Loaded:
    """Call one of the datasets library's loaders with the hub id, the name and the revision of a source.

    Raises:
        UserError: if the hub, and its cache, have no such dataset.
    """
    spec = part.spec
    try:
        return load(spec.path, name=spec.name, revision=spec.revision, **options)
    except _FROM_HUB as error:
        fault = f"cannot load {spec.path!r} from the hub, nor is it a file"
        raise UserError(f"data.{part.dataset}: {fault}: {reason_of(error)}") from None


@contextlib.contextmanager
def readable(part: Part) -> Iterator[None]:
    """Turn errors of the block, which reads the source, into a UserError; silence what the library logs of them."""
    try:
        with reading.silence():
            yield
    except UserError:
        raise
    except StopIteration:
        raise empty(part) from None
    except RecursionError:
        raise UserError(f"{part.label}: cannot be read: a value has too many brackets within brackets") from None
    except _FROM_FILES as error:
        if fault := _fault_of_cache(part, error.__cause__ or error):
            raise UserError(fault) from None
        reason = [type(error).__name__, *str(error.__cause__ or error).strip().splitlines()][-1]
        if "corresponds to no data" in reason or "No columns to parse" in reason:
            raise empty(part) from None
        raise UserError(f"{part.label}: cannot be read: {reason}") from None


def _fault_of_cache(part: Part, error: BaseException) -> str | None:
    """Return the message for an error of writing the cache; None if the error comes from reading the source."""
    if not isinstance(error, OSError):
        return None
    path = Path(error.filename) if isinstance(error.filename, str) else None
    reason = error.strerror
    if str(error).startswith("Not enough disk space"):  # the datasets library looks before it writes
        reason = "No space left on device"
    elif error.errno not in _WRITING and (path is None or path in part.files or error.errno not in _ALLOWING):
        return None
    fault = f"{path or cache_folder()}: the cache of prepared data cannot be written ({reason})"
    return f"{fault}; make room or allow writing there, or set HF_HOME to another folder"
