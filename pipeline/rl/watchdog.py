"""The watchdog during RL: healthy ranges of what the trainers log, and alarms.

Every watched value is the same on all processes, so all of them stop or none: TRL gathers what it logs under the names
below, and whatever logs `completions/...` or `value/explained_variance` for PPO must gather it too.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainerCallback

from pipeline.config.stage_types import STAGE_TYPES


class Stopped(Exception):
    """The watchdog ended PPO at an alarm; the message is the alarm's."""


@dataclass(frozen=True)
class Range:
    """Where a measure is healthy, and what it means when it is not.

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
        scale = first if self.of_first else 1.0
        low, high = (bound * scale if math.isfinite(bound) else bound for bound in (self.low, self.high))
        return low, max(high, self.fine_below)


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
    "lower the learning rate, set `max_grad_norm` (RLOO, GRPO), train in bf16 or fp32 rather than fp16",
)
# Nothing can be sampled with such weights, so they are looked at after every update, before anything is logged.
WEIGHTS = Range("weights", -math.inf, math.inf, 1, *NOT_FINITE)

LENGTH = "completions/mean_length"
# For each type of stage what its trainer's names are, and the power of the mean length (tokens) that converts its unit.
# PPO's own `policy/entropy_avg` is not used: it counts the padding behind each completion too. Its `objective/entropy`
# is summed over the completion. RLOO and GRPO log the KL per token: RLOO's is the mean log ratio, GRPO's the estimator
# k3, which cannot be negative; they log none when `beta` is 0. A clip fraction is of tokens for PPO and GRPO, of
# completions for RLOO. RLOO looks for equal rewards after the KL penalty: with `beta` above 0 it hardly finds any.


MEASURES = {name: row.watched for name, row in STAGE_TYPES.items() if row.watched}


def measures_of(stage_type: str, logs: Mapping[str, Any]) -> dict[str, float]:
    """The watched measures among a trainer's logs, in the units of `HEALTHY`; what needs an absent length is left out.

    RLOO and GRPO log None for a value that was NaN throughout, so None is read as NaN.
    """
    logged = {name: math.nan if value is None else value for name, value in logs.items()}
    found = {}
    for name, (measure, power) in MEASURES[stage_type].items():
        if name in logged and (power == 0 or LENGTH in logged):
            found[measure] = logged[name] * (max(logged[LENGTH], 1.0) ** power if power else 1.0)
    return found


class Watchdog(TrainerCallback):
    """Looks at every log of an RL stage, and at an alarm says so once per measure, or also ends the training.

    With `on_alarm` "stop" RLOO and GRPO end after the update, as `Trainer` does it. PPOTrainer does not look at
    `control.should_training_stop`, so there `Stopped` is raised after the update, out of `trainer.train()`.

    `finite` says whether all weights are, the same on every process; `centred` that PPO has a `prompt_baseline`.

    `alarms` is ready for JSON: an infinite bound and a value that is not finite are None. A resumed run is judged from
    its first update on, by the log in its checkpoint.
    """

    def __init__(
        self,
        stage_type: str,
        on_alarm: Literal["warn", "stop"],
        say: Callable[[str], None],
        finite: Callable[[], bool] = lambda: True,
        centred: bool = False,
    ):
        self.stage_type, self.on_alarm, self.say, self._finite = stage_type, on_alarm, say, finite
        self._centred = centred
        self.alarms: list[dict[str, Any]] = []
        self._first: dict[str, float] = {}
        self._since: dict[str, list[int]] = {}  # the updates, in a row, at which a measure was out of its range
        self._stop: str | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for logs in state.log_history:
            self._look(logs, logs["step"], control)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self._look(logs or {}, state.global_step, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if not self._finite():
            self._compare(WEIGHTS, math.nan, state.global_step, control)
        if self._stop is not None and not STAGE_TYPES[self.stage_type].autocast:
            raise Stopped(self._stop)

    def _look(self, logs: Mapping[str, Any], update: int, control: Any) -> None:
        values = measures_of(self.stage_type, logs)
        for healthy in HEALTHY:
            if healthy.measure in values:
                self._compare(healthy, values[healthy.measure], update, control)

    def _compare(self, healthy: Range, value: float, update: int, control: Any) -> None:
        if healthy.measure in {alarm["measure"] for alarm in self.alarms}:
            return
        message = self._judge(healthy, value, update)
        if message is not None:
            self.say(message)
            if self.on_alarm == "stop":
                control.should_training_stop, self._stop = True, message

    def _judge(self, healthy: Range, value: float, update: int) -> str | None:
        """Keep count of one value, and return the message if it makes an alarm."""
        finite, name = math.isfinite(value), healthy.measure
        if finite:
            self._first.setdefault(name, value)
        low, high = healthy.limits(self._first.get(name, math.nan))
        if finite and (low <= value <= high or update <= healthy.warm_up):
            self._since.pop(name, None)
            return None
        since = self._since.setdefault(name, [])
        since.append(update)
        if finite and len(since) < healthy.patience:
            return None
        causes, remedy = (healthy.causes, healthy.remedy) if finite else NOT_FINITE
        if finite and self._centred and name == "explained_variance":
            causes, remedy = CENTRED
        alarm: dict[str, Any] = {"measure": name, "value": value if finite else None}
        alarm |= {key: bound if math.isfinite(bound) else None for key, bound in (("low", low), ("high", high))}
        self.alarms.append(alarm | {"update": update, "causes": causes})
        bounds = " ".join(f"{word} {b:.3g}" for word, b in (("from", low), ("up to", high)) if math.isfinite(b))
        found = f"{name} is {value:.3g} {healthy.unit}".rstrip() + f" at update {update}"
        place = f"out of its healthy range ({bounds or 'finite'}) since update {since[0]}"
        return f"watchdog: {found}, {place}\n  causes: {causes}\n  remedy: {remedy}"
