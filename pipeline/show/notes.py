"""What the figures of a result table do not say by themselves, in plain words, by a table of rules."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from pipeline.config.schema import BASE
from pipeline.shift.estimate import LEVEL, Estimate
from pipeline.system.json_object import JsonObject

SAME = 0.5  # of the prompts: above, most of what is compared is the same text
MOSTLY_CUT = 0.5  # of the completions: below, most of what is scored is unfinished
FEW = 20  # prompts: below, the interval of a win rate of 0.9 holds in fewer than 85 of 100 cases, and is said to in 95
POWER = 0.8  # the chance that a number of prompts is to have to tell a difference
MOST_PROMPTS = 100_000  # nobody evaluates on more
# Nats a token: the KL that rounding made between a 135M model in bfloat16 and one whose weights hardly differed. There
# the KL in float32 was below 0.0001. Logits of 16 to 32 are rounded by up to 1/16.
ROUNDING = 0.003
ROUNDED = ("bfloat16", "float16")
CHANCE = 0.5


@dataclass(frozen=True)
class Scale:
    """What the scores of a table can be worth.

    `dtype`: the type of the models that were evaluated. `reward`: the reward model's name, `accuracy`: its accuracy on
    `comparisons` held-out ones; None where it was not measured.
    """

    dtype: str | None = None
    reward: str = ""
    accuracy: Estimate | None = None
    comparisons: int = 0

    @property
    def is_no_judge(self) -> bool:
        """Tell whether the reward model is not better than a coin for certain."""
        return self.accuracy is not None and self.accuracy.low is not None and self.accuracy.low <= CHANCE

    @property
    def is_reversed(self) -> bool:
        """Tell whether the reward model is worse than a coin for certain."""
        return self.accuracy is not None and self.accuracy.high is not None and self.accuracy.high < CHANCE


NOTHING_KNOWN = Scale()


@dataclass(frozen=True)
class Line:
    """A policy in a result table, beside the others.

    `wins`: its win rate against the baseline by `measure`, the judge where there is one. `by_chance`: this is a reward
    model that is not better than a coin for certain. `same`: the prompts on which it says what the baseline says.
    `is_first`: stands for the whole table.
    """

    policy: str
    baseline: str
    prompts: int
    same: int | None
    wins: Estimate | None
    measure: str
    ended: float | None
    length: float
    kl: float | None
    nothing_ends: bool
    is_first: bool
    by_chance: bool
    scale: Scale

    @property
    def is_compared(self) -> bool:
        """Tell whether it is a policy that the evaluation is about."""
        return self.policy not in (BASE, self.baseline)

    @property
    def says_the_same(self) -> bool:
        return self.policy != self.baseline and self.same is not None and self.same >= SAME * self.prompts

    @property
    def is_open(self) -> bool:
        """Tell whether its interval includes a tie, although it says something else."""
        if not self.is_compared or self.wins is None or self.same == self.prompts or self.by_chance:
            return False
        return _includes_tie(self.wins)

    @property
    def is_rounding(self) -> bool:
        """Tell whether its KL is no larger than rounding alone makes it."""
        if self.kl is None or self.policy == self.baseline or self.scale.dtype not in ROUNDED:
            return False
        if self.wins is not None and not self.by_chance and not _includes_tie(self.wins):
            return False  # it has moved
        return self.kl <= ROUNDING * self.length

    @property
    def needed(self) -> float:
        """Return the number of prompts that would separate it from the baseline; infinite for a tie."""
        return math.inf if self.wins is None else needed_prompts(self.wins, self.prompts)


@dataclass(frozen=True)
class Rule:
    """If `when` holds of a line, `text` is said, filled in with the line's figures.

    With `each`, the text is said once for all lines of which `when` holds: what `each` says of them is its `{each}`.
    """

    name: str
    when: Callable[[Line], bool]
    text: str
    each: str = ""


def _includes_tie(wins: Estimate) -> bool:
    """Tell whether the interval of a win rate includes one half."""
    return wins.low is not None and wins.high is not None and wins.low <= 0.5 <= wins.high


def needed_prompts(wins: Estimate, prompts: int) -> float:
    """Return how many prompts tell a win rate from a tie in POWER of all evaluations, if it is as it was measured.

    `wins` was measured on `prompts` prompts. n = ((z(0.975) + z(0.8)) sd / (rate - 0.5))^2, where the SD of a prompt's
    win, tie or loss is that of the interval: half its width is z(0.975) sd / sqrt(prompts). Infinite for a tie. Where
    all prompts were won, or all lost, nothing is known of the SD: there the rate is the middle of the interval.
    """
    if wins.low is None or wins.high is None or wins.value == 0.5:
        return math.inf
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    rate = wins.value
    spread = (wins.high - wins.low) / 2 / z * math.sqrt(max(prompts, 0))
    if rate in (0, 1):
        rate = (wins.low + wins.high) / 2
        spread = math.sqrt(rate * (1 - rate))
    return math.ceil(((z + NormalDist().inv_cdf(POWER)) * spread / (rate - 0.5)) ** 2)


RULES = (
    Rule(
        "few_prompts",
        lambda line: line.is_first and line.prompts < FEW,
        "{prompts} prompts are few: with fewer than 20 the intervals are too narrow, and no figure here is a result. "
        "Raise `num_prompts`, or hold out more prompts (`heldout` of the dataset).",
    ),
    Rule(
        "nothing_ends",
        lambda line: line.is_first and line.nothing_ends,
        "No completion of any policy ends by itself: all were cut off after {length:.0f} tokens, so unfinished texts "
        "were scored. Raise `max_new_tokens`. If that does not help, the model did not learn to stop: look with `rlhf "
        "check-data CONFIG --sample 2` whether each answer ends with eos.",
    ),
    Rule(
        "never_ends",
        lambda line: line.policy != BASE and line.ended == 0 and not line.nothing_ends,
        "No completion of {policy} ends by itself, and those of others do: it does not know when to stop, and "
        "unfinished texts were scored. Let it end in training (a larger `response_length` or `max_completion_length`; "
        "in PPO a larger `missing_eos_penalty`).",
    ),
    Rule(
        "mostly_cut",
        lambda line: line.policy != BASE and line.ended is not None and 0 < line.ended < MOSTLY_CUT,
        "Most completions of these policies were cut off at `max_new_tokens`, and unfinished texts were scored: raise "
        "it. The share that ends by itself: {each}.",
        each="{ended:.0%} of {policy}'s",
    ),
    Rule(
        "chance",
        lambda line: line.is_first and line.by_chance and not line.scale.is_reversed,
        "The win rates by the reward model say nothing: {scale.reward} cannot be told from chance. Its accuracy is "
        "{scale.accuracy} on {scale.comparisons} held-out comparisons. Hold out more comparisons, train it on more or "
        "cleaner ones, or name a `judge`.",
    ),
    Rule(
        "reversed",
        lambda line: line.is_first and line.by_chance and line.scale.is_reversed,
        "The win rates by the reward model say nothing: {scale.reward} is wrong more often than right. Its accuracy is "
        "{scale.accuracy} on {scale.comparisons} held-out comparisons. Look whether chosen and rejected are swapped.",
    ),
    Rule(
        "rounding",
        lambda line: line.is_rounding,
        "The KL of {each} is no larger than rounding in {scale.dtype} can make by itself (0.003 nats a token): it may "
        "be smaller than it says. `model.dtype: float32` would tell.",
        each="{policy}",
    ),
    Rule(
        "same",
        lambda line: line.says_the_same,
        "{policy} and {baseline} give the same completion on {same} of {prompts} prompts: what was trained between "
        "them changed little. More steps or a larger learning rate change more.",
    ),
    Rule(
        "not_separated",
        lambda line: line.is_open and line.needed <= MOST_PROMPTS,
        "{prompts} prompts do not separate {policy} from {baseline} by the {measure} (win rate {wins}). If the "
        "difference is as large as it was here, {needed:.0f} prompts would show it in four of five evaluations.",
    ),
    Rule(
        "no_difference",
        lambda line: line.is_open and line.needed > MOST_PROMPTS,
        "{prompts} prompts do not separate {policy} from {baseline} by the {measure} (win rate {wins}), and show no "
        "difference to look for with more of them. Either may be the better one, by as much as the interval says.",
    ),
)


def notes(
    baseline: str, policies: JsonObject, measures: Sequence[tuple[str, str]], scale: Scale = NOTHING_KNOWN
) -> Iterator[str]:
    """Return what is to say below the table of an evaluation: the texts of the RULES that hold, in order.

    `policies` are the lines of the table by name, `measures` the names and labels of its scores, the first counts.
    """
    lines = list(_lines(baseline, policies, measures, scale))
    for rule in RULES:
        holds = [line for line in lines if rule.when(line)]
        if rule.each and holds:
            each = _listed([_said(rule.each, line) for line in holds])
            yield _said(rule.text, holds[0], each=each)
        elif not rule.each:
            yield from (_said(rule.text, line) for line in holds)


def _listed(words: Sequence[str]) -> str:
    """Write a list as a sentence has it: `a, b and c`."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _said(text: str, line: Line, **more: Any) -> str:
    """Fill in a text with a line's figures."""
    return text.format(**vars(line), needed=line.needed, **more)


def _lines(baseline: str, policies: JsonObject, measures: Sequence[tuple[str, str]], scale: Scale) -> Iterator[Line]:
    nothing_ends = all(summary.get("ended") == 0 for summary in policies.values())
    for number, (name, summary) in enumerate(policies.items()):
        measure, label = measures[0] if measures else ("", "")
        rate = summary.get(f"{measure}_win_rate")
        wins = None if rate is None or None in rate else Estimate(*rate)
        yield Line(
            policy=name,
            baseline=baseline,
            prompts=summary["prompts"],
            same=summary.get("same"),
            wins=wins,
            measure=label,
            ended=summary.get("ended"),
            length=summary.get("length") or math.nan,
            kl=summary.get("kl"),
            nothing_ends=nothing_ends,
            is_first=number == 0,
            by_chance=measure == "score" and scale.is_no_judge,
            scale=scale,
        )
