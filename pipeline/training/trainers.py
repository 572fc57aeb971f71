"""TRL's trainers, with the changes that a stage needs; the only module that imports trl.experimental.

Everything is imported when asked for: importing TRL costs several seconds, and `rlhf --help` must not pay them.
"""

import contextlib
import copy
import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

import torch
from datasets import Dataset
from safetensors.torch import save_file
from torch import nn

from pipeline.models.generation import same_random_numbers
from pipeline.system.digests import digest
from pipeline.training.rollouts import lean

if TYPE_CHECKING:  # the first two are also for the stage to name
    from trl.experimental.ppo.ppo_config import PPOConfig as PPOConfig
    from trl.experimental.ppo.ppo_trainer import PPOTrainer as PPOTrainer
    from trl.trainer.dpo_trainer import DPOTrainer as _Trainer  # trainers with a reference have its methods
else:
    _Trainer = object


TRAINED = "trained.safetensors"  # in a checkpoint of PPO: all weights that train


def shown_every(trainer: "PPOTrainer") -> int:
    """Return how many updates lie between two looks at completions: PPOTrainer counts them from its start only."""
    return max(1, trainer.state.max_steps // trainer.args.num_sample_generations)


@contextlib.contextmanager
def clipped(trainer: "PPOTrainer") -> Iterator[None]:
    """Clip the gradients of a PPOTrainer to `max_grad_norm`, over policy and value model together, as Trainer does.

    PPOTrainer knows the option and does not look at it. DeepSpeed clips by itself, by its own options.
    """
    norm = trainer.args.max_grad_norm
    optimizer = cast(Any, trainer.optimizer).optimizer  # accelerate's is around it

    def clip(*_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, norm)

    if not norm or trainer.is_deepspeed_enabled:
        yield
        return
    hook = optimizer.register_step_pre_hook(clip)
    try:
        yield
    finally:
        hook.remove()


def ppo_trainer_class(observe: Callable[[], dict[str, float]] = dict) -> "Callable[..., PPOTrainer]":
    """Return TRL's PPOTrainer with three changes that leave its loop as it is.

    What `observe` returns is added to each entry of its log. Its checkpoints hold the weights that train, of the policy
    and of the value model; TRL saves all adapters of the policy and nothing of the value model. The completions that it
    shows take no random numbers from the training, and come at the same updates in a resumed run.

    Its arguments have no types: TRL names PreTrainedModel, and takes any module that has the same parts.
    """
    from trl.experimental.ppo import PPOTrainer, ppo_trainer

    class ObservedPPOTrainer(PPOTrainer):
        def __init__(self, **options: Any):
            super().__init__(**options)
            self.sample_generations_freq = 1  # `generate_completions` decides

        def train(self) -> None:
            policies = [self.policy_model, self.ref_model]
            eos = cast(Any, self.processing_class).eos_token_id
            with lean(ppo_trainer, policies, eos), clipped(self):
                super().train()

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
            super().log(logs | observe(), start_time)

        def generate_completions(self, sampling: bool = False) -> None:
            if not sampling or (self.state.global_step - 1) % shown_every(self) == 0:
                with same_random_numbers():
                    super().generate_completions(sampling)

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            assert output_dir is not None and _internal_call, "the stage saves the policy itself"
            if not self.args.should_save:
                return
            model = self.accelerator.unwrap_model(self.model)
            trained = {name: p.detach().contiguous() for name, p in model.named_parameters() if p.requires_grad}
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_file(trained, Path(output_dir) / TRAINED)

        def create_model_card(self, *_: object, **__: object) -> None:
            """Write none beside checkpoints; under several processes TRL's would fail."""

    return ObservedPPOTrainer


class TokenisedRows(_Trainer):
    """Let a trainer of TRL that has a reference take rows that are tokenised already; name it before the trainer.

    SFTTrainer and RewardTrainer accept tokenised rows; the trainers of TRL 1.12 with a reference have no such door.

    With `precompute_ref_log_probs` TRL keeps the reference's log-probabilities in a cache by rows and weights. Options
    change them too (`ld_alpha`), and all runs share the cache, so `identity`, the digest of all that the stage depends
    on, becomes part of the key, and so do device and precision. They are computed in the precision of the training, or
    the first margins would not be 0.
    """

    def __init__(self, *args: Any, identity: str, **options: Any):
        self.identity = identity  # the trainer's own __init__ computes the log-probabilities
        super().__init__(*args, **options)

    # upstream: no option says that rows are token ids.
    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:  # type: ignore[override]
        return dataset

    # upstream: the cache's key is the fingerprint of the rows, which nothing public changes.
    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        keyed = copy.copy(dataset)
        precision = (self.accelerator.mixed_precision, self.accelerator.device.type)
        keyed._fingerprint = digest([dataset._fingerprint, self.identity, *precision])
        return super()._precompute_ref_logps(keyed, name, batch_size)

    def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        with self.accelerator.autocast():
            return super().compute_ref_log_probs(model, inputs)


@contextlib.contextmanager
def reference_given(stage_type: str, reference: nn.Module | None) -> Iterator[None]:
    """Let RLOOTrainer or GRPOTrainer, made inside, take this reference where it would load one by itself.

    It would load it in float32 and without revision or attention implementation: another model than the parent is, as
    the policy was loaded. With adapters it loads none.
    """
    # upstream: these trainers take no reference, and import the function that loads one by its name.
    module = importlib.import_module(f"trl.trainer.{stage_type}_trainer")
    with mock.patch.object(module, "create_model_from_path", lambda *_, **__: reference):
        yield
