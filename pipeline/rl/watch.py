"""What an RL stage is watched with: alarms on what it logs, and its score on held-out prompts."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from transformers import TrainerCallback

from pipeline.config.schema import Ppo
from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling, batches, generate, same_random_numbers
from pipeline.rl.watchdog import Watchdog
from pipeline.training.assertions import finite
from pipeline.training.context import StageContext


class BestPolicy(TrainerCallback):
    """Keeps the policy with the highest score on held-out prompts: before training, every `every` updates, at the end.

    `evaluate` returns the mean score, the same on every process, from the same prompts and random numbers each time,
    and leaves the model in the mode it found it in. Looking does not change the training: the random number
    generators go on as if it had not happened. `parameters` are those the policy trains; the copy of the best is kept
    in the CPU's memory. After a resume only policies from the checkpoint on are known.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        evaluate: Callable[[], float],
        every: int,
        say: Callable[[str], None],
    ):
        self.parameters, self.evaluate, self.every, self.say = parameters, evaluate, every, say
        self.history: list[dict[str, float]] = []
        self._best: tuple[int, float] | None = None
        self._copy: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._look(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self.every == 0:
            self._look(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.history[-1]["update"] != state.global_step:
            self._look(state.global_step)

    def _look(self, update: int) -> None:
        if finite(self.parameters.values()):
            with same_random_numbers():
                score = float(self.evaluate())
        else:
            score = math.nan  # nothing can be sampled
        self.history.append({"update": update, "score": score})
        best = self._best is None or not (score <= self._best[1] or math.isnan(score))
        if best:
            self._best = (update, score)
            self._copy = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        self.say(f"held-out score at update {update}: {score:.4g}" + (", the best so far" if best else ""))

    @torch.no_grad()
    def restore(self) -> tuple[int, float]:
        """Copy the best policy back into the parameters, in place; returns its update and score."""
        assert self._best is not None, "training has not begun"
        for name, parameter in self.parameters.items():
            parameter.copy_(self._copy[name])
        return self._best


class Watch:
    """The watchdog of a stage's trainer and, with held-out prompts, the best policy so far."""

    def __init__(self, ctx: StageContext, trainer: Any, parameters: dict[str, nn.Parameter]):
        self._ctx, self._trainer, self._parameters = ctx, trainer, parameters
        stage = ctx.stage
        centred = isinstance(stage, Ppo) and stage.prompt_baseline != "none"
        self._dog = Watchdog(stage.type, stage.on_alarm, self._say, lambda: finite(parameters.values()), centred)
        self._best: BestPolicy | None = None
        trainer.add_callback(self._dog)

    def _say(self, message: str) -> None:
        self._ctx.say(f"{self._ctx.name}: {message}")

    def hold_out(self, prompts: list[Ids], sampling: Sampling, policy: Any, reward: Any) -> None:
        """Score the policy's completions of these prompts as it trains."""
        ctx, state = self._ctx, PartialState()
        prompts = prompts[: ctx.stage.num_eval_prompts]
        mine = list(batches(prompts, sampling.batch_size))[state.process_index :: state.num_processes]

        def evaluate() -> float:
            training = policy.training
            policy.eval()
            drawn = [generate(policy, batch, sampling, ctx.tokenizer) for batch in mine]
            rows = [p + c for batch, ids in zip(mine, drawn, strict=True) for p, c in zip(batch, ids, strict=True)]
            policy.train(training)
            scores = scoring.score(reward, rows, ctx.tokenizer.pad_token_id, sampling.batch_size)
            return float(torch.tensor(gather_object(scores)).mean())

        self._best = BestPolicy(self._parameters, evaluate, ctx.stage.eval_every, self._say)
        self._trainer.add_callback(self._best)

    def finish(self) -> dict[str, Any]:
        """After training: put the best policy back if an alarm ended it. Returns what to record."""
        found: dict[str, Any] = {"alarms": self._dog.alarms}
        if self._best is not None:
            found["held_out_scores"] = self._best.history
        if self._dog.alarms and self._ctx.stage.on_alarm == "stop":
            update, score = self._best.restore()
            self._say(f"stopped; the policy of update {update} is kept, with a held-out score of {score:.4g}")
            found["kept_update"] = update
        return found
