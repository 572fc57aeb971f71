"""Read the numbers out of the metrics of a stage, each by one name."""

from collections.abc import Mapping

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.shift.estimate import Estimate, EstimateJson
from pipeline.system.json_object import JsonObject

Figures = dict[str, float]
WIN_RATES = ("score_win_rate", "judge_win_rate")  # in an evaluation: lists of value, low and high
_VALUE = "value"
_ESTIMATE = EstimateJson.__annotations__.keys()


def figures_of(values: Mapping[str, object]) -> Figures:
    """Return the numbers of nested values by their path, `held_out/loss`; what is no number is left out.

    An estimate gives its value under its own name, and the ends of its interval below it: `icc`, `icc/low`, `icc/high`.
    A list is no interval, whatever its length.
    """
    figures: Figures = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            is_estimate = value.keys() == _ESTIMATE
            for key, number in figures_of(value).items():
                figures[name if is_estimate and key == _VALUE else f"{name}/{key}"] = number
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            figures[name] = float(value)
    return figures


def figures_of_record(stage_type: str, metrics: JsonObject) -> Figures:
    """Return the numbers of the metrics that a stage of this type has on record."""
    if STAGE_TYPES[stage_type].makes != "evaluation":
        return figures_of(metrics)
    return figures_of({policy: line_of(line) for policy, line in metrics["policies"].items()})


def line_of(policy: JsonObject) -> JsonObject:
    """Return a policy's line of an evaluation's table with its win rates as estimates."""
    return policy | {name: Estimate(*policy[name]).as_json() for name in WIN_RATES if name in policy}
