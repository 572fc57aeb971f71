"""What records may hold as metrics, by the type of their stage, as far as anything reads it again."""

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config.stage_types import STAGE_TYPES

Number = float | None  # the manifest holds NaN as null


class Metrics(BaseModel):
    """Fields that are read; others are free."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Estimate(Metrics):
    """A figure and its 95 % interval, as far as it is known."""

    value: float
    low: Number = None
    high: Number = None


class FirstToken(Metrics):
    special: float
    prompts: int
    likeliest: str


class Bin(Metrics):
    """Comparisons of about the same margin: how many, what they promise, and what holds."""

    count: int
    predicted: float
    observed: Estimate


class Quarter(Metrics):
    accuracy: Estimate


class Comparisons(Metrics):
    """A reward model on held-out comparisons."""

    count: int
    accuracy: Estimate
    loss: Number
    ece: float
    reliability: list[Bin]
    accuracy_by_margin: list[Quarter]


class Trained(Metrics):
    """A training stage's metrics. Those of its headline are numbers too."""

    eval_loss: Number = None
    initial_eval_loss: Number = None
    first_token: FirstToken | None = None
    held_out: Comparisons | None = None


class Policy(Metrics):
    """A policy in the table of an evaluation; a win rate is [rate, low, high]."""

    prompts: int
    kl: Number = None
    length: Number = None
    ended: Number = None
    score: Number = None
    judge: Number = None
    score_win_rate: list[Number] | None = Field(default=None, min_length=3, max_length=3)
    judge_win_rate: list[Number] | None = Field(default=None, min_length=3, max_length=3)


class Evaluated(Metrics):
    baseline: str
    policies: dict[str, Policy]


class Quantiles(Metrics):
    low: float = Field(alias="0.05")
    median: float = Field(alias="0.5")
    high: float = Field(alias="0.95")


class Extreme(Metrics):
    prompt: str
    offset: float
    within_sd: Number


class Shifted(Metrics):
    """The report of a stage of type shift."""

    prompts: int
    completions: int
    between_sd: Estimate | None
    within_sd: Estimate | None
    icc: Estimate | None
    offset_prompt_length: Estimate | None
    flat_prompts: Estimate | None
    flat_below: float
    length_correlation: Estimate | None
    score_quantiles: Quantiles
    largest: list[Extreme]
    smallest: list[Extreme]
    comparisons: Comparisons | None
    advice: str


def check(kind: str, metrics: dict[str, Any]) -> tuple[tuple[Any, ...], str] | None:
    """The place of the first fault in the metrics of a stage of type `kind` and the fault in words, or None."""
    stage_type = STAGE_TYPES[kind]
    models = {"evaluation": Evaluated, "shift report": Shifted}
    try:
        models.get(stage_type.makes, Trained).model_validate(metrics)
    except ValidationError as error:
        first = error.errors()[0]
        return first["loc"], in_words(first)
    for name in stage_type.headline:
        value = metrics.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return (name,), f"expected a number or null, got {shown(value)}"
    if stage_type.makes == "evaluation" and metrics["baseline"] not in metrics["policies"]:
        names = ", ".join(metrics["policies"]) or "none"
        return ("baseline",), f"expected one of the policies ({names}), got {shown(metrics['baseline'])}"
    return None


def in_words(fault: Any) -> str:
    """An error of pydantic: what was expected, and what was seen."""
    if fault["type"] == "missing":
        return "expected this field, got none"
    if fault["type"] == "extra_forbidden":
        return f"expected no such field, got {shown(fault['input'])}"
    words = fault["msg"].replace("Input should be", "expected").replace("Value error, ", "")
    return f"{words}, got {shown(fault['input'])}"


def shown(value: Any) -> str:
    """A value as it stands in the file, its start if it is long."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."
