"""Keep configs that were found to be right, so that the same file with the same overrides is not checked again.

A config is kept as plain values with the digest of all that its check looked at: the file, the overrides, the versions
of all packages, and the base model's config.json. It is made again by our own schema alone.
"""

import json
from pathlib import Path
from typing import Any

from pipeline.config.schema import RunConfig, Taken
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.yaml_text import LARGEST_FILE
from pipeline.system import digests, kept

_KIND = "configs"


def recall(path: Path, overrides: tuple[str, ...]) -> RunConfig | None:
    """Return the config if it was checked before and all that was looked at is the same; else None.

    Whether the run folder can be made is for the caller to look at: it changes without the config.
    """
    key = key_of(path, overrides)
    value = None if key is None else kept.recall(_KIND, key)
    if value is None:
        return None
    config = _from_plain(value["config"], path)
    return config if _base_digest(config) == value["base"] else None


def keep(key: str, config: RunConfig) -> None:
    """Keep a config that is right, if it is the same after it was written and read."""
    value = {"config": to_plain(config), "base": _base_digest(config)}
    try:
        again = _from_plain(json.loads(json.dumps(value["config"])), config.source)
    except (TypeError, ValueError):  # a value that JSON does not know
        return
    if again == config:
        kept.keep(_KIND, key, value)


def to_plain(config: RunConfig) -> dict[str, Any]:
    """Return a config as JSON-like values, with the fields that were set: a few rules ask which these are."""
    values = config.model_dump(mode="json", exclude_unset=True, exclude={"stages", "source"})
    stages = {name: stage.model_dump(mode="json", exclude_unset=True) for name, stage in config.stages.items()}
    return values | {"stages": stages}


def _from_plain(values: dict[str, Any], source: Path) -> RunConfig:
    stages = {}
    for name, section in values["stages"].items():
        kind = Taken if "run" in section else STAGE_TYPES[section["type"]].section
        stages[name] = kind.model_validate(section)
    return RunConfig.model_validate(values | {"stages": stages, "source": source.resolve()})


def key_of(path: Path, overrides: tuple[str, ...]) -> str | None:
    """Return the digest of what is known before the check; None for what is no file, such as a pipe, or too large."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return None
        content = digests.file_digest(path)
        source = str(path.resolve())
    except (OSError, RuntimeError, ValueError):
        return None
    return digests.digest([content, source, overrides, kept.installation(), kept.environment()])


def _base_digest(config: RunConfig) -> str | None:
    """Return the digest of the base model's config.json; None where it does not lie in a folder here."""
    if config.model.path is None:
        return None
    file = Path(config.resolve(config.model.path)) / "config.json"
    try:
        return digests.file_digest(file) if file.is_file() else None
    except OSError:
        return "unreadable"
