"""Read YAML as people write it, with the line of every fault, and within bounds so that no file fills the memory."""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.constructor import ConstructorError, RoundTripConstructor, SafeConstructor
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, ScalarEvent

from pipeline.system.errors import UserError, reason_of

LARGEST_FILE = 1 << 20  # bytes; the largest config that is shipped has 3,000
MOST_VALUES = 100_000  # what an alias stands for counts wherever it is named
DEEPEST = 50  # levels of sections and lists
# What YAML itself says is wrong, and what to do about it.
_MENDS = {
    "duplicate key": "leave one of them out",
    "cannot start any token": "indent with spaces, and put text with special characters in quotes",
    "undefined alias": "an alias such as *x needs its anchor &x above it",
    "found another document": "a config is one document: leave out the line `---` and what follows it",
    "special characters are not allowed": "save the file as plain UTF-8 text",
}
_MEND = "look at this line and at the one before it: brackets, quotes, indentation"


class _Marked:
    """A mixin of constructors: what goes wrong in making a value (a date, a long number) gets the value's line."""

    def construct_object(self, node: Any, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)  # type: ignore[misc]
        except YAMLError:
            raise
        except Exception as error:  # whatever Python's own types say to a text that looks like one of theirs
            raise ConstructorError(None, None, f"cannot be read ({reason_of(error)})", node.start_mark) from error


class _RoundTrip(_Marked, RoundTripConstructor):
    """Keeps the lines of keys."""


class _Safe(_Marked, SafeConstructor):
    """Plain values."""


def read_file(path: Path) -> Any:
    """Read the content of a YAML file, its mappings with the lines of their keys.

    Raises:
        UserError: if there is no such file, or it is not YAML, or larger or deeper than any config is.
    """
    text = _text_of(path)
    yaml = YAML()
    yaml.Constructor = _RoundTrip
    try:
        _measure(text)
        return yaml.load(text)
    except MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line}: not valid YAML: {error.problem}; {_mend(str(error.problem))}") from None
    except YAMLError as error:
        what = reason_of(error)
        raise UserError(f"{path}: cannot be read as YAML: {what}; {_mend(what)}") from None


def _text_of(path: Path) -> str:
    wanted = "expected a run's config in YAML"
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; {wanted}")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {wanted}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {reason_of(error)}; {wanted}") from None
    if len(content) > LARGEST_FILE:
        raise UserError(f"{path}: is larger than {LARGEST_FILE >> 20} MiB; {wanted}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        fault = f"byte 0x{content[error.start]:02x} is not UTF-8"
        raise UserError(f"{path}:{line}: cannot be read as YAML: {fault}; save the file as UTF-8 text") from None


def read_value(text: str) -> Any:
    """Read one value of the command line.

    Raises:
        ValueError: saying what is wrong with it.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Constructor = _Safe
    wanted = "expected a value in YAML, e.g. 1e-4, true, text, '[a, b]' or '{a: 1}'"
    try:
        _measure(text)
        return yaml.load(text)
    except MarkedYAMLError as error:
        raise ValueError(f"{error.problem}; {wanted}") from None
    except YAMLError as error:
        raise ValueError(f"{reason_of(error)}; {wanted}") from None


def _mend(problem: str) -> str:
    return next((mend for part, mend in _MENDS.items() if part in problem), _MEND)


def _measure(text: str) -> None:
    """Refuse a text that would be built for ever or too deep for Python, before anything is built.

    Raises:
        ConstructorError: with the line.
    """
    sizes: dict[str, int] = {}  # values of each anchor's section, with those of the aliases in it
    opened: list[str | None] = []
    counts = [0]  # of the document, and of every section that is open
    for event in YAML().parse(text):
        if isinstance(event, CollectionStartEvent):
            opened.append(event.anchor)
            counts.append(1)
        elif isinstance(event, CollectionEndEvent):
            size = counts.pop()
            anchor = opened.pop()
            counts[-1] += size
            if anchor is not None:
                sizes[anchor] = size
        elif isinstance(event, AliasEvent):
            if event.anchor in opened:
                fault = f"the alias *{event.anchor} stands for the section it is in; write the values out"
                raise ConstructorError(None, None, fault, event.start_mark)
            counts[-1] += sizes.get(event.anchor, 1)
        elif isinstance(event, ScalarEvent):
            counts[-1] += 1
        if len(opened) > DEEPEST:
            fault = f"is nested deeper than {DEEPEST} levels; write it flat: a config has no more than 6"
            raise ConstructorError(None, None, fault, event.start_mark)
        if sum(counts) > MOST_VALUES:
            fault = (
                f"the aliases (*name) up to here stand for more than {MOST_VALUES:,} values; write out what is meant"
            )
            raise ConstructorError(None, None, fault, event.start_mark)
