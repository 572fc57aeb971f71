"""Train PPO with a value model on TRL's stable GRPOTrainer, to the same figures as TRL's experimental PPOTrainer.

GRPOTrainer compares the completions of a prompt with one another. Here a value model says what was to be expected, and
each token gets an advantage of its own (GAE). One step of the Trainer is one update of PPO: a rollout, and
`num_ppo_epochs` passes over it. The Trainer takes the last of the optimizer's steps, with all that belongs to it: the
schedule, logs, checkpoints and callbacks. So these count updates, and a checkpoint never lies within a rollout.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedTokenizerBase
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import entropy_from_logits

from pipeline.config.critic_config import CriticConfig
from pipeline.models.loading import can_leave_out_logits, precision_kept
from pipeline.models.ppo import Models
from pipeline.models.views import ScoreView
from pipeline.rl.advantages import PADDING, policy_loss, value_loss
from pipeline.rl.centred_reward import Subtraction
from pipeline.rl.critic_rollout import PolicyAndValue, Rollouts, Stats
from pipeline.rl.micro_batches import Extent, MicroBatch, micro_batches
from pipeline.training.trainers import TRAINED


def in_order_of_training(prompts: Dataset, num_updates: int, batch: int, seed: int) -> Dataset:
    """Return the prompts of all updates, `batch` for each: pass after pass, each in an order of its own.

    What is left of a pass that does not fill a batch is passed over.
    """
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < num_updates * batch:
        order += torch.randperm(len(prompts), generator=generator)[: len(prompts) - len(prompts) % batch].tolist()
    return prompts.select(order[: num_updates * batch])


class CriticTrainer(GRPOTrainer):
    """Train the policy and the value model of `models`, which are views of one backbone.

    The completions of `prompts` (`input_ids`) are scored by the reward model, less what `subtraction` takes off.
    """

    args: CriticConfig

    def __init__(
        self,
        models: Models,
        args: CriticConfig,
        subtraction: Subtraction,
        prompts: Dataset,
        tokenizer: PreTrainedTokenizerBase,
    ):
        assert isinstance(models.value, ScoreView), "the plan refuses separate models"
        self.num_prompts = len(prompts)
        self.episodes_per_update = args.per_device_train_batch_size * args.world_size
        episodes = args.total_episodes or int(args.num_train_epochs * len(prompts))
        args.max_steps = math.ceil(episodes / self.episodes_per_update)
        unique = self.episodes_per_update // cast(int, args.num_generations)
        rows = in_order_of_training(prompts, args.max_steps, unique, args.seed)
        policy: Any = models.policy  # TRL names narrower types than it takes
        rewards: Any = no_rewards
        with precision_kept(models.policy):
            super().__init__(policy, rewards, args, train_dataset=rows, processing_class=tokenizer)
        both = PolicyAndValue(models.policy, models.value).to(args.device)
        self.model = both
        self.model_wrapped = both
        keeps_logits = can_leave_out_logits(models.policy)
        self._rollouts = Rollouts(models, args, tokenizer, subtraction, keeps_logits, self._autocast)
        self._pad = cast(int, tokenizer.pad_token_id)
        self._of_rows: dict[str, list[torch.Tensor]] = defaultdict(list)  # of a step's micro-batches
        self._of_groups: dict[str, list[torch.Tensor]] = defaultdict(list)  # of an update's steps
        self._stats: Stats = {}  # of an update that is not logged yet

    def _autocast(self) -> AbstractContextManager[None]:
        return self.accelerator.autocast()

    # upstream: GRPOTrainer would sample here, for each micro-batch; `training_step` has done it.
    def _prepare_inputs(self, generation_batch: Any) -> Any:
        return generation_batch

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Make one update but for the optimizer's last step, which the Trainer takes."""
        self.model.eval()
        prompts = [row["input_ids"] for row in inputs]
        rollout, stats = self._rollouts.make(self.model, prompts, self.state.global_step)
        stats["lr"] = torch.tensor(cast(LRScheduler, self.lr_scheduler).get_last_lr()[0])
        extent = Extent.of(rollout, self._pad)
        losses = []
        for drawn, is_last in self._steps(len(prompts)):
            batches = micro_batches(rollout, extent, drawn, self.args.micro_batch_size)
            losses.append(self._accumulate(model, list(batches)))
            if not is_last:
                self._take_step(model)
        self._close(stats)
        return torch.stack(losses).mean()

    def _steps(self, num_rows: int) -> Iterator[tuple[list[int], bool]]:
        """Draw the rows of each step, and tell whether it is the last: an epoch goes through all rows once."""
        size = self.args.micro_batch_size * self.args.micro_batches_per_step
        for epoch in range(1, self.args.num_ppo_epochs + 1):
            order = np.random.permutation(num_rows).tolist()
            for start in range(0, num_rows, size):
                yield order[start : start + size], epoch == self.args.num_ppo_epochs and start + size == num_rows

    def _accumulate(self, model: nn.Module, batches: list[MicroBatch]) -> torch.Tensor:
        """Add up the gradients of a step; return its loss, and keep the figures of the groups drawn for it."""
        losses = []
        for number, batch in enumerate(batches, 1):
            with contextlib.nullcontext() if number == len(batches) else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, cast(Any, batch), None))
        # Sorted and summed, not `index_add`, which sums in any order on a GPU.
        order = torch.cat([batch.groups for batch in batches]).argsort(stable=True)
        for name, parts in self._of_rows.items():
            self._of_groups[name].append(torch.cat(parts)[order].view(len(batches), -1).sum(1))
        self._of_rows.clear()
        return torch.stack(losses).sum()

    def _take_step(self, model: nn.Module) -> None:
        """Take a step of the optimizer within an update, as the Trainer takes the last one."""
        if self.args.max_grad_norm:
            self.accelerator.clip_grad_norm_(model.parameters(), self.args.max_grad_norm)
        cast(Optimizer, self.optimizer).step()
        model.zero_grad()

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the loss of policy and value model on a micro-batch, as a part of a step's loss."""
        args = self.args
        batch = cast(MicroBatch, inputs)
        rollout = batch.rollout
        log_probs, values, logits = self._rollouts.forward(model, rollout.sequences, rollout.real.shape[1])
        change = log_probs.masked_fill(~rollout.real, PADDING) - rollout.log_probs
        ratio = change.exp()
        of_policy = policy_loss(ratio, rollout, args.cliprange)
        of_value = value_loss(values, rollout, args.cliprange_value)
        losses = (of_policy.losses * batch.of_tokens).sum(1), (of_value.losses * batch.of_values).sum(1)
        # PPOTrainer takes these means over the padding of the rollout too, in which nothing has changed.
        positions = args.micro_batch_size * batch.full_width
        seen = {
            "policy/approxkl_avg": 0.5 * (change**2).sum(1) / positions,
            "policy/clipfrac_avg": (of_policy.clipped * batch.of_tokens).sum(1),
            "loss/policy_avg": losses[0],
            "loss/value_avg": losses[1],
            "val/clipfrac_avg": (of_value.clipped * batch.of_values).sum(1),
            "policy/entropy_avg": (entropy_from_logits(logits.detach()) * batch.of_tokens).sum(1),
            "val/ratio": 1 / args.micro_batch_size + (ratio - 1).sum(1) / positions,
        }
        for name, value in seen.items():
            self._of_rows[name].append(value.detach().float())
        return (losses[0] + args.vf_coef * losses[1]).sum() / args.micro_batches_per_step

    def _close(self, stats: Stats) -> None:
        """Keep the figures of an update for the log: means over the groups, which are PPOTrainer's micro-batches."""
        of_groups = {name: torch.cat(values) for name, values in self._of_groups.items()}
        self._of_groups.clear()
        ratios = cast(torch.Tensor, self.accelerator.gather(of_groups["val/ratio"]))
        self._stats = stats | {name: values.mean() for name, values in of_groups.items()}
        self._stats["val/ratio_var"] = ratios.var()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the figures of PPO that PPOTrainer and its stage log; an epoch is a pass over the prompts."""
        self.state.epoch = self.num_episodes / self.num_prompts
        if self._stats:
            here = torch.stack([value.to(self.args.device) for value in self._stats.values()])
            means = cast(torch.Tensor, self.accelerator.gather(here.unsqueeze(0))).mean(0)
            logs |= dict(zip(self._stats, means.tolist(), strict=True)) | self._rollouts.figures.observe()
            logs["episode"] = self.num_episodes
            self._stats = {}
        super().log(logs, start_time)

    @property
    def num_episodes(self) -> int:
        """Say how many completions were trained on."""
        return self.state.global_step * self.episodes_per_update

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the weights that train, of policy and value model; the stage saves the policy itself."""
        assert output_dir is not None and _internal_call, "the stage saves the policy itself"
        if not self.args.should_save:
            return
        trained = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        save_file(trained, Path(output_dir) / TRAINED)

    # upstream: the Trainer has no public way to read what `save_model` wrote.
    @torch.no_grad()
    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        own = dict(self.model.named_parameters())
        for name, saved in load_file(Path(resume_from_checkpoint) / TRAINED).items():
            own[name].copy_(saved)


def no_rewards(prompts: list[Any], **_: object) -> list[float]:
    """Stand in the place of a reward function: GRPOTrainer must have one, and what is scored is scored in a rollout."""
    raise AssertionError("GRPOTrainer samples nothing here")
