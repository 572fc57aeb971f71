"""The one exception for what a user can mend, and words shared by messages."""

import difflib
from collections.abc import Iterable
from typing import Any


class UserError(ValueError):
    """Bad input: printed as its message alone, exit code 2, no traceback."""

    exit_code = 2


class StageFailed(Exception):
    """A stage's process ended with an error; the message says what to tell the user."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def reason_of(error: Exception) -> str:
    """The first line of another library's error."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def all_of(where: Any, noun: str, what: str, lines: list[str]) -> UserError:
    """One error of several lines, e.g. `config.yaml: 2 problems in the config` with a line for each."""
    return UserError("\n  ".join([f"{where}: {len(lines)} {noun}{'s' * (len(lines) != 1)} {what}", *lines]))


def unknown(what: str, name: str, valid: Iterable[str]) -> str:
    return f"there is no {what} {name!r}; {nearest(name, valid)}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint for an unknown name: the nearest valid one, or the list of them when nothing is near.

    >>> nearest("learning_rat", ["learning_rate", "optim"])
    "did you mean 'learning_rate'?"
    """
    valid = sorted(valid)
    match = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if match:
        return f"did you mean '{match[0]}'?"
    return "valid here: " + ", ".join(valid) if len(valid) <= 20 else "no name here is near it"
