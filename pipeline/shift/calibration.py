"""Whether a reward model's margins mean what Bradley-Terry says: odds that the preferred side was the chosen one."""

from collections.abc import Sequence

import numpy as np
from scipy import special, stats

from pipeline.shift.estimate import LEVEL, Estimate
from pipeline.shift.report import Bin, Comparisons, Quarter

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NUM_BINS = 5  # few enough for some 20 comparisons in each at the common 100
NUM_GROUPS = 4


def wilson(successes: float, count: int) -> Estimate:
    """Return a share with its 95 % Wilson interval; successes may be halves, as ties are. Source: Wilson (1927)."""
    share = successes / count
    squared = stats.norm.isf((1 - LEVEL) / 2) ** 2 / count
    centre = (share + squared / 2) / (1 + squared)
    half = np.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    # At the ends rounding would leave the share itself outside.
    low = min(share, max(0, centre - half))
    high = max(share, min(1, centre + half))
    return Estimate(float(share), float(low), float(high))


def quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Return the QUANTILES of values, by name."""
    return {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def calibration(margins: Sequence[float] | np.ndarray) -> Comparisons:
    """Compare margins (comparisons,) in log-odds, one or more, with the labels.

    `accuracy` is the share of comparisons whose chosen side scores higher, a tie counting half; `loss` is
    -log sigma(margin) in nats. `reliability` holds p = sigma(|margin|), in bins of equal width on [0.5, 1], against the
    share in which the preferred side was the chosen one; bins without a comparison are left out. `ece` is the mean
    distance of the two, weighted by comparisons (Naeini et al. 2015). `accuracy_by_margin` is that of the quarters of
    the comparisons by |margin|.

    Raises:
        ValueError: if a margin is not a finite number.
    """
    margins = np.asarray(margins, float)
    if not np.isfinite(margins).all():
        raise ValueError("some margins are not finite numbers: the reward model's scores overflow or are NaN")
    wins = (np.sign(margins) + 1) / 2
    size = np.abs(margins)
    reliability = _reliability(size, wins)
    return {
        "count": len(margins),
        "accuracy": wilson(wins.sum(), len(margins)).as_json(),
        "loss": float(np.logaddexp(0, -margins).mean()),
        "margin_quantiles": quantiles(margins),
        "ece": sum(b["count"] * abs(b["predicted"] - b["observed"]["value"]) for b in reliability) / len(margins),
        "reliability": reliability,
        "accuracy_by_margin": _quarters(size, wins),
    }


def _reliability(size: np.ndarray, wins: np.ndarray) -> list[Bin]:
    """Put comparisons into bins by the share that |margin| promises; `size` and `wins` have shape (comparisons,)."""
    predicted = special.expit(size)
    bins = np.minimum(((predicted - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    reliability: list[Bin] = []
    for index in np.unique(bins):
        inside = bins == index
        reliability.append(
            {
                "low": round(float(0.5 + 0.5 * index / NUM_BINS), 6),
                "high": round(float(0.5 + 0.5 * (index + 1) / NUM_BINS), 6),
                "count": int(inside.sum()),
                "predicted": float(predicted[inside].mean()),
                "observed": wilson(wins[inside].sum(), inside.sum()).as_json(),
            }
        )
    return reliability


def _quarters(size: np.ndarray, wins: np.ndarray) -> list[Quarter]:
    """Return the accuracy of each quarter of the comparisons, from the smallest |margin| to the largest."""
    groups = np.array_split(np.argsort(size, kind="stable"), NUM_GROUPS)
    return [
        {
            "low": float(size[group].min()),
            "high": float(size[group].max()),
            "count": len(group),
            "accuracy": wilson(wins[group].sum(), len(group)).as_json(),
        }
        for group in groups
        if len(group)
    ]
