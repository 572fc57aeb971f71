"""Name the fields of a shift report. A report is plain JSON: the stage writes it, the manifest and the tables read it.

`EstimateJson | None` is a figure with its interval, None where the data cannot tell it.
"""

from typing import NotRequired, TypedDict

from pipeline.shift.estimate import EstimateJson


class Scored(TypedDict):
    """A prompt, its length in tokens, and the score (log-odds) and length (tokens) of each of its completions."""

    prompt: str
    tokens: int
    scores: list[float]
    lengths: list[int]


class Bin(TypedDict):
    """Comparisons whose preferred side is promised a share in [low, high): the mean promise, and what holds."""

    low: float
    high: float
    count: int
    predicted: float
    observed: EstimateJson


class Quarter(TypedDict):
    """A quarter of the comparisons, those with |margin| in [low, high], in log-odds."""

    low: float
    high: float
    count: int
    accuracy: EstimateJson


class Comparisons(TypedDict):
    """A reward model on held-out comparisons; `pipeline.shift.calibration` says how each figure is computed."""

    count: int
    accuracy: EstimateJson
    loss: float | None  # nats; the manifest holds NaN as null
    margin_quantiles: dict[str, float]
    ece: float
    reliability: list[Bin]
    accuracy_by_margin: list[Quarter]


class Extreme(TypedDict):
    """A prompt whose mean score lies far from the mean of all prompts; `offset` is the distance in log-odds."""

    prompt: str
    offset: float
    within_sd: float | None


class Report(TypedDict):
    """A reward model's scores of several completions of each prompt; scores are log-odds."""

    prompts: int
    completions: int
    between_sd: EstimateJson | None
    within_sd: EstimateJson | None
    icc: EstimateJson | None
    offset_prompt_length: EstimateJson | None
    flat_prompts: EstimateJson | None
    flat_below: float
    length_correlation: EstimateJson | None
    score_quantiles: dict[str, float]
    largest: list[Extreme]
    smallest: list[Extreme]
    comparisons: Comparisons | None
    advice: NotRequired[str]
