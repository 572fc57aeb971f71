"""The shift report's numbers against hand-computed ones, statsmodels, and draws whose truth is known."""

import copy
import json
import math
import subprocess
import sys
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread
from rich.console import Console
from scipy.stats import binomtest
from statsmodels.formula.api import mixedlm, ols
from statsmodels.stats.anova import anova_lm

from pipeline.records.manifest import Manifest
from pipeline.shift import variance
from pipeline.shift.advice import RULES, advice
from pipeline.shift.calibration import calibration, wilson
from pipeline.shift.measure import measure
from pipeline.shift.plots import draw
from pipeline.show.results import shift_table
from pipeline.show.shift import table

SIZES = {"balanced": (4,), "unbalanced": (1, 2, 4, 6)}
NUM_DRAWS = 200  # of 100, one in twenty would fall short of 93 by chance
SDS = ("between_sd", "within_sd", "icc")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def groups(rng, num, sizes, between=1.0, within=1.0):
    return [rng.normal(rng.normal(0, between), within, rng.choice(sizes)).tolist() for _ in range(num)]


def scored(scores, lengths=None):
    lengths = lengths or [[5 + i % 3 for i in range(len(group))] for group in scores]
    rows = enumerate(zip(scores, lengths, strict=True))
    return [{"prompt": f"[p{i}]", "tokens": 10 + i, "scores": list(s), "lengths": list(n)} for i, (s, n) in rows]


def simulated(num=40, seed=0):
    """Scores that are multiples of 1/1024, as a constant then adds without rounding."""
    rng = np.random.default_rng(seed)
    scores = [np.round(np.array(g) * 1024) / 1024 for g in groups(rng, num, (1, 3, 4, 5))]
    return scored(scores, [rng.integers(3, 60, len(g)).tolist() for g in scores])


def components(data):
    """The statistics that `bootstrap` resamples, of the groups as they are."""
    return {name: float(getattr(variance, name)(*variance.summaries(data))) for name in SDS}


def measured(prompts, margins=None):
    """The report on prompts and on a reward model with these margins."""
    return measure(prompts, calibration(margins) if margins else None)


def certain(value):
    return {"value": value, "low": value, "high": value}


def test_components_by_hand():
    # Means 2 and 6, MSA = 2 * (4 + 4) = 16, MSW = (2 + 2) / 2 = 2; between (16 - 2) / 2 = 7.
    assert components([[1, 3], [5, 7]]) == pytest.approx(
        {"between_sd": math.sqrt(7), "within_sd": math.sqrt(2), "icc": 7 / 9}
    )
    # Sizes 1 and 3, means 0 and 4, grand mean 3: MSA = 9 + 3 = 12, MSW = 8 / 2 = 4, n0 = 4 - 10 / 4 = 1.5.
    found = components([[0], [2, 4, 6]])
    assert (found["between_sd"] ** 2, found["within_sd"] ** 2) == (pytest.approx(8 / 1.5), pytest.approx(4))
    assert components([[1, 5], [2, 4]])["between_sd"] == 0  # clipped


@pytest.mark.parametrize("kind", SIZES)
def test_components_are_those_of_statsmodels(kind):
    data = groups(np.random.default_rng(3), 50, SIZES[kind], between=1.5)
    sizes = np.array([len(group) for group in data])
    frame = pd.DataFrame({"prompt": np.repeat(range(len(data)), sizes), "score": np.concatenate(data)})
    among, within = anova_lm(ols("score ~ C(prompt)", frame).fit())["mean_sq"]
    size = (sizes.sum() - (sizes**2).sum() / sizes.sum()) / (len(data) - 1)
    between = (among - within) / size
    expected = {"between_sd": math.sqrt(between), "within_sd": math.sqrt(within), "icc": between / (between + within)}
    found = components(data)
    for name in SDS:
        assert found[name] == pytest.approx(expected[name], abs=1e-6)
    if kind == "balanced":  # then REML has the same solution
        fitted = mixedlm("score ~ 1", frame, groups="prompt").fit(reml=True)
        assert found["between_sd"] ** 2 == pytest.approx(fitted.cov_re.iloc[0, 0], rel=1e-3)
        assert found["within_sd"] ** 2 == pytest.approx(fitted.scale, rel=1e-3)


