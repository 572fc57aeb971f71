"""Watch an RL stage: raise alarms about what its trainer logs, and end the training with the best policy."""

import math
from collections.abc import Callable, Mapping
from typing import Literal, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.config.schema import Reinforced
from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling, batches, generate
from pipeline.models.loading import Model
from pipeline.rl.best_policy import BestPolicy
from pipeline.rl.healthy_ranges import CENTRED, HEALTHY, NOT_FINITE, WEIGHTS, Range, measures_of
from pipeline.system.json_object import JsonObject
from pipeline.system.processes import share_of
from pipeline.training.assertions import finite
from pipeline.training.context import StageContext


class Stopped(Exception):
    """The watchdog ended PPO at an alarm; the message is the alarm's."""


class Watchdog(TrainerCallback):
    """Look at every log of an RL stage; at an alarm, say so once for each measure, or also end the training.

    `finite` says whether all weights are, the same on every process. `centred` says that PPO has a `prompt_baseline`.
    With `on_alarm` "stop" the training ends after the update. `raises` says how: by `Stopped`, raised out of
    `trainer.train()`, for a trainer that does not look at `control.should_training_stop`.

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
        raises: bool = False,
    ):
        self.stage_type = stage_type
        self.on_alarm = on_alarm
        self.say = say
        self._finite = finite
        self._centred = centred
        self._raises = raises
        self.alarms: list[JsonObject] = []
        self._first: dict[str, float] = {}
        self._since: dict[str, list[int]] = {}  # the updates, in a row, at which a measure was out of its range
        self._stop: str | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        for logs in state.log_history:
            self._look(logs, int(logs["step"]), control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float | None] | None = None,
        **_: object,
    ) -> None:
        self._look(logs or {}, state.global_step, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        # Nothing can be sampled with weights that are not finite, so they are looked at before anything is logged.
        if not self._finite():
            self._compare(WEIGHTS, math.nan, state.global_step, control)
        if self._stop is not None and self._raises:
            raise Stopped(self._stop)

    def _look(self, logs: Mapping[str, float | None], update: int, control: TrainerControl) -> None:
        values = measures_of(self.stage_type, logs)
        for healthy in HEALTHY:
            if healthy.measure in values:
                self._compare(healthy, values[healthy.measure], update, control)

    def _compare(self, healthy: Range, value: float, update: int, control: TrainerControl) -> None:
        if healthy.measure in {alarm["measure"] for alarm in self.alarms}:
            return
        message = self._judge(healthy, value, update)
        if message is None:
            return
        self.say(message)
        if self.on_alarm == "stop":
            control.should_training_stop = True
            self._stop = message

    def _judge(self, healthy: Range, value: float, update: int) -> str | None:
        """Keep count of one value, and return the message if it makes an alarm."""
        name = healthy.measure
        is_finite = math.isfinite(value)
        if is_finite:
            self._first.setdefault(name, value)
        low, high = healthy.limits(self._first.get(name, math.nan))
        if is_finite and (low <= value <= high or update <= healthy.warm_up):
            self._since.pop(name, None)
            return None
        since = self._since.setdefault(name, [])
        since.append(update)
        if is_finite and len(since) < healthy.patience:
            return None
        causes, remedy = self._explanation(healthy, is_finite)
        self.alarms.append(
            {
                "measure": name,
                "value": _or_none(value),
                "low": _or_none(low),
                "high": _or_none(high),
                "update": update,
                "causes": causes,
            }
        )
        finding = f"{name} is {value:.3g} {healthy.unit}".rstrip() + f" at update {update}"
        place = f"out of its healthy range ({_bounds(low, high)}) since update {since[0]}"
        return f"watchdog: {finding}, {place}\n  causes: {causes}\n  remedy: {remedy}"

    def _explanation(self, healthy: Range, is_finite: bool) -> tuple[str, str]:
        """Return the causes and the remedy of an alarm."""
        if not is_finite:
            return NOT_FINITE
        if self._centred and healthy.measure == "explained_variance":
            return CENTRED
        return healthy.causes, healthy.remedy


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _bounds(low: float, high: float) -> str:
    """Say a range in words: `from 0.1 up to 3`, or one of the two, or that any finite number is in it."""
    words = []
    if math.isfinite(low):
        words.append(f"from {low:.3g}")
    if math.isfinite(high):
        words.append(f"up to {high:.3g}")
    return " ".join(words) or "finite"


class Watch:
    """Have a stage's trainer watched and, with held-out prompts, keep the best policy.

    `parameters` are those the policy trains, by name. `centred` and `raises` are those of `Watchdog`.
    """

    def __init__(
        self,
        ctx: StageContext[Reinforced],
        trainer: Trainer,
        parameters: dict[str, nn.Parameter],
        centred: bool = False,
        raises: bool = False,
    ):
        self._ctx = ctx
        self._trainer = trainer
        self._parameters = parameters
        stage = ctx.stage
        self._dog = Watchdog(
            stage.type, stage.on_alarm, self._say, lambda: finite(parameters.values()), centred, raises
        )
        self.best: BestPolicy | None = None
        trainer.add_callback(self._dog)

    def _say(self, message: str) -> None:
        self._ctx.say(f"{self._ctx.name}: {message}")

    def hold_out(self, prompts: list[Ids], sampling: Sampling, policy: Model, reward: nn.Module) -> None:
        """Score the policy's completions of these prompts as it trains."""
        ctx = self._ctx
        all_batches = list(batches(prompts[: ctx.stage.num_eval_prompts], sampling.batch_size))
        own_share = share_of(all_batches)

        def evaluate() -> float:
            was_training = policy.training
            policy.eval()
            rows: list[Ids] = []
            for batch in own_share:
                drawn = generate(policy, batch, sampling, ctx.tokenizer)
                rows += [prompt + ids for prompt, ids in zip(batch, drawn, strict=True)]
            policy.train(was_training)
            scores = scoring.score(reward, rows, cast(int, ctx.tokenizer.pad_token_id), sampling.batch_size)
            return float(torch.tensor(gather_object(scores)).mean())

        self.best = BestPolicy(self._parameters, evaluate, ctx.stage.eval_every, self._say, ctx.trackers.log)
        self._trainer.add_callback(self.best)

    def finish(self) -> JsonObject:
        """After training, put the best policy back if an alarm ended it; return what to record."""
        metrics: JsonObject = {"alarms": self._dog.alarms}
        if self.best is None:
            return metrics
        metrics["held_out_scores"] = self.best.history
        if self._dog.alarms and self._ctx.stage.on_alarm == "stop":
            update, score = self.best.restore()
            self._say(f"stopped; the policy of update {update} is kept, with a held-out score of {score:.4g}")
            metrics["kept_update"] = update
        return metrics
