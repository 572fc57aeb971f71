"""Define the exception for what a user can mend, and words that messages share."""

import difflib
from collections.abc import Iterable

MAX_LISTED = 20  # names in a hint


class UserError(ValueError):
    """Report bad input: the command prints the message alone, without a traceback, and ends with exit code 2."""

    exit_code = 2


class StageFailed(Exception):
    """Report that a stage's process ended with an error; the message says what to tell the user."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def reason_of(error: Exception) -> str:
    """Return the first line of another library's error, or the name of its class."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def all_of(where: object, noun: str, predicate: str, lines: list[str], number: int | None = None) -> UserError:
    """Return one error of several lines, e.g. `config.yaml: 2 problems in the config` with a line for each.

    `number`: of what the heading counts, where one of it can have several lines.
    """
    number = len(lines) if number is None else number
    plural = "" if number == 1 else "s"
    head = f"{where}: {number} {noun}{plural} {predicate}"
    return UserError("\n  ".join([head, *lines]))


def unknown(noun: str, name: str, valid: Iterable[str]) -> str:
    """Say that there is no such name, with a hint."""
    return f"there is no {noun} {name!r}; {nearest(name, valid)}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return a hint for an unknown name: the nearest valid one, or the list of them when nothing is near.

    >>> nearest("learning_rat", ["learning_rate", "optim"])
    "did you mean 'learning_rate'?"
    """
    names = sorted(valid)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if matches:
        return f"did you mean '{matches[0]}'?"
    if len(names) <= MAX_LISTED:
        return "valid here: " + ", ".join(names)
    return "no name here is near it"