@pytest.mark.parametrize("num, between", [(60, 1.0), (100, 0.5)])
@pytest.mark.parametrize("kind", SIZES)
def test_intervals_cover_the_truth(kind, num, between):
    rng, truth = np.random.default_rng(0), {"between_sd": between, "within_sd": 1, "icc": between**2 / (1 + between**2)}
    covered = dict.fromkeys(truth, 0)
    for _ in range(NUM_DRAWS):
        found = variance.summaries(groups(rng, num, SIZES[kind], between))
        for name, value in truth.items():
            interval = variance.bootstrap(getattr(variance, name), *found)
            assert interval.low <= interval.value <= interval.high
            covered[name] += interval.low <= value <= interval.high
    assert min(covered.values()) >= 0.93 * NUM_DRAWS, covered


def test_bootstrap_covers_a_correlation_and_is_fast():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):
        first, noise = rng.normal(size=(2, 60))
        interval = variance.bootstrap(variance.pearson, first, first + noise)
        assert interval.value == pytest.approx(np.corrcoef(first, first + noise)[0, 1])
        covered += interval.low <= math.sqrt(0.5) <= interval.high
    assert covered >= 93
    started = time.perf_counter()
    measured(simulated(300), rng.normal(size=500).tolist())
    assert time.perf_counter() - started < 2


def test_length_correlation_is_within_prompts():
    # Deviations: scores -1, 1, -2, 0, 2; lengths 1, -1, -4, -2, 6. Sxy = -2 + 20, Sxx = 10, Syy = 2 + 56.
    found = measure(scored([[0, 2], [10, 12, 14]], [[3, 1], [5, 7, 15]]))
    assert found["length_correlation"]["value"] == pytest.approx(18 / math.sqrt(10 * 58))
    assert found["flat_prompts"] == wilson(0, 2).as_json()
    assert measure(scored([[0, 2], [1, 1.1]]))["flat_prompts"]["value"] == 0.5


def test_extremes_and_quantiles():
    found = measure(scored([[1, 3], [5, 7], [0], [9, 9]]))
    assert [entry["offset"] for entry in found["largest"]] == pytest.approx([4.75, 1.75, -2.25])
    assert found["smallest"][0] == {"prompt": "[p2]", "offset": -4.25, "within_sd": None}
    assert found["largest"][1]["within_sd"] == pytest.approx(math.sqrt(2))
    assert list(found["score_quantiles"]) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    assert found["score_quantiles"]["0.5"] == 5
    assert (found["prompts"], found["completions"], found["flat_below"]) == (4, 7, 0.1)


def test_a_constant_per_prompt_changes_nothing_within():
    prompts, margins = simulated(), np.random.default_rng(1).normal(size=50).tolist()
    moved = copy.deepcopy(prompts)
    for prompt, constant in zip(moved, np.random.default_rng(2).integers(-99, 99, len(moved)), strict=True):
        prompt["scores"] = [score + constant for score in prompt["scores"]]
    before, after = measured(prompts, margins), measured(moved, margins)
    for figure in ("within_sd", "length_correlation", "flat_prompts", "comparisons"):
        assert before[figure] == after[figure]
    assert after["icc"]["low"] > before["icc"]["high"]


