"""Say where the measures of an RL stage are healthy, and what it means when they are not.

Every watched value is the same on all processes, so all of them stop or none: TRL gathers what it logs under the names
in `STAGE_TYPES`, and whatever logs `completions/...` or `value/explained_variance` for PPO must gather it too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.config.logged_figures import in_our_words
from pipeline.config.stage_types import STAGE_TYPES


@dataclass(frozen=True)
class Range:
    """Say where one measure is healthy, and what it means when it is not.

    `patience` is how many logged updates in a row must be out of the range before it is an alarm; the first `warm_up`
    updates do not count. With `of_first`, `low` and `high` are multiples of the first logged value. Values up to
    `fine_below` are never too high.
    """

    measure: str
    low: float
    high: float
    patience: int
    causes: str
    remedy: str
    unit: str = ""
    of_first: bool = False
    fine_below: float = -math.inf
    warm_up: int = 0

    def limits(self, first: float) -> tuple[float, float]:
        """Return the lowest and the highest healthy value, where `first` was logged first."""
        scale = first if self.of_first else 1.0
        low = _scaled(self.low, scale)
        high = _scaled(self.high, scale)
        return low, max(high, self.fine_below)


def _scaled(bound: float, scale: float) -> float:
    """Return a multiple of a bound; an infinite bound stays, even where `scale` is 0 or NaN."""
    return bound * scale if math.isfinite(bound) else bound


HEALTHY = (
    # A KL divergence is never negative. Its estimate from samples of the policy has a standard deviation of about
    # sqrt(2 KL / completions), so that a mean below -1 in a row is no noise: the samples are not the policy's.
    # At 50 the policy finds its completions e^50 times likelier than the reference does; past some KL people's
    # preference falls while the score still rises (arXiv 2009.01325, figure 5).
    Range(
        "kl",
        -1.0,
        50.0,
        3,
        "below: completions are sampled with other settings (top_k, top_p, temperature) than their log-probabilities "
        "are computed with; above: reward hacking, a `kl_coef` or `beta` too small, a learning rate too high",
        "below: sample from the full distribution; above: raise `kl_coef` or `beta`, lower the learning rate, read the "
        "completions with the highest scores",
        "nats per completion",
    ),
    # What entropy is usual depends on model and data, so the first update sets the scale. RL on a score lowers it;
    # at a tenth completions hardly differ, and there is nothing left to compare. Three times it undoes the SFT.
    Range(
        "entropy",
        0.1,
        3.0,
        5,
        "below: the policy has collapsed onto a few completions; above: it dissolves into noise",
        "lower the learning rate, raise `kl_coef` or `beta`, train for fewer updates",
        "nats per token",
        of_first=True,
    ),
    # Reward models favour length (arXiv 2310.03716), and the usual hack of one is to write three times as much.
    Range(
        "length",
        1 / 3,
        3.0,
        5,
        "the reward model scores length instead of content, or eos is no longer learned",
        "compare score with length in the reward model's comparisons, raise `kl_coef` or `beta`, set "
        "`missing_eos_penalty` (PPO)",
        "tokens",
        of_first=True,
    ),
    # A clipped term has no gradient: above one half, most of each batch no longer trains the policy.
    Range(
        "clip_fraction",
        -math.inf,
        0.5,
        5,
        "steps too large: the policy leaves the clip range within one batch",
        "lower the learning rate, or `num_ppo_epochs` (PPO), `num_iterations` (RLOO, GRPO); enlarge the batch",
        "of the terms",
    ),
    # 0 is a constant's. At -1 the error is twice the variance of the returns, and the advantages are mostly the
    # critic's own noise. Ten updates let it learn its scale first.
    Range(
        "explained_variance",
        -1.0,
        math.inf,
        5,
        "the value model is worse than a constant: it chases the per-prompt shift of the scores, or its learning rate "
        "does not suit it",
        "set `prompt_baseline`, lower the learning rate or `vf_coef`, centre the scores "
        "(`center_rewards_coefficient` of the reward stage)",
        warm_up=10,
    ),
    # The score of a completion that was cut off is one of a fragment. Where completions were cut from the start the
    # length limit is meant, so it is an alarm only when the share has doubled.
    Range(
        "missing_eos",
        -math.inf,
        2.0,
        5,
        "the policy unlearns to end: unended completions score higher, or the length limit is too short",
        "set `missing_eos_penalty` (PPO), raise the length limit, raise `kl_coef` or `beta`",
        "share of completions",
        of_first=True,
        fine_below=0.5,
    ),
    # A group of equal scores has no advantage, so above 0.9 under a tenth of the batch trains the policy.
    Range(
        "frac_reward_zero_std",
        -math.inf,
        0.9,
        5,
        "all completions of a prompt score alike: a policy that has collapsed, prompts too easy or too hard, or a "
        "reward function with few values",
        "raise `temperature` or `num_generations`, choose other prompts, use a finer reward",
        "share of groups",
    ),
)

# Causes and remedy of a low explained variance where a `prompt_baseline` has taken the shift out of the scores.
CENTRED = (
    "the value model is worse than a constant: its learning rate does not suit it, or a few completions score far off "
    "the others",
    "lower the learning rate or `vf_coef`, enlarge the batch, read the completions with the lowest and highest scores",
)
# Causes and remedy of a value that is NaN or infinite, whatever the measure.
NOT_FINITE = (
    "training diverged: a learning rate too high, or numbers too large for the precision",
    "lower the learning rate, set `max_grad_norm`, train in bf16 or fp32 rather than fp16",
)
# Nothing can be sampled with such weights, so they are looked at after every update, before anything is logged.
WEIGHTS = Range("weights", -math.inf, math.inf, 1, *NOT_FINITE)


def measures_of(stage_type: str, logs: Mapping[str, float | None]) -> dict[str, float]:
    """Return the watched measures among a trainer's logs, in the units of `HEALTHY`.

    The column `watched` of the stage types gives each name of a trainer the measure, and the power of the mean length
    (tokens) that converts its unit.

    PPOTrainer's own `policy/entropy_avg` is not used: it counts the padding behind each completion too. Its
    `objective/entropy` is summed over the completion. RLOO and GRPO log the KL per token: RLOO's is the mean log ratio,
    GRPO's the estimator k3, which cannot be negative; they log no KL when `beta` is 0. A clip fraction is of tokens for
    PPO and GRPO, of completions for RLOO. RLOO looks for equal rewards after the KL penalty: with `beta` above 0 it
    hardly finds any.
    """
    return in_our_words(STAGE_TYPES[stage_type].watched, logs)
