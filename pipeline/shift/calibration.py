"""Whether a reward model's margins mean what Bradley-Terry says: odds that the preferred side was the chosen one."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special, stats

from pipeline.shift.variance import LEVEL, Estimate

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NUM_BINS = 5  # few enough for some 20 comparisons in each at the common 100
NUM_GROUPS = 4


def wilson(successes: float, count: int) -> Estimate:
    """A share with its 95 % Wilson interval; successes may be halves, as ties are. Source: Wilson (1927)."""
    share, squared = successes / count, stats.norm.isf((1 - LEVEL) / 2) ** 2 / count
    centre = (share + squared / 2) / (1 + squared)
    half = np.sqrt(squared * (share * (1 - share) + squared / 4)) / (1 + squared)
    # At the ends rounding would leave the share itself outside.
    low, high = min(share, max(0, centre - half)), max(share, min(1, centre + half))
    return {"value": float(share), "low": float(low), "high": float(high)}


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """The QUANTILES of values, by name."""
    return {str(q): float(value) for q, value in zip(QUANTILES, np.quantile(values, QUANTILES), strict=True)}


def calibration(margins: Sequence[float]) -> dict[str, Any]:
    """How margins (comparisons,) in log-odds hold against the labels.

    `accuracy` is the share of comparisons whose chosen side scores higher, a tie counting half; `loss` is
    -log sigma(margin) in nats. `reliability` holds p = sigma(|margin|), in bins of equal width on [0.5, 1], against the
    share in which the preferred side was the chosen one; bins without a comparison are left out. `ece` is the mean
    distance of the two, weighted by comparisons (Naeini et al. 2015). `accuracy_by_margin` is that of the quarters of
    the comparisons by |margin|.
    """
    margins = np.asarray(margins, float)
    wins, size = (np.sign(margins) + 1) / 2, np.abs(margins)
    predicted = special.expit(size)
    bins = np.minimum(((predicted - 0.5) * 2 * NUM_BINS).astype(int), NUM_BINS - 1)
    reliability = []
    for index in np.unique(bins):
        inside = bins == index
        low, high = (0.5 + 0.5 * (index + step) / NUM_BINS for step in (0, 1))
        reliability.append(
            {
                "low": round(float(low), 6),
                "high": round(float(high), 6),
                "count": int(inside.sum()),
                "predicted": float(predicted[inside].mean()),
                "observed": wilson(wins[inside].sum(), inside.sum()),
            }
        )
    groups = [group for group in np.array_split(np.argsort(size, kind="stable"), NUM_GROUPS) if len(group)]
    return {
        "count": len(margins),
        "accuracy": wilson(wins.sum(), len(margins)),
        "loss": float(np.logaddexp(0, -margins).mean()),
        "margin_quantiles": quantiles(margins),
        "ece": sum(b["count"] * abs(b["predicted"] - b["observed"]["value"]) for b in reliability) / len(margins),
        "reliability": reliability,
        "accuracy_by_margin": [
            {
                "low": float(size[group].min()),
                "high": float(size[group].max()),
                "count": len(group),
                "accuracy": wilson(wins[group].sum(), len(group)),
            }
            for group in groups
        ],
    }
