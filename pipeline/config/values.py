"""Define kinds of values that pydantic does not have: texts, paths, names, seeds."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

_LONGEST_PART = 255  # bytes of a file's name
_LONGEST_PATH = 4095  # bytes


def _usable(text: str) -> str:
    """Accept a text that can be a name, a path or a token: it is not empty, and every system call and file takes it."""
    if not text:
        raise ValueError("must not be empty; leave the key out, or give a value")
    if "\0" in text:
        raise ValueError("must not have a NUL character")
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        raise ValueError("must be text that UTF-8 can hold; half of a surrogate pair is not")
    return text


def _possible_path(text: str) -> str:
    """Accept a path that may exist: its parts are not too long, and `~name` names a user."""
    if not text.strip():
        raise ValueError("must not be blank; leave the key out, or give a path")
    longest = max(len(part.encode()) for part in text.split("/"))
    if longest > _LONGEST_PART or len(text.encode()) > _LONGEST_PATH:
        limits = f"at most {_LONGEST_PART} bytes between two slashes, {_LONGEST_PATH} in all"
        raise ValueError(f"must be a path that a file may have: {limits}")
    try:
        Path(text).expanduser()
    except RuntimeError:
        raise ValueError(f"there is no home folder of {text.split('/')[0]!r}; give the whole path") from None
    return text


Text = Annotated[str, AfterValidator(_usable)]
PathText = Annotated[Text, AfterValidator(_possible_path)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]  # what numpy's generators take
# Names are names of folders too, and stages have `-shift` added.
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=NAME, max_length=100)]
Format = Literal[
    "auto",
    "text",
    "prompt",
    "prompt_completion",
    "messages",
    "alpaca",
    "sharegpt",
    "unpaired",
    "comparison",
    "hh",
    "scored",
]
