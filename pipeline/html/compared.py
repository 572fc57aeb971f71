"""The tables of a report that compares several runs: a column for each run."""

from collections.abc import Iterable, Sequence
from typing import Any

from pipeline.html import tables
from pipeline.html.values import Run, Stage
from pipeline.show import results
from pipeline.show.screen import Table
from pipeline.show.tables import number


def chains(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    """Put the chains of several runs side by side, a column for each."""
    table = Table("The chains side by side", ("stage", *labels))
    for name in _union(run.stages for run in runs):
        cells = []
        for run in runs:
            stage = run.stages.get(name)
            cells.append(tables.NOTHING if stage is None else f"{tables.state(stage)}\n{tables.headline(stage)}")
        table.add(name, *cells)
    return table


def evaluations(runs: Sequence[Run], labels: Sequence[str]) -> list[Table]:
    """Put the policies of each evaluation side by side, a table for each measure and a column for each run."""
    shown = {"judge_win_rate": "win rate (judge)", "score_win_rate": "win rate (reward model)"}
    shown |= {"judge": "judge", "score": "reward model", "kl": "KL (nats)", "length": "length"}
    compared: list[Table] = []
    for evaluation in _union({stage.name: stage for stage in run.finished("evaluation")} for run in runs):
        stages = [run.stages.get(evaluation) for run in runs]
        policies = _union(stage.metrics.get("policies", {}) for stage in stages if stage is not None)
        for key, label in shown.items():
            table = Table(f"{evaluation}: {label}", ("policy", *labels), right=True)
            for policy in policies:
                values = [_figure(stage, policy, key) for stage in stages]
                if any(value is not None for value in values):
                    table.add(policy, *map(_measure, values))
            if table.rows:
                compared.append(table)
    return compared


def _figure(stage: Stage | None, policy: str, key: str) -> Any:
    """Return a figure of a policy; None where there is none, as the win rate of a baseline against itself."""
    if stage is None or (key.endswith("win_rate") and policy == stage.metrics.get("baseline")):
        return None
    return stage.metrics.get("policies", {}).get(policy, {}).get(key)


def _measure(value: Any) -> str:
    """Show a number or a win rate."""
    if value is None:
        return tables.NOTHING
    return results.win_rate(value) if isinstance(value, list) else number(value)


def settings(runs: Sequence[Run], labels: Sequence[str]) -> Table | None:
    """Show the settings in which stages of the same name differ; None if there is no difference."""
    table = Table("Settings that differ", ("stage and key", *labels))
    for name in _union(run.stages for run in runs):
        records = [run.stages[name].record if name in run.stages else None for run in runs]
        configs = [record.config for record in records if record is not None]
        for key in _union(configs):
            values = [
                tables.NOTHING if record is None else tables.text(record.config.get(key, "unset")) for record in records
            ]
            if len({value for value, record in zip(values, records, strict=True) if record is not None}) > 1:
                table.add(f"{name}: {key}", *values)
    return table if table.rows else None


def _union(mappings: Iterable[dict[str, Any]]) -> list[str]:
    """Return the keys of several mappings, each once, in the order in which they come."""
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
