"""Hand on to a stage's trackers what its trainer logs."""

from collections.abc import Mapping

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import rewrite_logs

from pipeline.tracking.trackers import Trackers


def report(trainer: Trainer, trackers: Trackers) -> None:
    """Let trackers have all that a trainer logs; call it after the callback that loads a checkpoint was added."""
    trainer.add_callback(Curves(trackers))


class Curves(TrainerCallback):
    """Report each log under the names that transformers gives it: `train/loss`, `eval/loss`."""

    def __init__(self, trackers: Trackers):
        self._trackers = trackers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        history = []  # as the checkpoint holds it
        for entry in state.log_history:
            figures = {name: value for name, value in entry.items() if name != "step"}
            history.append((int(entry["step"]), rewrite_logs(figures)))
        self._trackers.begin(state.global_step, history)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, float | None] | None = None,
        **_: object,
    ) -> None:
        self._trackers.log(rewrite_logs(logs or {}), state.global_step)
