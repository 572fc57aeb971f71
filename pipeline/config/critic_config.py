"""The options of PPO on TRL's GRPOTrainer, under the names that PPOTrainer's options have.

Importing this module imports TRL, which takes seconds: the table of stage types has its name alone.
"""

from dataclasses import dataclass
from typing import Literal

from trl.trainer.grpo_config import GRPOConfig

from pipeline.config.batch_sizes import fault_of_ppo


@dataclass
class CriticConfig(GRPOConfig):
    """Take PPO's options; the rest is what GRPOTrainer and transformers need.

    One step of the Trainer is one update: a rollout and all steps of the optimizer on it. So `save_steps`, warm-up and
    the learning rate's schedule count updates, as PPOTrainer counts them. To the Trainer the batch of a step is the
    whole rollout: `per_device_train_batch_size` and `gradient_accumulation_steps` are what the user says until the
    object is made, and afterwards the rollout's size and 1. What the user said is in `micro_batch_size` and
    `micro_batches_per_step`.

    `num_generations` completions of each prompt lie side by side in a batch.
    """

    learning_rate: float = 3e-6
    num_generations: int | None = 1
    temperature: float = 0.7
    disable_dropout: bool = True
    num_mini_batches: int = 1
    total_episodes: int | None = None
    local_rollout_forward_batch_size: int = 64
    response_length: int = 53
    num_sample_generations: int = 0
    missing_eos_penalty: float | None = None
    num_ppo_epochs: int = 4
    whiten_rewards: bool = False
    kl_coef: float = 0.05
    kl_estimator: Literal["k1", "k3"] = "k1"
    cliprange: float = 0.2
    vf_coef: float = 0.1
    cliprange_value: float = 0.2
    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        fault = fault_of_ppo(self)
        if fault is not None:
            raise ValueError(fault)
        if self.num_sample_generations:
            raise ValueError("num_sample_generations is of `trainer: ppo` alone; an evaluate stage shows completions")
        # GRPOConfig's own checks are about groups of completions, two at least, that are compared with one another.
        super(GRPOConfig, self).__post_init__()
        rollout = self.per_device_train_batch_size * self.gradient_accumulation_steps
        self.micro_batch_size = min(rollout // self.num_mini_batches, self.per_device_train_batch_size)
        self.micro_batches_per_step = self.gradient_accumulation_steps
        self.per_device_train_batch_size = rollout
        self.gradient_accumulation_steps = 1
        self.steps_per_generation = 1
        self.generation_batch_size = rollout * self.world_size
        self.max_completion_length = self.response_length
        self.beta = 0.0  # the KL is in the rewards, so that GRPOTrainer needs no reference
        self.shuffle_dataset = False  # the rows come in the order in which they are trained on
        self.ddp_find_unused_parameters = False  # policy and value model both take part in every loss
        # As PPOTrainer, which logs each update: the watchdog counts them.
        self.logging_strategy = "steps"
        self.logging_steps = 1
