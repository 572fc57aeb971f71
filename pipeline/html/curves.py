"""Which curves of a stage are drawn, and the few points that are enough to draw them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.html.values import Entry, Stage
from pipeline.rl.healthy_ranges import HEALTHY, measures_of

MOST_POINTS = 240  # of a curve; two for each pixel of its width would be seen as one
Point = tuple[float, float]  # step, value


@dataclass(frozen=True)
class Curve:
    """Name a line of a chart, and its points in the order of their steps."""

    label: str
    points: list[Point]


@dataclass(frozen=True)
class Chart:
    """Show curves of one measure. `marks` are the steps at which the watchdog raised an alarm."""

    title: str
    unit: str
    curves: list[Curve]
    marks: list[float]


@dataclass(frozen=True)
class _Row:
    """Say what a chart shows: the names under which trainers log it, in training and on held-out rows."""

    title: str
    unit: str
    trained: tuple[str, ...]
    held_out: tuple[str, ...] = ()


_ROWS = (
    _Row("loss", "", ("loss",), ("eval_loss",)),
    _Row("token accuracy", "share", ("mean_token_accuracy",), ("eval_mean_token_accuracy",)),
    _Row("accuracy", "share", ("accuracy", "rewards/accuracies"), ("eval_accuracy", "eval_rewards/accuracies")),
    _Row("margin", "log-odds", ("margin", "rewards/margins"), ("eval_margin", "eval_rewards/margins")),
    _Row("score", "", ("objective/raw_scores", "objective/scores", "reward")),
    _Row("policy loss", "", ("loss/policy_avg",)),
    _Row("value loss", "", ("loss/value_avg",)),
    _Row("gradient norm", "", ("grad_norm",)),
    _Row("learning rate", "", ("learning_rate", "lr")),
)
_WATCHED = {one.measure: one.unit for one in HEALTHY}
_FIRST = "score"  # behind it come the measures that the watchdog looks at
_ESTIMATED = ("kl",)  # logged by trainers that the watchdog does not look at


def charts(stage: Stage) -> list[Chart]:
    """Return the charts of a stage, those that people read first at the front."""
    shown: list[Chart] = []
    watched = _watched(stage)
    for row in _ROWS:
        trained = Curve("training", _logged(stage.history, row.trained))
        held_out = Curve("held out", _logged(stage.history, row.held_out))
        if row.title == _FIRST:
            held_out = Curve("held out", _held_out_scores(stage))
        curves = [curve for curve in (trained, held_out) if len(curve.points) > 1]
        if curves:
            shown.append(Chart(row.title, row.unit, curves, []))
        if row.title == _FIRST:
            shown += watched
    return shown


def _watched(stage: Stage) -> list[Chart]:
    """Return the charts of what the watchdog looks at, in its units, with its alarms."""
    points: dict[str, list[Point]] = {}
    for entry in stage.history:
        step = finite(entry.get("step"))
        values = measures_of(stage.type, _numbers(entry)) if stage.type else {}
        if not values:
            values = {name: value for name in _ESTIMATED if (value := finite(entry.get(name))) is not None}
        for measure, value in values.items():
            if step is not None and math.isfinite(value):
                points.setdefault(measure, []).append((step, value))
    alarms = stage.metrics.get("alarms", [])
    result = []
    for measure, values in points.items():
        marks = [float(alarm["update"]) for alarm in alarms if alarm["measure"] == measure]
        title = "KL" if measure == "kl" else measure.replace("_", " ")
        if len(values) > 1:
            result.append(Chart(title, _WATCHED.get(measure, ""), [Curve("training", thin(_ordered(values)))], marks))
    return result


def _logged(history: Sequence[Entry], names: tuple[str, ...]) -> list[Point]:
    """Return what was logged under the first of the names that occurs, thinned."""
    return next((thin(points) for name in names if (points := logged(history, name))), [])


def logged(history: Sequence[Entry], name: str) -> list[Point]:
    """Return all that was logged under a name, one point for each step, in the order of steps."""
    points: list[Point] = []
    for entry in history:
        step = finite(entry.get("step"))
        value = finite(entry.get(name))
        if step is not None and value is not None:
            points.append((step, value))
    return _ordered(points)


def _held_out_scores(stage: Stage) -> list[Point]:
    """Return the mean scores on held-out prompts, of a stage that keeps its best policy by them."""
    points: list[Point] = []
    for entry in stage.metrics.get("held_out_scores", []):
        update = finite(entry.get("update"))
        score = finite(entry.get("score"))
        if update is not None and score is not None:
            points.append((update, score))
    return thin(_ordered(points))


def finite(value: object) -> float | None:
    """Return a finite number; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def _numbers(entry: Entry) -> Mapping[str, float | None]:
    return {name: finite(value) for name, value in entry.items() if value is None or finite(value) is not None}


def _ordered(points: list[Point]) -> list[Point]:
    """Put points in the order of their steps; the last value of a step counts, as after a resume."""
    return sorted(dict(points).items())


def thin(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """Leave out points so that at most `most` remain: both ends stay, and the least and greatest of every part."""
    if len(points) <= most:
        return points
    first, *inner, last = points
    num_parts = (most - 2) // 2
    kept: list[Point] = [first]
    for part in range(num_parts):
        values = inner[part * len(inner) // num_parts : (part + 1) * len(inner) // num_parts]
        extremes = {min(values, key=_value), max(values, key=_value)}
        kept += sorted(extremes)
    return [*kept, last]


def _value(point: Point) -> float:
    return point[1]
