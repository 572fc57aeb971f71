"""The statistics of the shift report and the rules of its advice, a hair on either side of every limit."""

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.shift import variance
from pipeline.shift.advice import advice
from pipeline.shift.calibration import calibration, wilson
from pipeline.shift.measure import measure

E = 1e-6


def interval(low, value, high):
    return {"value": value, "low": low, "high": high}


def report(**changes):
    """A report on which only the rule of a small shift holds, with some figures changed."""
    found = {
        "icc": interval(0.0, 0.1, 0.2),
        "within_sd": interval(0.9, 1.0, 1.1),
        "flat_prompts": interval(0.0, 0.0, 0.1),
        "flat_below": 0.1,
        "length_correlation": interval(0.0, 0.1, 0.2),
        "offset_prompt_length": interval(-0.1, 0.1, 0.3),
        "comparisons": compared(),
    }
    return found | changes


def compared(low=0.7, value=0.8, high=0.9, predicted=0.8, ece=0.0):
    observed = interval(low, value, high)
    bins = [{"low": 0.5, "high": 1, "count": 50, "predicted": predicted, "observed": observed}]
    return {"count": 50, "accuracy": observed, "ece": ece, "reliability": bins}


SMALL, SOME, LARGE = "Only ", "PPO can learn from these scores", "Take it out with `prompt_baseline`"
REVERSED, CHANCE, FLAT = "more often than chance", "cannot be told from chance", "hardly differ"
LONGER, SHORTER, PROMPT = "tracks length", "tracks brevity", "goes by the length of the prompt"
OVER, UNDER = "overconfident", "underconfident"
TEXTS = (SMALL, SOME, LARGE, REVERSED, CHANCE, FLAT, LONGER, SHORTER, PROMPT, OVER, UNDER)
CASES = [
    ({}, [SMALL]),
    ({"icc": interval(0.1, 0.2 - E, 0.9)}, [SMALL]),
    ({"icc": interval(0.1, 0.2, 0.9)}, [SOME]),
    ({"icc": interval(0.1, 0.5 - E, 0.9)}, [SOME]),
    ({"icc": interval(0.1, 0.5, 0.9)}, [LARGE]),
    ({"icc": interval(1.0, 1.0, 1.0)}, [LARGE]),
    # All of the accuracy's interval on one side of a half, or it cannot be told from chance.
    ({"comparisons": compared(0.5 + E, 0.6, 0.7, 0.6)}, [SMALL]),
    ({"comparisons": compared(0.5, 0.6, 0.7)}, [CHANCE]),
    ({"comparisons": compared(0.3, 0.4, 0.5)}, [CHANCE]),
    ({"comparisons": compared(0.3, 0.4, 0.5 - E)}, [REVERSED]),
    ({"comparisons": None}, [SMALL]),
    # No signal: the whole interval of the SD below what is flat, or more than half of the prompts flat.
    ({"within_sd": interval(0.01, 0.02, 0.1)}, [SMALL]),
    ({"within_sd": interval(0.01, 0.02, 0.1 - E)}, [FLAT]),
    ({"flat_prompts": interval(0.4, 0.5, 0.6)}, [SMALL]),
    ({"flat_prompts": interval(0.4, 0.5 + E, 0.6)}, [FLAT]),
    # Length: the whole interval at or beyond 0.8, on one side.
    ({"length_correlation": interval(0.8, 0.9, 0.95)}, [SMALL, LONGER]),
    ({"length_correlation": interval(0.8 - E, 0.9, 0.95)}, [SMALL]),
    ({"length_correlation": interval(-0.95, -0.9, -0.8)}, [SMALL, SHORTER]),
    ({"length_correlation": interval(-0.95, -0.9, -0.8 + E)}, [SMALL]),
    ({"offset_prompt_length": interval(E, 0.4, 0.6)}, [SMALL, PROMPT]),
    ({"offset_prompt_length": interval(-0.6, -0.4, -E)}, [SMALL, PROMPT]),
    ({"offset_prompt_length": interval(0.0, 0.4, 0.6)}, [SMALL]),
    # Calibration: off by more than 0.1 on average, and some bin beyond its interval.
    ({"comparisons": compared(predicted=0.9 + E, ece=0.1 + E)}, [SMALL, OVER]),
    ({"comparisons": compared(predicted=0.9 + E, ece=0.1)}, [SMALL]),
    ({"comparisons": compared(predicted=0.9, ece=0.1 + E)}, [SMALL]),
    ({"comparisons": compared(predicted=0.7 - E, ece=0.1 + E)}, [SMALL, UNDER]),
]


@pytest.mark.parametrize(("changes", "expected"), CASES)
def test_advice_on_either_side_of_each_limit(changes, expected):
    said = advice(report(**changes))
    assert [text for text in TEXTS if text in said] == expected


def scored(scores, lengths=None):
    lengths = lengths or [[1 + i % 2 for i in range(len(group))] for group in scores]
    rows = zip(scores, lengths, strict=True)
    return [
        {"prompt": f"p{i}", "tokens": 10 + i, "scores": list(s), "lengths": list(n)} for i, (s, n) in enumerate(rows)
    ]


def test_flat_is_an_sd_below_a_tenth():
    """Of two scores the SD is their difference by the root of 2; a prompt with one score is neither flat nor not."""
    pair = [[0.0, sd * math.sqrt(2)] for sd in (0.1 - E, 0.1 + E, 0.0, 1.0)]
    found = measure(scored([*pair, [5.0]]))
    assert found["flat_prompts"]["value"] == 2 / 4 and found["flat_below"] == 0.1


