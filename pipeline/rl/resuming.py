"""Let PPO go on from a checkpoint, without a change to PPOTrainer's loop.

PPOTrainer saves checkpoints as every trainer of transformers does, and cannot read them. What it saves is the policy,
the optimizer, the schedule and its log. `trainers.py` lets it save all weights that train. Here are the rest of what
must be kept, and the way back: PPOTrainer's loop counts its updates from 1, so it is given fewer of them, and it takes
its prompts from a `Place`, which passes over those that were trained on.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from pipeline.system.random_states import random_states, set_random_states
from pipeline.training.checkpoints import MarkComplete, step_of
from pipeline.training.trainers import TRAINED

if TYPE_CHECKING:
    from pipeline.rl.best_policy import BestPolicy
    from pipeline.training.trainers import PPOTrainer


@dataclass(frozen=True)
class Taken:
    """Say how far training is in the prompts, and hold the random states that this process then has.

    `begun`: the states with which the pass over the prompts began; the order of the pass follows from them.
    `number`: the batches that were taken in this pass.
    `now`: the states with which training goes on.
    """

    begun: dict[str, Any]
    number: int
    now: dict[str, Any]


class Place:
    """Stand in the place of a dataloader, know how many batches were taken from it, and begin at such a place.

    `generator` is the dataloader's own, which accelerate gives it under several processes.
    """

    def __init__(self, batches: Iterable[dict[str, torch.Tensor]], generator: torch.Generator | None):
        self._batches = batches
        self._generator = generator
        self._start: Taken | None = None
        self._begun: dict[str, Any] = {}
        self._number = 0

    def begin_at(self, taken: Taken) -> None:
        """Pass over the batches that were taken, and go on with the random states of then."""
        self._start = taken

    def taken(self) -> Taken:
        """Return the place after the batch that was taken last."""
        return Taken(self._begun, self._number, self._states())

    def _states(self) -> dict[str, Any]:
        own = {} if self._generator is None else {"generator": self._generator.get_state()}
        return random_states() | own

    def _set_states(self, states: dict[str, Any]) -> None:
        set_random_states(states)
        if self._generator is not None:
            self._generator.set_state(states["generator"])

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        start = self._start
        self._start = None
        if start is not None:
            self._set_states(start.begun)
        self._begun = self._states()
        self._number = 0
        for batch in self._batches:
            if start is not None and self._number == start.number:
                self._set_states(start.now)
                start = None
            self._number += 1
            if start is None:
                yield batch
        if start is not None:  # all batches of the pass were taken
            self._set_states(start.now)


def keep_checkpoints(trainer: "PPOTrainer", best: "BestPolicy | None", checkpoint: Path | None) -> None:
    """Let a PPOTrainer, whose dataloader is a `Place`, make checkpoints that it can go on from, and go on from one."""
    # Before all others: they look at the state with which training goes on, and at what a checkpoint holds.
    trainer.callback_handler.callbacks.insert(0, Checkpoints(trainer, best, checkpoint))
    trainer.add_callback(MarkComplete())


class Checkpoints(TrainerCallback):
    """Complete the checkpoints that PPOTrainer makes, and load one when training begins.

    `best` is the best policy so far, if it is looked for.
    """

    def __init__(self, trainer: "PPOTrainer", best: "BestPolicy | None", checkpoint: Path | None):
        self._trainer = trainer
        self._place = cast(Place, trainer.dataloader)
        self._best = best
        self._checkpoint = checkpoint
        total = trainer.args.num_total_batches
        assert total is not None, "the trainer has counted them"
        self._total = total
        if checkpoint is not None:
            trainer.args.num_total_batches = total - step_of(checkpoint)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        if self._checkpoint is None:
            return
        folder = self._checkpoint
        trainer = self._trainer
        model = trainer.accelerator.unwrap_model(trainer.model)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, saved in load_file(folder / TRAINED).items():
                parameters[name].copy_(saved)
        # The Trainer's own method for this asks for attributes that PPOTrainer does not have.
        optimizer = torch.load(folder / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
        trainer.optimizer.load_state_dict(optimizer)
        trainer.lr_scheduler.load_state_dict(torch.load(folder / SCHEDULER_NAME, weights_only=True))
        kept = _load(folder / _own_file())
        self._place.begin_at(Taken(**kept["place"]))
        if self._best is not None:
            self._best.load_state_dict(kept["best"])
        saved_state = type(trainer.state).load_from_json(str(folder / "trainer_state.json"))
        trainer.state.global_step = saved_state.global_step
        trainer.state.episode = saved_state.episode
        trainer.state.log_history = saved_state.log_history
        trainer.state.max_steps = self._total
        # PPOTrainer has counted the updates that remain, of which `save_steps` may be a share.
        trainer.state.compute_steps(args, self._total)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        assert args.output_dir is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        PartialState().wait_for_everyone()  # the main process makes the folder
        kept = {
            "place": vars(self._place.taken()),
            "best": None if self._best is None else self._best.state_dict(),
        }
        torch.save(kept, folder / _own_file())


def _own_file() -> str:
    """Name the file of this process in a checkpoint."""
    return f"place-{PartialState().process_index}.pt"


def _load(file: Path) -> Any:
    """Read what this package has written: random states hold arrays of numpy, so it is no plain file of weights."""
    return torch.load(file, map_location="cpu", weights_only=False)
