"""Read a run's config: one strict YAML file, all errors of all stages at once, before anything heavy happens."""

import os
import typing
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.config import architecture, options, ranges, rehearsal, taken, validated
from pipeline.config.document import Document, Problems, kind_of, plain, shown
from pipeline.config.references import wire
from pipeline.config.schema import REPORT, RESERVED, Options, RunConfig, Stage, Taken, TrainingStage, variant_of
from pipeline.config.stage_types import KINDS, STAGE_TYPES
from pipeline.system.errors import all_of, nearest, reason_of

M = TypeVar("M", bound=BaseModel)


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read, check and resolve a run's config; one that was checked before is not checked again.

    Raises:
        UserError: with one line for every problem in the file and in the overrides.
    """
    config = recall(path, overrides)
    if config is None:
        key = validated.key_of(Path(path), overrides)
        config = _check(Path(path), overrides)
        if key is not None and key == validated.key_of(Path(path), overrides):  # the file did not change meanwhile
            validated.keep(key, config)
    return config


def recall(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig | None:
    """Return a config that was checked before and is still right; None: `load` would import all libraries to tell."""
    config = validated.recall(Path(path), overrides)
    if config is None or _fault_of_run_dir(config) is not None or not taken.is_current(config):
        return None
    return config


def _check(path: Path, overrides: tuple[str, ...]) -> RunConfig:
    document = Document(path, overrides)
    raw = plain(document.raw)
    problems = Problems()
    _check_numbers(raw, problems)
    numbers = [loc for loc, _ in problems]
    _check_trainers(raw, problems)
    _coerce_options(raw, problems)
    config = _parse(raw, document.path.resolve(), problems)
    if config is not None and not problems:
        config = taken.fill_in(config, problems)
    if config is not None and not problems:
        config = wire(config, problems)
    if config is not None and not problems:
        fault = _fault_of_run_dir(config)
        if fault is not None:
            problems.add(fault, "run_dir")
        _check_base(config, problems)
    if config is None or problems:
        distinct = [problem for at, problem in enumerate(problems) if problem[0] not in numbers[:at]]
        lines = sorted({document.describe(*problem) for problem in distinct}, key=_by_line)
        raise all_of(document.path, "problem", "in the config", lines)
    return config


def _by_line(text: str) -> tuple[int, str]:
    """Order messages by the line of the file that they begin with, then by their text."""
    line = text.split(": ")[0].rpartition(":")[2]
    return (int(line) if line.isdigit() else 0, text)


def _parse(raw: Options, source: Path, problems: Problems) -> RunConfig | None:
    """Parse the file by our own schema. Stages are checked one by one, so that every stage's errors are found."""
    stages = raw.get("stages")
    if not isinstance(stages, dict) or not stages:
        wanted = "is required: a mapping of stage names, e.g. `sft: {data: demos}`"
        problems.add(f"{wanted}, got {kind_of(stages)}", "stages")
        stages = {}
    parsed = {}
    for name, section in stages.items():
        if not isinstance(section, dict):
            problems.add(f"expected a section, got {kind_of(section)}", "stages", name)
            continue
        if "run" in section:
            stage = _taken(name, section, problems)
            if stage is not None:
                parsed[name] = stage
            continue
        measured = name.removesuffix(REPORT)
        if measured != name and measured in stages and "type" not in section:  # the report that is added by itself
            section = {"type": "shift", "reward": measured} | section
        stage_type = str(section.get("type", name))
        if stage_type not in STAGE_TYPES:
            hint = f"{shown(stage_type)} is no stage type; {nearest(stage_type, STAGE_TYPES)}"
            where = ("stages", name, "type") if "type" in section else ("stages", name)
            problems.add(f"its type is its name unless `type:` is given, and {hint}", *where)
        else:
            stage_class = STAGE_TYPES[stage_type].section
            inherited = {"lora": raw.get("lora")} if issubclass(stage_class, TrainingStage) else {}
            values = inherited | {"type": stage_type} | section
            stage = _validated(stage_class, values, problems, "stages", name)
            if stage is not None:
                parsed[name] = stage
    config = _validated(RunConfig, raw | {"stages": parsed, "source": source}, problems)
    if config is not None and (config.model.path is None) == (config.model.scratch is None):
        problems.add("give either `path` (a hub id or folder) or `scratch` (a new architecture)", "model")
    for name in stages.keys() & RESERVED:
        problems.add("this name is taken by the base model or by the run folder; choose another", "stages", name)
    if "source" in raw:
        problems.add(f"unknown key; {nearest('source', RunConfig.model_fields)}", "source")
    return config


def _taken(name: str, section: Options, problems: Problems) -> Stage | None:
    """Parse a stage that is taken from another run: a section with a `run`."""
    for key in section.keys() - {"run", "stage"}:
        wrong = "a stage of another run is taken as it is, so its section has `run` and `stage` alone"
        problems.add(f"{wrong}; leave this key out", "stages", name, key)
    own = {key: section[key] for key in ("run", "stage") if key in section}
    return _validated(Taken, {"stage": name} | own, problems, "stages", name)


