"""The one exception for what a user can mend, and words shared by messages."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: printed as its message alone, exit code 2, no traceback."""


class StageFailed(Exception):
    """A stage's process ended with an error; the message says what to tell the user."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


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
