"""What a shift report means and what to do, in plain words, by a table of rules. Nothing here imports scipy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

CHANCE = 0.5  # accuracy of a coin
MOST_FLAT = 0.5  # with no signal at more prompts than not, most of a batch teaches nothing
# Above, more of the variance PPO sees is arbitrary than is constrained by comparisons.
LARGE_ICC = 0.5
# Below, a per-prompt baseline can remove less than a fifth of the variance, which is not worth its completions.
SMALL_ICC = 0.2
LENGTH = 0.8  # then length explains 0.8 squared, two thirds of what the score says within a prompt
MISCALIBRATED = 0.1  # a margin that means 80 % holds in 70 or 90 %


@dataclass(frozen=True)
class Rule:
    """If `when` holds of a report, `text` is said, filled in with the report's figures; `last` ends the advice."""

    name: str
    when: Callable[[dict[str, Any]], bool]
    text: str
    last: bool = False


def _accuracy(report: dict[str, Any], end: str) -> float:
    """Of a report without comparisons: certain."""
    return report["comparisons"]["accuracy"][end] if report["comparisons"] else 1.0


def _no_signal(report: dict[str, Any]) -> bool:
    within, flat = report["within_sd"], report["flat_prompts"]
    small = within is not None and within["high"] is not None and within["high"] < report["flat_below"]
    return small or (flat is not None and flat["value"] > MOST_FLAT)


def _tracks(report: dict[str, Any], sign: int) -> bool:
    found = report["length_correlation"]
    return found is not None and found["low"] is not None and min(sign * found["low"], sign * found["high"]) >= LENGTH


def _by_prompt_length(report: dict[str, Any]) -> bool:
    found = report["offset_prompt_length"]
    return found is not None and found["low"] is not None and (found["low"] > 0 or found["high"] < 0)


def _excess(report: dict[str, Any]) -> float:
    """By how much margins promise more than they hold on average; 0 where ECE is small or no bin is clearly off."""
    found = report["comparisons"]
    if not found or found["ece"] <= MISCALIBRATED:
        return 0.0
    bins = found["reliability"]
    if all(b["observed"]["low"] <= b["predicted"] <= b["observed"]["high"] for b in bins):
        return 0.0
    return sum(b["count"] * (b["predicted"] - b["observed"]["value"]) for b in bins) / found["count"]


def _shift(report: dict[str, Any], low: float, high: float) -> bool:
    """Whether the ICC is in [low, high); 1 is in [low, 1)."""
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


def advice(report: dict[str, Any]) -> str:
    """One paragraph on a report of `pipeline.shift.measure`: the texts of the RULES that hold, in their order."""
    found, figures = report["comparisons"], {"flat_below": report["flat_below"]}
    named = {"icc": "icc", "flat": "flat_prompts", "length": "length_correlation"}
    for name, key in (named | {"prompt_length": "offset_prompt_length"}).items():
        figures[name] = report[key] and report[key]["value"]
    if found:
        figures |= {"accuracy": found["accuracy"]["value"], "ece": found["ece"]}
    said = []
    for rule in RULES:
        if rule.when(report):
            said.append(rule.text.format(**figures))
            if rule.last:
                break
    return " ".join(said)