def test_calibration_by_hand():
    # p = 0.75 thrice, chosen twice; p = 0.9 once, chosen; a tie.
    three, nine = math.log(3), math.log(9)
    found = calibration([three, three, -three, nine + 1e-9, 0.0])
    assert found["count"] == 5
    assert found["accuracy"]["value"] == pytest.approx(3.5 / 5)
    assert found["loss"] == pytest.approx(-(2 * math.log(0.75) + math.log(0.25) + math.log(0.9) + math.log(0.5)) / 5)
    tie, middle, sure = found["reliability"]
    assert [(b["low"], b["high"], b["count"]) for b in (tie, middle, sure)] == [
        (0.5, 0.6, 1),
        (0.7, 0.8, 3),
        (0.9, 1, 1),
    ]
    assert (tie["observed"]["value"], middle["predicted"]) == (0.5, pytest.approx(0.75))
    assert middle["observed"] == wilson(2, 3).as_json()
    assert found["ece"] == pytest.approx((0 + 3 * (0.75 - 2 / 3) + 0.1) / 5)
    assert [part["count"] for part in found["accuracy_by_margin"]] == [2, 1, 1, 1]
    assert found["accuracy_by_margin"][-1] == {
        "low": pytest.approx(nine), "high": pytest.approx(nine), "count": 1, "accuracy": wilson(1, 1).as_json()
    }  # fmt: skip


@pytest.mark.parametrize("successes, count", [(0, 5), (7, 9), (5, 5)])
def test_wilson_is_that_of_scipy(successes, count):
    expected = binomtest(successes, count).proportion_ci(method="wilson")
    found = wilson(successes, count)
    assert (found.low, found.high) == (pytest.approx(expected.low), pytest.approx(expected.high))


def test_a_calibrated_model_has_a_small_calibration_error():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 2, 20000)
    labelled = np.where(rng.random(20000) < 1 / (1 + np.exp(-margins)), margins, -margins)
    assert calibration(labelled)["ece"] < 0.015
    assert calibration(3 * labelled)["ece"] > 0.1


@pytest.mark.parametrize(
    "scores, known",
    [
        ([[0.1, 0.1, 0.1]] * 3, {"between_sd": certain(0), "within_sd": certain(0), "icc": None}),
        ([[1.5], [2.0], [4.0]], dict.fromkeys(SDS)),
        (
            [[1, 2]],
            {"between_sd": None, "within_sd": {"value": math.sqrt(0.5), "low": None, "high": None}, "icc": None},
        ),
        ([[0.3]], dict.fromkeys(SDS)),
        ([[0.1] * 3, [0.7] * 3, [0.2] * 3], {"within_sd": certain(0)}),
        ([[1, 2], [3]], {}),
    ],
)
def test_degenerate_scores(scores, known, tmp_path):
    prompts = scored(scores)
    for margins in (None, [], [0.0, 0.0], [2.0]):
        report = measured(prompts, margins)
        stored = json.loads(json.dumps(report, allow_nan=False))
        assert stored == report
        assert {name: report[name] for name in known} == known
        assert (report["comparisons"] is None) == (not margins)
        table(stored, Console(), "reward")
        assert advice(stored)
    draw(report, prompts, tmp_path)


@pytest.mark.parametrize(
    "prompts, margins",
    [
        ([], None),
        (scored([[1, math.nan]]), None),
        (scored([[1, 2]], [[3]]), None),
        (scored([[]]), None),
        (scored([[1, 2]]), [math.inf]),
    ],
)
def test_what_cannot_be_measured_is_refused(prompts, margins):
    with pytest.raises(ValueError, match=r"prompt|margins"):
        measured(prompts, margins)


def made(icc=0.3, **changes):
    """A report on which one of the three rules on the shift says all there is to say."""
    report = {
        "icc": icc if icc is None else certain(icc),
        "within_sd": certain(1.0),
        "flat_prompts": certain(0.0),
        "flat_below": 0.1,
        "length_correlation": certain(0.1),
        "offset_prompt_length": {"value": 0.1, "low": -0.1, "high": 0.3},
        "comparisons": compared(),
    }
    return report | changes


def compared(accuracy=(0.8, 0.7, 0.9), predicted=0.8, ece=0.0):
    interval = dict(zip(("value", "low", "high"), accuracy, strict=True))
    return {"count": 50, "accuracy": interval, "ece": ece, "reliability": [
        {"low": 0.5, "high": 1, "count": 50, "predicted": predicted, "observed": interval}
    ]}  # fmt: skip


