"""The config file as it was written: every key with its line, and the command line's overrides laid over it."""

import copy
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from pipeline.errors import UserError


class Problems(list[tuple[tuple[str | int, ...], str]]):
    """What is wrong with a config: where, as keys from the top, and a message."""

    def add(self, message: str, *loc: str | int) -> None:
        self.append((loc, message))


class Document:
    """The raw file, with the line of every key, and the overrides of the command line laid over it."""

    def __init__(self, path: Path, overrides: tuple[str, ...] = ()):
        self.path = path
        self.overridden: dict[tuple[str, ...], str] = {}
        try:
            self.raw = YAML().load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; expected a run's config in YAML") from None
        except MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
            raise UserError(f"{path}{line}: not valid YAML: {error.problem}") from None
        except (OSError, UnicodeDecodeError, YAMLError) as error:
            raise UserError(f"{path}: cannot be read as YAML: {error}") from None
        if not isinstance(self.raw, dict):
            kind = type(self.raw).__name__
            raise UserError(f"{path}: expected a mapping with name, model, data and stages, got {kind}")
        for override in overrides:
            self._override(override)

    def _override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {override!r}: expected KEY=VALUE, e.g. stages.sft.training.learning_rate=1e-4")
        keys = self._keys(key.split("."))
        node = self.raw
        for part in keys[:-1]:
            section = node.get(part)
            if section is None:
                section = {}
            if not isinstance(section, dict):
                raise UserError(f"override {override!r}: {part!r} holds a value, not a section")
            # A section with an anchor is one object in all places that name it; the override is of this place alone.
            node[part] = copy.copy(section)
            node = node[part]
        try:
            node[keys[-1]] = YAML(typ="safe").load(text)
        except YAMLError:
            raise UserError(f"override {override!r}: {text!r} is not a valid YAML value") from None
        self.overridden[keys] = override

    def _keys(self, parts: list[str]) -> tuple[str, ...]:
        """The keys a dotted name means; a key with dots of its own is found where it exists in the file."""
        keys, node = [], self.raw
        while parts:
            node = node if isinstance(node, dict) else {}
            length = next((n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in node), 1)
            keys.append(".".join(parts[:length]))
            parts = parts[length:]
            node = node.get(keys[-1])
        return tuple(keys)

    def where(self, loc: tuple[str | int, ...]) -> str:
        """`FILE:LINE` of the key at `loc`, or of the nearest key above it; the override where that set it."""
        for keys, override in self.overridden.items():
            if loc[: len(keys)] == keys:
                return f"override {override!r}"
        node, at = self.raw, str(self.path)
        for key in loc:
            try:
                line, _ = node.lc.key(key) if isinstance(node, dict) else node.lc.item(key)
                node = node[key]
            except (AttributeError, KeyError, IndexError, TypeError):
                # Not in the file: a section that an override made, or a key that is missing.
                made = [override for keys, override in self.overridden.items() if keys[: len(loc)] == loc]
                return f"override {made[0]!r}" if made else at
            at = f"{self.path}:{line + 1}"
        return at

    def describe(self, loc: tuple[str | int, ...], message: str) -> str:
        return f"{self.where(loc)}: {'.'.join(map(str, loc))}: {message}"


def plain(node: Any) -> Any:
    """ruamel's node types as plain dicts and lists."""
    if isinstance(node, dict):
        return {str(key): plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    for kind in (bool, int, float, str):
        if isinstance(node, kind):
            return kind(node)
    return node if node is None else str(node)
