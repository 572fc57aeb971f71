"""Check the metrics of records, by the type of their stage, as far as anything reads them again."""

import json

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.system.json_object import JsonObject

Number = float | None  # the manifest holds NaN as null
Fault = tuple[tuple[str | int, ...], str]  # the place of a value and what is wrong with it
LONGEST = 60  # characters of a value in a message


class Metrics(BaseModel):
    """Check the fields that are read again; others are free."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)


class Estimate(Metrics):
    """Hold a figure and its 95 % interval, as far as it is known."""

    value: float
    low: Number = None
    high: Number = None


class FirstToken(Metrics):
    """Hold the share of prompts whose likeliest first token is special, and the token that is likeliest most often."""

    special: float
    prompts: int
    likeliest: str


class Bin(Metrics):
    """Hold comparisons of about the same margin: how many, the share that should be right, and the share that is."""

    count: int
    predicted: float
    observed: Estimate


class Quarter(Metrics):
    """Hold the accuracy on a quarter of the comparisons, by their margin."""

    accuracy: Estimate


class Comparisons(Metrics):
    """Hold the figures of a reward model on held-out comparisons."""

    count: int
    accuracy: Estimate
    loss: Number
    ece: float
    reliability: list[Bin]
    accuracy_by_margin: list[Quarter]


class Trained(Metrics):
    """Hold a training stage's metrics. Those of its headline are numbers too."""

    eval_loss: Number = None
    initial_eval_loss: Number = None
    first_token: FirstToken | None = None
    held_out: Comparisons | None = None


class Policy(Metrics):
    """Hold a policy's line in the table of an evaluation; a win rate is [rate, low, high]."""

    prompts: int
    kl: Number = None
    length: Number = None
    ended: Number = None
    same: int | None = None
    score: Number = None
    judge: Number = None
    score_win_rate: list[Number] | None = Field(default=None, min_length=3, max_length=3)
    judge_win_rate: list[Number] | None = Field(default=None, min_length=3, max_length=3)


class Evaluated(Metrics):
    """Hold the table of an evaluation."""

    baseline: str
    policies: dict[str, Policy]


class Quantiles(Metrics):
    """Hold quantiles of scores."""

    low: float = Field(alias="0.05")
    median: float = Field(alias="0.5")
    high: float = Field(alias="0.95")


class Extreme(Metrics):
    """Hold a prompt with one of the largest or smallest offsets."""

    prompt: str
    offset: float
    within_sd: Number


class Shifted(Metrics):
    """Hold the report of a stage of type shift."""

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


def check(kind: str, metrics: JsonObject) -> Fault | None:
    """Find the first fault in the metrics of a stage of type `kind`; None if there is no fault."""
    stage_type = STAGE_TYPES[kind]
    models = {"evaluation": Evaluated, "shift report": Shifted}
    try:
        models.get(stage_type.makes, Trained).model_validate(metrics)
    except ValidationError as error:
        return first_fault(error)
    for name in stage_type.headline:
        value = metrics.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            return (name,), f"expected a number or null, got {as_json(value)}"
    if stage_type.makes == "evaluation" and metrics["baseline"] not in metrics["policies"]:
        names = ", ".join(metrics["policies"]) or "none"
        return ("baseline",), f"expected one of the policies ({names}), got {as_json(metrics['baseline'])}"
    return None


def first_fault(error: ValidationError) -> Fault:
    """Return the place of the first of pydantic's errors, and what was expected and what was seen there."""
    fault = error.errors()[0]
    loc = fault["loc"]
    if fault["type"] == "missing":
        return loc, "expected this field, got none"
    if fault["type"] == "extra_forbidden":
        return loc, f"expected no such field, got {as_json(fault['input'])}"
    expected = fault["msg"].replace("Input should be", "expected").replace("Value error, ", "")
    return loc, f"{expected}, got {as_json(fault['input'])}"


def as_json(value: object) -> str:
    """Return a value as it stands in the file; of a long one the beginning."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST - 3]}..."
