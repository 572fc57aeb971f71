"""What a shift report means and what to do, in plain words, by a table of rules. Nothing here imports scipy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.shift.report import Bin, Report

CHANCE = 0.5  # accuracy of a coin
MOST_FLAT = 0.5  # with no signal at more prompts than not, most of a batch teaches nothing
# Above, more of the variance PPO sees is arbitrary than is constrained by comparisons.
LARGE_ICC = 0.5
# Below, a per-prompt baseline can remove less than a fifth of the variance, which is not worth its completions.
SMALL_ICC = 0.2
# Then length explains 0.8 squared, two thirds of what the score says within a prompt. A rule only advises; the gate
# stops a run, and its limit is further out (config/schema.py, GateLimits).
LENGTH = 0.8
MISCALIBRATED = 0.1  # a margin that means 80 % holds in 70 or 90 %


@dataclass(frozen=True)
class Rule:
    """If `when` holds of a report, `text` is said, filled in with the report's figures; `last` ends the advice."""

    name: str
    when: Callable[[Report], bool]
    text: str
    last: bool = False


def _accuracy(report: Report, end: Literal["low", "high"]) -> float:
    """Return an end of the accuracy's interval; without comparisons, 1: no rule on the accuracy holds."""
    comparisons = report["comparisons"]
    if not comparisons:
        return 1.0
    accuracy = comparisons["accuracy"][end]
    assert accuracy is not None, "a share always has an interval"
    return accuracy


def _no_signal(report: Report) -> bool:
    """Tell whether the SD within prompts is surely below what is flat, or most prompts are flat."""
    within = report["within_sd"]
    flat = report["flat_prompts"]
    small = within is not None and within["high"] is not None and within["high"] < report["flat_below"]
    return small or (flat is not None and flat["value"] > MOST_FLAT)


def _tracks(report: Report, sign: int) -> bool:
    """Tell whether all of the interval of the correlation with length is at or beyond LENGTH, on the side of `sign`."""
    correlation = report["length_correlation"]
    if correlation is None or correlation["low"] is None or correlation["high"] is None:
        return False
    return min(sign * correlation["low"], sign * correlation["high"]) >= LENGTH


def _by_prompt_length(report: Report) -> bool:
    """Tell whether 0 lies outside the interval of the correlation of offset and prompt length."""
    correlation = report["offset_prompt_length"]
    if correlation is None or correlation["low"] is None or correlation["high"] is None:
        return False
    return correlation["low"] > 0 or correlation["high"] < 0


def _excess(report: Report) -> float:
    """By how much margins promise more than they hold on average; 0 where ECE is small or no bin is clearly off."""
    comparisons = report["comparisons"]
    if not comparisons or comparisons["ece"] <= MISCALIBRATED:
        return 0.0
    bins = comparisons["reliability"]
    if all(_as_promised(b) for b in bins):
        return 0.0
    return sum(b["count"] * (b["predicted"] - b["observed"]["value"]) for b in bins) / comparisons["count"]


def _as_promised(comparisons: Bin) -> bool:
    """Tell whether the share that margins promise lies in the interval of the share that holds."""
    low = comparisons["observed"]["low"]
    high = comparisons["observed"]["high"]
    assert low is not None and high is not None, "a share always has an interval"
    return low <= comparisons["predicted"] <= high


def _shift(report: Report, low: float, high: float) -> bool:
    """Tell whether the ICC is in [low, high); 1 is in [low, 1)."""
    return report["icc"] is not None and (low <= report["icc"]["value"] < high or report["icc"]["value"] == high == 1)