def test_components_of_unequal_groups_by_hand():
    """Searle's n0, and no component of the groups' own noise: scores that differ within prompts only have none."""
    groups = [[1.0, 2.0], [4.0, 5.0, 9.0], [3.0]]
    found = measure(scored(groups))
    sizes = np.array([2, 3, 1])
    means = np.array([1.5, 6.0, 3.0])
    within = (0.5 + 14.0) / (6 - 3)
    among = (sizes * (means - 24 / 6) ** 2).sum() / 2
    size = (6 - 14 / 6) / 2
    between = (among - within) / size
    assert found["within_sd"]["value"] == pytest.approx(math.sqrt(within))
    assert found["between_sd"]["value"] == pytest.approx(math.sqrt(between))
    assert found["icc"]["value"] == pytest.approx(between / (between + within))
    assert measure(scored([[0.0, 4.0], [1.0, 3.0], [2.0, 2.5]]))["between_sd"]["value"] == 0


def test_correlations_have_their_signs():
    longer = measure(scored([[0.0, 1.0], [7.0, 9.0]], [[2, 5], [1, 7]]))
    assert longer["length_correlation"]["value"] == pytest.approx((3 / 2 + 6) / math.sqrt((1 / 2 + 2) * (9 / 2 + 18)))
    assert longer["offset_prompt_length"]["value"] == pytest.approx(1)
    shorter = measure(scored([[0.0, -1.0], [-7.0, -9.0]], [[2, 5], [1, 7]]))
    assert shorter["length_correlation"]["value"] == pytest.approx(-longer["length_correlation"]["value"])
    assert shorter["offset_prompt_length"]["value"] == pytest.approx(-1)


def test_bins_of_the_reliability_diagram():
    """Of width 0.1 from a half; the error is the mean distance, so that two bins do not make up for each other."""
    odds = {share: math.log(share / (1 - share)) for share in (0.55, 0.65, 0.75, 0.85, 0.95)}
    found = calibration([odds[0.55], -odds[0.55], odds[0.95], -odds[0.65], 0.0])
    assert [(b["low"], b["high"], b["count"]) for b in found["reliability"]] == [
        (0.5, 0.6, 3),
        (0.6, 0.7, 1),
        (0.9, 1.0, 1),
    ]
    assert [b["observed"]["value"] for b in found["reliability"]] == [0.5, 0, 1]
    predicted = [(0.55 + 0.55 + 0.5) / 3, 0.65, 0.95]
    assert [b["predicted"] for b in found["reliability"]] == pytest.approx(predicted)
    assert found["ece"] == pytest.approx((3 * (predicted[0] - 0.5) + 0.65 + 0.05) / 5)
    quarters = [(part["count"], part["accuracy"]["value"]) for part in found["accuracy_by_margin"]]
    assert quarters == [(2, (0.5 + 1) / 2), (1, 0.0), (1, 0.0), (1, 1.0)]
    assert found["margin_quantiles"]["0.5"] == 0.0
    assert found["margin_quantiles"]["0.05"] == pytest.approx(np.quantile([-odds[0.65], -odds[0.55]], 0.2), abs=1e-9)


def bca(statistic, arrays, level, num_resamples=20_000):
    """Efron's BCa interval of a statistic, written down from the paper; arrays are along prompts."""
    number = len(arrays[0])
    draws = np.random.default_rng(123).integers(number, size=(num_resamples, number))
    resampled = np.sort([statistic(*(array[rows] for array in arrays)) for rows in draws])
    value = statistic(*arrays)
    bias = stats.norm.ppf(((resampled < value).mean() + (resampled <= value).mean()) / 2)
    left_out = np.array([statistic(*(np.delete(array, i) for array in arrays)) for i in range(number)])
    apart = left_out.mean() - left_out
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    ends = []
    for z in stats.norm.ppf([(1 - level) / 2, (1 + level) / 2]):
        share = stats.norm.cdf(bias + (bias + z) / (1 - acceleration * (bias + z)))
        ends.append(np.quantile(resampled, share))
    return ends


@pytest.mark.parametrize(("noise", "tolerance"), [("normal", 0.03), ("exponential", 0.15)])
def test_intervals_of_the_shift_report_are_bca_over_prompts(noise, tolerance):
    """As wide as a t distribution with a degree of freedom for 7 prompts; the two draw other resamples.

    Skewed scores tell BCa from percentiles and from the basic bootstrap, and need more resamples.
    """
    rng = np.random.default_rng(5)
    scores = rng.gamma(2.0, size=(35, 1)) + getattr(rng, noise)(size=(35, 4))
    squares = ((scores - scores.mean(1, keepdims=True)) ** 2).sum(1)
    level = 1 - 2 * stats.norm.cdf(stats.t.ppf(0.025, df=5))
    assert level == pytest.approx(0.9898, abs=1e-4)  # of a normal distribution

    def sd(sums):
        return math.sqrt(sums.sum() / (3 * len(sums)))

    found = variance.bootstrap(variance.within_sd, *variance.summaries(scores.tolist()))
    low, high = bca(sd, [squares], level)
    assert found.value == pytest.approx(sd(squares))
    assert [found.low, found.high] == pytest.approx([low, high], abs=tolerance * (high - low))


def test_wilson_with_halves_is_the_solution_of_its_equation():
    """The shares p at which the one that was seen is 1.96 standard errors off: (seen - p)^2 = z^2 p (1 - p) / n."""
    for successes, count in ((3.5, 5), (0.5, 9), (12, 40), (61.5, 200)):
        z, seen = stats.norm.ppf(0.975), successes / count
        roots = np.roots([1 + z**2 / count, -(2 * seen + z**2 / count), seen**2])
        assert wilson(successes, count) == pytest.approx((seen, min(roots), max(roots)))
