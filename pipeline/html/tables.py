"""The tables of a report, as columns and rows of text."""

import json
from typing import Any

from pipeline.data.faults import DROPPED, NOTICED
from pipeline.html.values import Run, Stage
from pipeline.show import results
from pipeline.show.screen import Table
from pipeline.show.tables import count, duration, number

LIMIT = "the limit of tokens"  # what `{limit}` stands for: a record does not name the option
NOTHING = "-"


def chain(run: Run) -> Table:
    """Show all stages of a run: how they stand, what they come from, and what was measured first of all."""
    table = Table("The stages of the chain", ("stage", "type", "state", "from", "took", "figures"))
    for stage in run.stages.values():
        took = NOTHING if stage.record is None else duration(stage.record.duration)
        table.add(stage.name, stage.type or "not known", state(stage), _lineage(stage), took, headline(stage))
    return table


def state(stage: Stage) -> str:
    """Return the state of a stage with its reason."""
    separator = " " if stage.state == "waiting" else ": "
    return f"{stage.state}{separator}{stage.why}" if stage.why else stage.state


def _lineage(stage: Stage) -> str:
    """Name what a stage takes from which other: `init: sft`; or the other run that all of it is taken from."""
    if stage.record is not None and stage.record.origin is not None:
        return str(stage.record.origin)
    return "\n".join(f"{role.partition('.')[0]}: {parent}" for role, parent in stage.parents.items()) or NOTHING


def headline(stage: Stage) -> str:
    """Return the figures of a stage that people read first."""
    return NOTHING if stage.record is None else results.headline(stage.record) or NOTHING


def data(stage: Stage) -> Table | None:
    """Show what went into a stage: rows that were read and used, and those that were left out, with the reasons."""
    sections = {} if stage.record is None else stage.record.datasets
    if not sections:
        return None
    columns = ("for", "dataset", "split", "rows read", "rows used", "tokens", "left out", "worth a look")
    table = Table(f"What went into {stage.name}", columns)
    for role, section in sections.items():
        used = _count(section.get("rows"))
        if section.get("used", section.get("rows")) != section.get("rows"):
            used = f"{_count(section['used'])} of {used}"
        if _is_streamed(section):
            used = "streamed, not counted"
        table.add(
            role,
            str(section.get("dataset", NOTHING)),
            str(section.get("split", NOTHING)),
            _count(section.get("read")),
            used,
            _count(section.get("tokens")),
            _findings(section.get("dropped"), DROPPED),
            _findings(section.get("noticed"), NOTICED),
        )
    return table


def _is_streamed(section: dict[str, Any]) -> bool:
    """Tell whether a dataset was read while training, so that nobody has counted its rows."""
    return bool(section.get("streamed")) or "rows" not in section


def _count(value: int | None) -> str:
    return NOTHING if value is None else f"{value:,}"


def _findings(counts: dict[str, int] | None, words: dict[str, str]) -> str:
    """Say how many rows have what in common."""
    texts = []
    for kind, size in (counts or {}).items():
        what = words.get(kind, kind.replace("_", " ")).format(limit=LIMIT)
        texts.append(f"{size:,} {what}")
    return "\n".join(texts) or "none"


def settings(stage: Stage) -> Table | None:
    """Show what is on record of a stage: config, seed, sizes, versions."""
    record = stage.record
    if record is None:
        return None
    table = Table(f"Settings of {stage.name}", ("key", "value"))
    for key, value in record.config.items():
        table.add(key, text(value))
    return table


def facts(stage: Stage) -> Table | None:
    """Show when, how long and with what a stage ran."""
    record = stage.record
    if record is None:
        return None
    table = Table(f"How {stage.name} ran", ("what", "value"))
    if record.origin is not None:
        origin = record.origin
        table.add("taken from", f"{origin.stage} of the run {origin.name}, in {origin.path}")
    table.add("started", record.started)
    table.add("took", duration(record.duration))
    table.add("seed", str(record.seed))
    table.add("processes", str(record.world_size))
    if record.parameters:
        table.add("parameters", ", ".join(f"{count(size)} {name}" for name, size in record.parameters.items()))
    if record.resumed_from_step:
        table.add("resumed at step", str(record.resumed_from_step))
    if record.reason:
        table.add("why it ran", record.reason)
    table.add("output", f"{record.output.path} ({record.output.kind})")
    table.add("versions", ", ".join(f"{name} {version}" for name, version in record.versions.items()))
    if record.git_revision:
        table.add("commit of the config's repository", record.git_revision)
    return table


def metrics(stage: Stage) -> Table | None:
    """Show the numbers that a training stage has on record."""
    rows = {key: value for key, value in stage.metrics.items() if isinstance(value, (int, float))}
    if not rows or stage.makes in ("evaluation", "shift report"):
        return None
    table = Table(f"Figures of {stage.name}", ("figure", "value"), right=True)
    for key, value in rows.items():
        table.add(key.replace("_", " "), str(value) if isinstance(value, int) else number(value))
    return table


def text(value: object) -> str:
    """Show a value of a config as YAML has it."""
    if value is None:
        return "null"
    return value if isinstance(value, str) else json.dumps(value)