RULES = (
    Rule(
        "reversed",
        lambda report: _accuracy(report, "high") < CHANCE,
        "The reward model prefers the rejected side more often than chance would: {accuracy:.0%} of held-out "
        "comparisons are right. Do not run RL on it; check whether chosen and rejected are swapped.",
        last=True,
    ),
    Rule(
        "chance",
        lambda report: _accuracy(report, "low") <= CHANCE,
        "The reward model cannot be told from chance: {accuracy:.0%} of held-out comparisons are right, and the "
        "interval includes 50 %. Do not run RL on it; collect more or cleaner comparisons, or train it longer.",
        last=True,
    ),
    Rule(
        "no_signal",
        _no_signal,
        "Within a prompt the scores hardly differ: {flat:.0%} of prompts have an SD below {flat_below:g} log-odds, so "
        "RL has next to nothing to learn from, and no baseline changes that. Collect more comparisons, train the "
        "reward model longer, or sample at a higher temperature; DPO on the comparisons you have needs no scores.",
        last=True,
    ),
    Rule(
        "unmeasured",
        lambda report: report["icc"] is None,
        "The prompt shift cannot be told from these scores: that takes at least two prompts, and several "
        "completions of a prompt. Measure again with more of both.",
    ),
    Rule(
        "large_shift",
        lambda report: _shift(report, LARGE_ICC, 1),
        "{icc:.0%} of the variance that PPO would see is between prompts, where no comparison ever constrained the "
        "score. Take it out with `prompt_baseline` in PPO, use RLOO or GRPO, which compare completions of one prompt, "
        "or DPO, where it cancels; or train the reward model with `center_rewards_coefficient`.",
    ),
    Rule(
        "some_shift",
        lambda report: _shift(report, SMALL_ICC, LARGE_ICC),
        "{icc:.0%} of the variance that PPO would see is between prompts, where no comparison ever constrained the "
        "score. PPO can learn from these scores, but is less noisy with `prompt_baseline`; RLOO and GRPO compare "
        "completions of one prompt and are not affected.",
    ),
    Rule(
        "small_shift",
        lambda report: _shift(report, 0, SMALL_ICC),
        "Only {icc:.0%} of the variance is between prompts: most of what PPO sees is a difference between completions "
        "of a prompt, which comparisons constrain. As far as the shift goes, plain PPO will do.",
    ),
    Rule(
        "prompt_length",
        _by_prompt_length,
        "A prompt's mean score goes by the length of the prompt (r = {prompt_length:.2f}), a part of the shift that "
        "says nothing about the completions.",
    ),
    Rule(
        "longer",
        lambda report: _tracks(report, 1),
        "Within a prompt the score tracks length (r = {length:.2f}): a policy trained on it learns to write more. Add "
        "comparisons in which the shorter side is the better one, and watch the length during RL.",
    ),
    Rule(
        "shorter",
        lambda report: _tracks(report, -1),
        "Within a prompt the score tracks brevity (r = {length:.2f}): a policy trained on it learns to write less. Add "
        "comparisons in which the longer side is the better one, and watch the length during RL.",
    ),
    Rule(
        "overconfident",
        lambda report: _excess(report) > 0,
        "Margins are overconfident (calibration error {ece:.2f}): they promise more than held-out labels hold. Train "
        "the reward model for fewer epochs or on more comparisons, and do not trust large scores.",
    ),
    Rule(
        "underconfident",
        lambda report: _excess(report) < 0,
        "Margins are underconfident (calibration error {ece:.2f}): held-out labels agree more often than they promise. "
        "Train the reward model longer, or use a smaller `kl_coef` or `beta`, as scores are too small.",
    ),
)


def advice(report: Report) -> str:
    """Return one paragraph on a report of `pipeline.shift.measure`: the texts of the RULES that hold, in order."""
    return " ".join(sentences(report).values())


def sentences(report: Report) -> dict[str, str]:
    """Return the texts of the RULES that hold of a report, in order, by the names of the rules."""
    figures: dict[str, float | None] = {"flat_below": report["flat_below"]}
    estimates = {
        "icc": report["icc"],
        "flat": report["flat_prompts"],
        "length": report["length_correlation"],
        "prompt_length": report["offset_prompt_length"],
    }
    for name, estimate in estimates.items():
        figures[name] = None if estimate is None else estimate["value"]
    comparisons = report["comparisons"]
    if comparisons:
        figures["accuracy"] = comparisons["accuracy"]["value"]
        figures["ece"] = comparisons["ece"]
    texts: dict[str, str] = {}
    for rule in RULES:
        if rule.when(report):
            texts[rule.name] = rule.text.format(**figures)
            if rule.last:
                break
    return texts
