"""The report on a reward model's scores: how far they go by the prompt, and what they say within one."""

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from pipeline.shift import variance
from pipeline.shift.calibration import calibration, quantiles, wilson

FLAT = 0.1  # log-odds: a completion one SD better than another is preferred in 52.5 % of comparisons, all but even odds
NUM_EXTREMES = 3


class Scored(TypedDict):
    """A prompt, its length in tokens, and the score (log-odds) and length (tokens) of each of its completions."""

    prompt: str
    tokens: int
    scores: list[float]
    lengths: list[int]


def measure(prompts: Sequence[Scored], margins: Sequence[float] | None = None) -> dict[str, Any]:
    """Variance components, flat prompts, correlations with length, extremes, and the calibration of `margins`.

    Figures with an interval are {"value", "low", "high"}; what the data cannot tell is None. All of it is plain JSON.
    """
    _check(prompts, margins)
    groups = [np.asarray(prompt["scores"], float) for prompt in prompts]
    counts, means, squares = variance.summaries(groups)
    components = {}
    for name in ("between_sd", "within_sd", "icc"):
        known = variance.identified(name, counts, means, squares)
        # Of means only differences count; less one of them, equal ones are 0 without a rounding error.
        found = (counts, means - means[0], squares)
        components[name] = variance.bootstrap(getattr(variance, name), *found) if known else None
    repeated = counts > 1
    spreads = np.sqrt(squares / np.maximum(counts - 1, 1))
    flat = int((spreads[repeated] < FLAT).sum())
    offsets, order = means - means.mean(), np.argsort(means, kind="stable")
    entries = [
        {"prompt": p["prompt"], "offset": float(offset), "within_sd": float(spread) if several else None}
        for p, offset, spread, several in zip(prompts, offsets, spreads, repeated, strict=True)
    ]
    return {
        "prompts": len(prompts),
        "completions": int(counts.sum()),
        **components,
        "offset_prompt_length": _offset_length(means, np.array([p["tokens"] for p in prompts], float)),
        "flat_prompts": wilson(flat, int(repeated.sum())) if repeated.any() else None,
        "flat_below": FLAT,
        "length_correlation": _length_correlation(prompts),
        "score_quantiles": quantiles(np.concatenate(groups)),
        "largest": [entries[i] for i in order[::-1][:NUM_EXTREMES]],
        "smallest": [entries[i] for i in order[:NUM_EXTREMES]],
        "comparisons": calibration(margins) if margins is not None and len(margins) else None,
    }


def _check(prompts: Sequence[Scored], margins: Sequence[float] | None) -> None:
    if not prompts:
        raise ValueError("no prompts to measure the reward model on; expected at least one with its scores")
    for number, prompt in enumerate(prompts):
        num_scores, num_lengths = len(prompt["scores"]), len(prompt["lengths"])
        if not num_scores or num_scores != num_lengths:
            raise ValueError(
                f"prompt {number} has {num_scores} scores and {num_lengths} lengths; expected as many, >= 1"
            )
        if not np.isfinite(prompt["scores"]).all():
            raise ValueError(f"prompt {number} has scores {prompt['scores']}; expected finite numbers")
    if margins is not None and not np.isfinite(margins).all():
        raise ValueError("some margins are not finite numbers: the reward model's scores overflow or are NaN")


def _offset_length(means: np.ndarray, tokens: np.ndarray) -> variance.Estimate | None:
    if not (np.ptp(means) and np.ptp(tokens)):
        return None
    return variance.bootstrap(variance.pearson, means, tokens)


def _length_correlation(prompts: Sequence[Scored]) -> variance.Estimate | None:
    scores, lengths = ([variance.deviations(p[key]) for p in prompts] for key in ("scores", "lengths"))
    products = [(s @ n, s @ s, n @ n) for s, n in zip(scores, lengths, strict=True)]
    sums = np.array(products).T
    return variance.bootstrap(variance.pooled, *sums) if sums[1].any() and sums[2].any() else None
