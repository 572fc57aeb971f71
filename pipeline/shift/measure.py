"""The report on a reward model's scores: how far they go by the prompt, and what they say within one."""

from collections.abc import Sequence

import numpy as np

from pipeline.shift import variance
from pipeline.shift.calibration import quantiles, wilson
from pipeline.shift.estimate import EstimateJson
from pipeline.shift.report import Comparisons, Extreme, Report, Scored

# Log-odds: a completion one SD better than another is preferred in 52.5 % of comparisons, all but even odds. The gate's
# limit of the SD (config/schema.py) is half of this: what is flat deserves a warning, and what cannot even reach half
# of it stops a run.
FLAT = 0.1
NUM_EXTREMES = 3


def measure(prompts: Sequence[Scored], comparisons: Comparisons | None = None) -> Report:
    """Measure variance components, flat prompts, correlations with length and extremes of the prompts' scores.

    `comparisons` is the `calibration` of the reward model's margins, which becomes part of the report. Figures that the
    data cannot tell are None. The report is plain JSON.

    Raises:
        ValueError: if there are no prompts, or one has no scores, as many lengths or a score that is not finite.
    """
    _check(prompts)
    groups = [np.asarray(prompt["scores"], float) for prompt in prompts]
    counts, means, squares = variance.summaries(groups)
    components: dict[str, EstimateJson | None] = {}
    for name, statistic in variance.COMPONENTS.items():
        components[name] = None
        if variance.identified(name, counts, means, squares):
            # Of means only differences count; less one of them, equal ones are 0 without a rounding error.
            components[name] = variance.bootstrap(statistic, counts, means - means[0], squares).as_json()
    repeated = counts > 1
    spreads = np.sqrt(squares / np.maximum(counts - 1, 1))
    flat = int((spreads[repeated] < FLAT).sum())
    offsets = means - means.mean()
    order = np.argsort(means, kind="stable")
    extremes: list[Extreme] = [
        {"prompt": p["prompt"], "offset": float(offset), "within_sd": float(spread) if several else None}
        for p, offset, spread, several in zip(prompts, offsets, spreads, repeated, strict=True)
    ]
    return {
        "prompts": len(prompts),
        "completions": int(counts.sum()),
        "between_sd": components["between_sd"],
        "within_sd": components["within_sd"],
        "icc": components["icc"],
        "offset_prompt_length": _offset_length(means, np.array([p["tokens"] for p in prompts], float)),
        "flat_prompts": wilson(flat, int(repeated.sum())).as_json() if repeated.any() else None,
        "flat_below": FLAT,
        "length_correlation": _length_correlation(prompts),
        "score_quantiles": quantiles(np.concatenate(groups)),
        "largest": [extremes[i] for i in order[::-1][:NUM_EXTREMES]],
        "smallest": [extremes[i] for i in order[:NUM_EXTREMES]],
        "comparisons": comparisons,
    }


def _check(prompts: Sequence[Scored]) -> None:
    if not prompts:
        raise ValueError("no prompts to measure the reward model on; expected at least one with its scores")
    for number, prompt in enumerate(prompts):
        num_scores = len(prompt["scores"])
        num_lengths = len(prompt["lengths"])
        if not num_scores or num_scores != num_lengths:
            raise ValueError(
                f"prompt {number} has {num_scores} scores and {num_lengths} lengths; expected as many, >= 1"
            )
        if not np.isfinite(prompt["scores"]).all():
            raise ValueError(f"prompt {number} has scores {prompt['scores']}; expected finite numbers")


def _offset_length(means: np.ndarray, tokens: np.ndarray) -> EstimateJson | None:
    if not (np.ptp(means) and np.ptp(tokens)):
        return None
    return variance.bootstrap(variance.pearson, means, tokens).as_json()


def _length_correlation(prompts: Sequence[Scored]) -> EstimateJson | None:
    """Correlate score and length over all completions, each less the mean of its prompt."""
    scores = [variance.deviations(prompt["scores"]) for prompt in prompts]
    lengths = [variance.deviations(prompt["lengths"]) for prompt in prompts]
    products = [(s @ n, s @ s, n @ n) for s, n in zip(scores, lengths, strict=True)]
    sums = np.array(products).T  # (3, prompts)
    if not (sums[1].any() and sums[2].any()):
        return None
    return variance.bootstrap(variance.pooled, *sums).as_json()
