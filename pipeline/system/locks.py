"""Ask for a lock without keeping it."""

from pathlib import Path

from filelock import FileLock, Timeout


def is_held(lock: Path) -> bool:
    """Tell whether a process holds the lock of this file, which ends with the process."""
    if not lock.is_file():
        return False
    try:
        with FileLock(lock).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # not ours to lock
        return False