REPORTS = {
    "reversed": made(comparisons=compared((0.3, 0.2, 0.4))),
    "chance": made(comparisons=compared((0.6, 0.45, 0.7))),
    "no_signal": made(within_sd={"value": 0.05, "low": 0.04, "high": 0.06}),
    "unmeasured": made(None, within_sd=None, flat_prompts=None, length_correlation=None, comparisons=None),
    "large_shift": made(0.5),
    "some_shift": made(0.2),
    "small_shift": made(0.19),
    "prompt_length": made(offset_prompt_length={"value": -0.4, "low": -0.6, "high": -0.2}),
    "longer": made(length_correlation={"value": 0.9, "low": 0.8, "high": 0.95}),
    "shorter": made(length_correlation={"value": -0.9, "low": -0.95, "high": -0.8}),
    "overconfident": made(comparisons=compared(predicted=0.95, ece=0.15)),
    "underconfident": made(comparisons=compared(predicted=0.6, ece=0.2)),
}


def test_each_rule_of_the_advice_fires():
    assert [rule.name for rule in RULES] == list(REPORTS)
    beside = {"prompt_length", "longer", "shorter", "overconfident", "underconfident"}
    for rule in RULES:
        report = REPORTS[rule.name]
        said = advice(report)
        assert rule.text.split("{")[0] in said
        assert "\n" not in said
        fired = [other.name for other in RULES if other.when(report)]
        assert fired == (["some_shift", rule.name] if rule.name in beside else [rule.name]) or rule.last
        if rule.last:  # nothing else is said
            assert said.startswith(rule.text.split("{")[0]) and "variance" not in said
    assert advice(made(flat_prompts=certain(0.6))).startswith("Within a prompt the scores hardly differ: 60%")
    assert advice(made(1.0)).startswith("100% of the variance")
    assert "confident" not in advice(made(comparisons=compared((0.8, 0.6, 0.97), 0.95, 0.15)))  # not beyond chance


def test_report_survives_json_and_is_shown():
    report = json.loads(json.dumps(measured(simulated(), [1.0, 2.0, -1.0, 3.0] * 20), allow_nan=False))
    console = Console(record=True, width=120)
    table(report, console, "reward")
    shown = console.export_text()
    expected = (
        "reward: 40 held-out prompts",
        "ICC",
        "within-prompt SD",
        "75 %",
        "[p",
        " ".join(advice(report).split()[:9]),
    )
    for text in expected:
        assert text in shown
    banned = "{'torch', 'scipy', 'matplotlib', 'numpy'}"
    code = f"import sys, pipeline.show.shift; assert not {banned} & set(sys.modules), {banned} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_was_not_measured_is_no_number(make_record):
    """Completions of one length have no correlation with it: that is said as in the report, not as nan."""
    report = measure(scored([[1.0, 2.0], [3.0, 5.0], [2.0, 2.5]], [[4, 4]] * 3))
    assert report["length_correlation"] is None
    report["advice"] = advice(report)
    finished = Manifest(name="tiny", stages={"reward-shift": make_record(type="shift", metrics=report)})
    console = Console(record=True, width=160)
    shift_table(finished, console)
    shown = console.export_text()
    assert "score and length -, accuracy -" in shown and "nan" not in shown


def test_pictures(tmp_path):
    prompts, margins = simulated(), [1.0, 2.0, -1.0, 0.1] * 20
    without = draw(measure(prompts), prompts, tmp_path / "new")
    assert [path.name for path in without] == ["offsets.png", "length.png"]
    drawn = draw(measured(prompts, margins), prompts, tmp_path)
    assert [path.name for path in drawn] == ["offsets.png", "length.png", "reliability.png"]
    for path in drawn:
        pixels = imread(path)
        assert pixels.shape[1] == 840 and pixels.std() > 0.05
