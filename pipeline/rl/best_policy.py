"""Keep the best policy that an RL stage passes through, judged by its score on held-out prompts."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.models.generation import same_random_numbers
from pipeline.training.assertions import finite


class BestPolicy(TrainerCallback):
    """Look at the policy before training, every `every` updates and at the end, and keep a copy of the best one.

    `evaluate` returns the mean score, the same on every process, from the same prompts and random numbers each time,
    and leaves the model in the mode it found it in. Looking does not change the training: the random number
    generators go on as if it had not happened. `parameters` are those the policy trains; the copy of the best is kept
    in the CPU's memory. After a resume only policies from the checkpoint on are known, unless `load_state_dict` was
    called: then `history` and the best go on as they were. `report` is told each score, with its update.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        evaluate: Callable[[], float],
        every: int,
        say: Callable[[str], None],
        report: Callable[[dict[str, float], int], None] = lambda figures, update: None,
    ):
        self.parameters = parameters
        self.evaluate = evaluate
        self.every = every
        self.say = say
        self._report = report
        self.history: list[dict[str, float]] = []
        self._best: tuple[int, float] | None = None
        self._copy: dict[str, torch.Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if not self.history:  # where they were forgotten at a checkpoint, its score is reported already
            self._look(state.global_step, is_reported=state.global_step > 0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step % self.every == 0:
            self._look(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.history[-1]["update"] != state.global_step:
            self._look(state.global_step)

    def _look(self, update: int, is_reported: bool = False) -> None:
        if finite(self.parameters.values()):
            with same_random_numbers():
                score = float(self.evaluate())
        else:
            score = math.nan  # nothing can be sampled
        self.history.append({"update": update, "score": score})
        is_best = self._best is None or not (score <= self._best[1] or math.isnan(score))
        if is_best:
            self._best = (update, score)
            self._copy = {name: p.detach().to("cpu", copy=True) for name, p in self.parameters.items()}
        self.say(f"held-out score at update {update}: {score:.4g}" + (", the best so far" if is_best else ""))
        if not is_reported:
            self._report({"eval/score": score}, update)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: the scores so far, and the best policy."""
        return {"history": self.history, "best": self._best, "copy": self._copy}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.history = state["history"]
        self._best = state["best"]
        self._copy = state["copy"]

    @torch.no_grad()
    def restore(self) -> tuple[int, float]:
        """Copy the best policy back into the parameters, in place; return its update and score."""
        assert self._best is not None, "training has not begun"
        for name, parameter in self.parameters.items():
            parameter.copy_(self._copy[name])
        return self._best


def keep_best(trainer: Trainer, best: BestPolicy | None, checkpoint: Path | None) -> None:
    """Let the trainer's checkpoints hold the best policy too, and go on from the one in `checkpoint`."""
    if best is None:
        return
    trainer.add_callback(_KeepBest(best))
    if checkpoint is not None:
        best.load_state_dict(torch.load(checkpoint / _file(), map_location="cpu", weights_only=True))


class _KeepBest(TrainerCallback):
    """Save the best policy beside what the Trainer saves."""

    def __init__(self, best: BestPolicy):
        self._best = best

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        assert args.output_dir is not None, "every stage has one"
        PartialState().wait_for_everyone()  # the main process makes the folder
        torch.save(self._best.state_dict(), Path(args.output_dir) / f"checkpoint-{state.global_step}" / _file())


def _file() -> str:
    """Name the file of this process in a checkpoint."""
    return f"best-{PartialState().process_index}.pt"
