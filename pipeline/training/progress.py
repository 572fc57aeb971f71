"""Report to the progress file what a trainer does."""

from collections.abc import Mapping, Sized
from numbers import Real
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import has_length

from pipeline.records.progress import FINISHING, HELD_OUT, TRAINING, Logs, Progress

LOGS = 20  # of a training, at least


class LogOften(TrainerCallback):
    """Let a short training log at least `LOGS` times: TRL's default of 10 steps would leave one of 8 without a loss."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        state.logging_steps = max(1, min(state.logging_steps, state.max_steps // LOGS))


class Report(TrainerCallback):
    """Write steps, held-out batches and logs of a trainer to a `Progress`, which writes in the main process alone.

    Add it after the callback that loads a checkpoint, if the trainer needs one: a resumed training begins at its step.
    `watch` adds it where the trainer looks at held-out rows.
    """

    def __init__(self, progress: Progress):
        self._progress = progress
        self._batches = 0  # done in the evaluation that is at work
        self._is_evaluating = False
        self._is_trained = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        first: dict[str, float | None] = {}  # of a resumed training
        for logs in state.log_history:
            first = _figures(logs) | first
        self._train(state, first)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if not control.should_log:  # else it is written with its figures
            self._progress.step(state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **_: object,
    ) -> None:
        self._close_evaluation(state)  # it is logged before `on_evaluate`
        self._progress.step(state.global_step, _figures(logs or {}))

    def begin_evaluation(self, batches: Sized) -> None:
        """Say that held-out batches are looked at next."""
        self._is_evaluating = True
        self._progress.begin(HELD_OUT, len(batches) if has_length(batches) else None)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self._batches += 1
        self._progress.step(self._batches)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._close_evaluation(state)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self._is_trained = True
        self._progress.begin(FINISHING)

    def _close_evaluation(self, state: TrainerState) -> None:
        if not self._is_evaluating:
            return
        self._is_evaluating = False
        self._batches = 0
        if self._is_trained:
            self._progress.begin(FINISHING)
        else:
            self._train(state)

    def _train(self, state: TrainerState, first: Logs | None = None) -> None:
        # A checkpoint after the last step is only loaded: then fewer steps are to come than were made.
        self._progress.begin(TRAINING, max(state.max_steps, state.global_step), state.global_step, first)


def watch(trainer: Trainer, progress: Progress) -> None:
    """Let a trainer report what it does."""
    callback = Report(progress)
    trainer.add_callback(callback)
    loop = trainer.evaluation_loop

    # upstream: no callback comes before the first held-out batch; its time would be that of what came before it.
    def evaluation_loop(dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        callback.begin_evaluation(dataloader)
        return loop(dataloader, *args, **kwargs)

    trainer.evaluation_loop = evaluation_loop  # type: ignore[method-assign]


def _figures(logs: Mapping[str, object]) -> dict[str, float | None]:
    """Return the numbers of a log. Trainers log None for a value that was NaN throughout."""
    figures: dict[str, float | None] = {}
    for name, value in logs.items():
        if value is None or isinstance(value, Real):
            figures[name] = None if value is None else float(value)
    return figures
