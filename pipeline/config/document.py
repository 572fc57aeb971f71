"""Read the config file as it was written: every key with its line, the command line's overrides laid over it."""

import copy
from pathlib import Path
from typing import Any

from pipeline.config import yaml_text
from pipeline.system.errors import UserError


class Problems(list[tuple[tuple[str | int, ...], str]]):
    """Collect what is wrong with a config: where, as keys from the top, and a message."""

    def add(self, message: str, *loc: str | int) -> None:
        self.append((loc, message))


class Document:
    """Hold the raw file, with the line of every key, and the overrides of the command line laid over it."""

    def __init__(self, path: Path, overrides: tuple[str, ...] = ()):
        self.path = path
        self.overridden: dict[tuple[str, ...], str] = {}
        self.raw = yaml_text.read_file(path)
        if not isinstance(self.raw, dict):
            wanted = "expected a mapping with name, model, data and stages"
            raise UserError(f"{path}: {wanted}, got {kind_of(self.raw) if self.raw else 'nothing'}")
        for override in overrides:
            self._override(override)

    def _override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            wanted = "expected KEY=VALUE, e.g. stages.sft.training.learning_rate=1e-4"
            raise UserError(f"override {shown(override)}: {wanted}")
        keys = self._keys(key.split("."))
        if len(keys) > yaml_text.DEEPEST:
            mend = "a config has no more than 6"
            raise UserError(f"override {shown(override)}: a key of {len(keys)} levels; {mend}")
        node = self.raw
        for part in keys[:-1]:
            section = node.get(part)
            if section is None:
                section = {}
            if not isinstance(section, dict):
                mend = "give the whole value, or the key of a section"
                raise UserError(f"override {shown(override)}: {part!r} holds a value, not a section; {mend}")
            # A section with an anchor is one object in all places that name it; the override is of this place alone.
            node[part] = copy.copy(section)
            node = node[part]
        try:
            node[keys[-1]] = yaml_text.read_value(text)
        except ValueError as error:
            raise UserError(f"override {shown(override)}: {shown(text)} is not a valid YAML value: {error}") from None
        self.overridden[keys] = override

    def _keys(self, parts: list[str]) -> tuple[str, ...]:
        """Split a dotted name into keys; a key with dots of its own is found where it exists in the file."""
        keys: list[str] = []
        node = self.raw
        while parts:
            node = node if isinstance(node, dict) else {}
            length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), 1)
            keys.append(".".join(parts[:length]))
            parts = parts[length:]
            node = node.get(keys[-1])
        return tuple(keys)

    def where(self, loc: tuple[str | int, ...]) -> str:
        """Name `FILE:LINE` of the key at `loc`, or of the nearest key above it; the override where that set it."""
        for keys, override in self.overridden.items():
            if loc[: len(keys)] == keys:
                return f"override {shown(override)}"
        node: Any = self.raw  # ruamel's nodes, or plain values of an override
        at = str(self.path)
        for key in loc:
            try:
                if isinstance(node, dict):
                    key = next(own for own in node if str(own) == key)  # a key may be a number or a date
                marks = getattr(node, "lc")  # noqa: B009 - an attribute of ruamel's nodes alone
                line, _ = marks.key(key) if isinstance(node, dict) else marks.item(key)
                node = node[key]
            except (AttributeError, KeyError, IndexError, TypeError, StopIteration):
                # Not in the file: a section that an override made, or a key that is missing.
                below = [override for keys, override in self.overridden.items() if keys[: len(loc)] == loc]
                return f"override {shown(below[0])}" if below else at
            at = f"{self.path}:{line + 1}"
        return at

    def describe(self, loc: tuple[str | int, ...], message: str) -> str:
        dotted = ".".join(map(str, loc))
        return f"{self.where(loc)}: {dotted if len(dotted) < 200 else shown(dotted)}: {message}"


def shown(value: object) -> str:
    """Show a value in a message: text in quotes, and a long one cut."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:80]}... ({len(text)} characters)"


def kind_of(value: object) -> str:
    """Say in a word what a value is."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return "a section"
    if isinstance(value, list):
        return "a list"
    return shown(value)


def plain(node: Any) -> Any:
    """Turn ruamel's node types into plain dicts and lists."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node if node is None else str(node)
