"""The tables of a report, as columns and rows of text."""

from collections.abc import Iterable, Sequence
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
        table.add(stage.name, stage.type or "not known", state(stage), _lineage(stage), took, _figures(stage))
    return table


def state(stage: Stage) -> str:
    """Return the state of a stage with its reason."""
    separator = " " if stage.state == "waiting" else ": "
    return f"{stage.state}{separator}{stage.why}" if stage.why else stage.state


def _lineage(stage: Stage) -> str:
    """Name what a stage takes from which other: `init: sft`."""
    return "\n".join(f"{role.partition('.')[0]}: {parent}" for role, parent in stage.parents.items()) or NOTHING


def _figures(stage: Stage) -> str:
    return NOTHING if stage.record is None else results.headline(stage.record) or NOTHING


def data(stage: Stage) -> Table | None:
    """Show what went into a stage: rows that were read and used, and those that were left out, with the reasons."""
    sections = {} if stage.record is None else stage.record.datasets
    if not sections:
        return None
    columns = ("for", "dataset", "split", "rows read", "rows used", "tokens", "left out", "worth a look")
    table = Table(f"What went into {stage.name}", columns)
    for role, section in sections.items():
        used = _count(section.get("used", section.get("rows")))
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
        table.add(key, _text(value))
    return table


def facts(stage: Stage) -> Table | None:
    """Show when, how long and with what a stage ran."""
    record = stage.record
    if record is None:
        return None
    table = Table(f"How {stage.name} ran", ("what", "value"))
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


def _text(value: object) -> str:
    return value if isinstance(value, str) else "null" if value is None else str(value)


# Several runs side by side


def chains_compared(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    """Put the chains of several runs side by side, a column for each."""
    table = Table("The chains side by side", ("stage", *labels))
    for name in _union(run.stages for run in runs):
        cells = []
        for run in runs:
            stage = run.stages.get(name)
            cells.append(NOTHING if stage is None else f"{state(stage)}\n{_figures(stage)}")
        table.add(name, *cells)
    return table


def results_compared(runs: Sequence[Run], labels: Sequence[str]) -> list[Table]:
    """Put the policies of each evaluation side by side, a table for each measure and a column for each run."""
    shown = {"judge_win_rate": "win rate (judge)", "score_win_rate": "win rate (reward model)"}
    shown |= {"judge": "judge", "score": "reward model", "kl": "KL (nats)", "length": "length"}
    tables: list[Table] = []
    evaluations = _union(
        {name: stage for name, stage in run.stages.items() if stage.makes == "evaluation" and stage.record}
        for run in runs
    )
    for evaluation in evaluations:
        stages = [run.stages.get(evaluation) for run in runs]
        policies = _union(stage.metrics.get("policies", {}) for stage in stages if stage is not None)
        for key, label in shown.items():
            table = Table(f"{evaluation}: {label}", ("policy", *labels), right=True)
            for policy in policies:
                values = [_figure(stage, policy, key) for stage in stages]
                if any(value is not None for value in values):
                    table.add(policy, *map(_measure, values))
            if table.rows:
                tables.append(table)
    return tables


def _figure(stage: Stage | None, policy: str, key: str) -> Any:
    """Return a figure of a policy; None where there is none, as the win rate of a baseline against itself."""
    if stage is None or (key.endswith("win_rate") and policy == stage.metrics.get("baseline")):
        return None
    return stage.metrics.get("policies", {}).get(policy, {}).get(key)


def _measure(value: Any) -> str:
    """Show a number or a win rate."""
    if value is None:
        return NOTHING
    return results.win_rate(value) if isinstance(value, list) else number(value)


def settings_compared(runs: Sequence[Run], labels: Sequence[str]) -> Table | None:
    """Show the settings in which stages of the same name differ; None if there is no difference."""
    table = Table("Settings that differ", ("stage and key", *labels))
    for name in _union(run.stages for run in runs):
        records = [run.stages[name].record if name in run.stages else None for run in runs]
        configs = [record.config for record in records if record is not None]
        for key in _union(configs):
            values = [NOTHING if record is None else _text(record.config.get(key, "unset")) for record in records]
            if len({value for value, record in zip(values, records, strict=True) if record is not None}) > 1:
                table.add(f"{name}: {key}", *values)
    return table if table.rows else None


def _union(mappings: Iterable[dict[str, Any]]) -> list[str]:
    """Return the keys of several mappings, each once, in the order in which they come."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
