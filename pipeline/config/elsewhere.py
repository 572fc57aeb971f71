"""Find where a key belongs that its section does not know: many options are written one level too high or too low."""

from collections.abc import Iterator

from pydantic import BaseModel

from pipeline.config import rehearsal
from pipeline.config.options import LIBRARY_SECTIONS, names_of
from pipeline.config.schema import Data, RunConfig, TrainingStage
from pipeline.config.stage_types import KINDS, STAGE_TYPES
from pipeline.config.type_row import StageType


def hint(key: str, loc: tuple[str, ...], kind: str | None) -> str | None:
    """Say where an unknown key belongs, if another section knows it by this very name; else None.

    `loc` is the section in which it was found. `kind` is the type of the stage that the section is of, if it is of one.
    """
    if loc[:1] == ("data",):  # a file's columns and subsets have names of their own
        return None
    if kind is not None:
        for place in _in_stage(key, kind):
            if (*loc[:2], *place) != (*loc, key):
                return f"move it to `{'.'.join((*loc[:2], *place[:-1]))}`"
    if key in Data.model_fields:
        return "move it to `data.NAME`"
    for place in _in_run(key):
        if place != (*loc, key):
            return f"move it to `{'.'.join(place[:-1])}`" if place[:-1] else "move it to the top level"
    types = [name for name, row in STAGE_TYPES.items() if key in _training(name, row)]
    if types:
        return f"move it to `stages.NAME.training` of a stage of type {_either(types)}"
    types = [name for name, row in STAGE_TYPES.items() if key in row.section.model_fields]
    return f"move it to `stages.NAME` of a stage of type {_either(types)}" if types else None


def _in_stage(key: str, kind: str) -> Iterator[tuple[str, ...]]:
    """Return where a stage of this type has the key, from the section of the stage."""
    row = KINDS[kind]
    if key in row.section.model_fields:
        yield (key,)
    if key in _training(kind, row):
        yield ("training", key)
    if issubclass(row.section, TrainingStage) and key in names_of("lora"):
        yield ("lora", key)


def _in_run(key: str) -> Iterator[tuple[str, ...]]:
    """Return where the run has the key, beside its stages."""
    if key in RunConfig.model_fields.keys() - {"source", "stages"}:
        yield (key,)
    for name, field in RunConfig.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel) and key in section.model_fields:
            yield (name, key)
    for kind in LIBRARY_SECTIONS:
        if key in names_of(kind):
            yield (kind, key)


def _training(kind: str, row: StageType) -> set[str]:
    has_options = row.trl_config is not None and rehearsal.missing_trainer(kind) is None
    return names_of(kind) if has_options else set()


def _either(names: list[str]) -> str:
    """Return names as one text: "a", "a or b", "a, b or c"."""
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)
