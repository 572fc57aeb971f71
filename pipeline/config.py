"""Read a run's config: one strict YAML file, all errors of all stages at once, before anything heavy happens."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline import options
from pipeline.document import Document, Problem
from pipeline.errors import UserError, nearest
from pipeline.schema import RESERVED, STAGE_CLASSES, Options, RunConfig
from pipeline.wiring import wire


def load(path: str | Path, overrides: tuple[str, ...] = ()) -> RunConfig:
    """Read, check and resolve a run's config.

    Raises:
        UserError: with one line for every problem in the file and in the overrides.
    """
    document = Document(Path(path), overrides)
    raw = document.plain()
    problems: list[Problem] = []
    config = _parse(raw, document.path.resolve(), problems)
    problems += _check_options(raw)
    if config is not None and not problems:
        config, found = wire(config)
        problems += found
    if problems or config is None:
        lines = sorted({document.describe(problem) for problem in problems}, key=_by_line)
        count = "1 problem" if len(lines) == 1 else f"{len(lines)} problems"
        raise UserError(f"{document.path}: {count} in the config\n" + "\n".join(f"  {line}" for line in lines))
    return config


def _by_line(text: str) -> tuple[int, str]:
    line = text.split(": ")[0].rpartition(":")[2]
    return (int(line) if line.isdigit() else 0, text)


def _messages(error: ValidationError, model: type[BaseModel], loc: tuple[str, ...]) -> Iterator[Problem]:
    """pydantic's errors in our words; an unknown key gets the nearest name of the level it stands at."""
    for item in error.errors():
        at = loc + item["loc"]
        if item["type"] == "extra_forbidden":
            level = model
            for part in item["loc"][:-1]:
                level = _model_at(level, part)
            names = [name for name in level.model_fields if name != "source"]
            yield Problem(at, f"unknown key; {nearest(str(item['loc'][-1]), names)}")
        elif item["type"] == "missing":
            yield Problem(at, "is required")
        else:
            got = f", got {item['input']!r}" if not isinstance(item["input"], (dict, list)) else ""
            yield Problem(at, f"{item['msg'][0].lower()}{item['msg'][1:]}{got}")


def _model_at(model: type[BaseModel], part: str | int) -> type[BaseModel]:
    """The model behind a field, looked up through `X | None`, `dict[str, X]` and the name of a dict's entry."""
    field = model.model_fields.get(str(part))
    if field is None:
        return model
    found = [
        kind
        for kind in (field.annotation, *getattr(field.annotation, "__args__", ()))
        if isinstance(kind, type) and issubclass(kind, BaseModel)
    ]
    return found[0] if found else model


def _parse(raw: dict[str, Any], source: Path, problems: list[Problem]) -> RunConfig | None:
    """Our own schema. Stages are checked one by one, so that every stage's errors are found."""
    raw = dict(raw)
    stages = raw.get("stages")
    if not isinstance(stages, dict) or not stages:
        problems.append(Problem(("stages",), "is required: a mapping of stage names, e.g. `sft: {data: demos}`"))
        stages = {}
    parsed = {}
    for name, section in stages.items():
        loc = ("stages", name)
        if not isinstance(section, dict):
            problems.append(Problem(loc, f"expected a section, got {section!r}"))
            continue
        stage_type = section.get("type", name)
        if stage_type not in STAGE_CLASSES:
            hint = nearest(str(stage_type), STAGE_CLASSES)
            problems.append(
                Problem(loc, f"its type is its name unless `type:` is given, and {stage_type!r} is none; {hint}")
            )
            continue
        inherited = {}
        if stage_type != "evaluate":
            inherited = {"lora": raw.get("lora")} if "lora" not in section else {}
        model = STAGE_CLASSES[stage_type]
        try:
            parsed[name] = model.model_validate({"type": stage_type} | section | inherited)
        except ValidationError as error:
            problems += _messages(error, model, loc)
    try:
        config = RunConfig.model_validate(raw | {"stages": parsed, "source": source})
    except ValidationError as error:
        problems += _messages(error, RunConfig, ())
        return None
    if (config.model.path is None) == (config.model.scratch is None):
        problems.append(
            Problem(("model",), "give either `path` (a hub id or folder) or `scratch` (a new architecture)")
        )
    problems += [Problem(("stages", n), "this name is taken by the base model or by the run folder; choose another") for n in RESERVED if n in config.stages]
    if "source" in raw:
        problems.append(Problem(("source",), "unknown key; " + nearest("source", RunConfig.model_fields)))
    return config


def _sections(raw: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str, Options]]:
    """Every section that belongs to a library: (location, kind, options)."""
    for key in ("training", "lora", "quantization"):
        if isinstance(raw.get(key), dict):
            yield (key,), key, raw[key]
    for name, stage in (raw.get("stages") or {}).items() if isinstance(raw.get("stages"), dict) else ():
        if not isinstance(stage, dict) or stage.get("type", name) not in STAGE_CLASSES:
            continue
        if isinstance(stage.get("lora"), dict):
            yield ("stages", name, "lora"), "lora", stage["lora"]
        if isinstance(stage.get("training"), dict) and stage.get("type", name) != "evaluate":
            yield ("stages", name, "training"), stage.get("type", name), stage["training"]


def _check_options(raw: dict[str, Any]) -> list[Problem]:
    problems = []
    for loc, kind, section in _sections(raw):
        coerced, found = options.check_section(kind, section)
        problems += [Problem((*loc, key), message) for key, message in found]
        if not found and kind in ("lora", "quantization") and (message := options.rehearse(kind, coerced)):
            problems.append(Problem(loc, message))
    at = ("model", "scratch", "architecture")
    architecture: Any = raw
    for key in at:
        architecture = architecture.get(key) if isinstance(architecture, dict) else None
    if isinstance(architecture, dict):
        problems += [Problem((*at, key), message) for key, message in options.check_architecture(architecture)]
    return problems
