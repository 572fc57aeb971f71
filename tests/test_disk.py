"""Which errors are the disk's, and which are bugs or come from elsewhere and keep their traceback."""

import errno
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from pipeline.system import disk
from pipeline.system.errors import UserError


def caught(make):
    """The error that a block of code raises."""
    try:
        make()
    except Exception as error:
        return error


def bug_after_a_refusal():
    try:
        Path("/").mkdir()
    except FileExistsError:
        None.missing  # noqa: B018


def told_otherwise():
    try:
        raise OSError(errno.ENOSPC, "full")
    except OSError:
        raise ValueError("in other words") from None


def elsewhere(number, name):
    return OSError(number, os.strerror(number), name)


def test_errors_of_others_are_not_the_disks(tmp_path):
    (tmp_path / "there").mkdir()
    errors = [
        caught(bug_after_a_refusal),
        caught(told_otherwise),
        caught((tmp_path / "there").mkdir),  # a folder is there: our own mistake
        elsewhere(errno.EACCES, "/data/rows.jsonl"),
        PermissionError(errno.EPERM, "sched_setaffinity"),
        RuntimeError("Caught PermissionError in DataLoader worker: [Errno 13] Permission denied: '/data/x.png'"),
        OSError(errno.ENOSPC, "No space left on device"),  # shared memory, for example: this disk has room
        FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "gone")),
    ]
    for error in errors:
        assert isinstance(error, Exception)
        assert disk.refusal(error, tmp_path) is None, error
        with pytest.raises(type(error)), disk.reported(tmp_path):
            raise error


def test_errors_of_the_disk_are_one_message(tmp_path, monkeypatch):
    place = tmp_path / "sft" / "output"
    (tmp_path / "file").write_text("")
    wrapped = RuntimeError("the cache")
    wrapped.__cause__ = elsewhere(errno.EROFS, str(place))
    expected = {
        f"{place}: writing or reading is not allowed. Allow": elsewhere(errno.EACCES, str(place)),
        f"{place}: the disk is read-only. Allow": wrapped,
        f"{tmp_path / 'file'}: a file is where a folder is expected. Remove": caught((tmp_path / "file").mkdir),
        f"{tmp_path}: a file may not become larger there (": OSError(errno.EFBIG, "too large"),
    }
    for words, error in expected.items():
        assert str(disk.refusal(error, tmp_path)).startswith(words)
    monkeypatch.setattr(disk, "_free", lambda _: 3 << 20)
    full = [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
    ]
    for error in full:
        words = rf"{tmp_path}: the disk is full \(3.0 MiB free\). Make room"
        with pytest.raises(UserError, match=words), disk.reported(tmp_path):
            raise error