def _validated(model: type[M], values: Options, problems: Problems, *loc: str) -> M | None:
    """Return an instance of the model, or None after its problems are added.

    pydantic's errors are put in our words. An unknown key gets the nearest key of its level.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        errors = error.errors()
    for item in errors:
        message = f"{item['msg'][0].lower()}{item['msg'][1:]}".replace("input should be", "expected")
        if item["type"] == "value_error":  # from `values`
            message = str(item.get("ctx", {})["error"])
        if item["type"] == "missing":
            message = "is required"
        elif item["type"] == "extra_forbidden":
            level: type[BaseModel] = model
            for part in item["loc"][:-1]:
                level = _model_at(level, part)
            message = f"unknown key; {nearest(str(item['loc'][-1]), level.model_fields.keys() - {'source'})}"
        else:
            message += f", got {kind_of(item['input'])}"
        problems.add(message, *loc, *item["loc"])
    return None


def _model_at(model: type[BaseModel], part: str | int) -> type[BaseModel]:
    """Find the model behind a field, looked up through `X | None`, `dict[str, X]` and the name of a dict's entry."""
    field = model.model_fields.get(str(part))
    if field is None:
        return model
    kinds = (field.annotation, *typing.get_args(field.annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), model)


def _check_numbers(node: object, problems: Problems, *loc: str | int) -> None:
    """Check that no number of the config is NaN, infinite or longer than 64 bits."""
    children: Iterable[tuple[str | int, object]] = ()
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    elif isinstance(node, (int, float)) and (fault := ranges.not_usable(node)):
        problems.add(fault, *loc)
    for key, child in children:
        _check_numbers(child, problems, *loc, key)


def _fault_of_run_dir(config: RunConfig) -> str | None:
    """Say why the run folder is not there and cannot be made, or return None."""
    try:
        path = config.run_path
        above = next(place for place in (path, *path.parents) if os.path.lexists(place))
    except (OSError, RuntimeError) as error:  # a link that leads to itself
        return f"cannot be a folder: {reason_of(error)}; give another path"
    if above.is_relative_to("/proc") or above.is_relative_to("/sys"):
        return f"{path} is below a folder of the system, where no file can be written; give another path"
    if not above.is_dir():
        return f"{above} is no folder, so {path} cannot be one; give another path"
    return None


def _check_base(config: RunConfig, problems: Problems) -> None:
    """Check the base model's own config, where it lies in a folder here."""
    if config.model.path is None:
        return
    file = Path(config.resolve(config.model.path)) / "config.json"
    if file.is_file() and (fault := architecture.fault_of_file(file)):
        problems.add(fault, "model", "path")


def _trained_stages(raw: Options) -> Iterator[tuple[str, str]]:
    """Return the names of the stages that train, each with its type, or the variant that its `trainer` asks for."""
    stages = raw.get("stages")
    for name in stages if isinstance(stages, dict) else ():
        if _at(raw, "stages", name, "run") is not None:  # it is taken from another run
            continue
        stage_type = str(_at(raw, "stages", name, "type") or name)
        if stage_type in STAGE_TYPES and issubclass(STAGE_TYPES[stage_type].section, TrainingStage):
            kind = variant_of(stage_type, _at(raw, "stages", name, "trainer"))
            # The schema refuses a trainer that its type does not have.
            yield name, kind if kind in KINDS else stage_type


def _check_trainers(raw: Options, problems: Problems) -> None:
    """Check that the installed TRL has the trainer of each stage."""
    for name, kind in _trained_stages(raw):
        fault = rehearsal.missing_trainer(kind)
        if fault is not None:
            problems.add(fault, "stages", name)


def _sections(raw: Options) -> Iterator[tuple[tuple[str, ...], str, Options]]:
    """Go through every section that belongs to a library: (location, kind, options)."""
    places: dict[tuple[str, ...], str] = {(key,): key for key in ("training", "lora", "quantization")}
    places["model", "scratch", "architecture"] = "architecture"
    for name, kind in _trained_stages(raw):
        places["stages", name, "lora"] = "lora"
        if rehearsal.missing_trainer(kind) is None:  # or nothing would know its options
            places["stages", name, "training"] = kind
    for loc, kind in places.items():
        section = _at(raw, *loc)
        if isinstance(section, dict):
            yield loc, kind, section


def _at(node: object, *keys: str) -> object:
    """Return what lies below these keys, or None."""
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node


def _coerce_options(raw: Options, problems: Problems) -> None:
    """Check the sections of libraries, and put coerced values in their place."""
    for loc, kind, section in _sections(raw):
        coerced, faults = options.check_section(kind, section)
        section.update(coerced)
        for key, message in faults:
            where = (*loc, key) if key else loc  # without a key it is about the whole section
            problems.add(message, *where)
        if faults or kind not in ("lora", "quantization"):
            continue
        fault = rehearsal.rehearse(kind, coerced)
        if fault is not None:
            problems.add(fault, *loc)
