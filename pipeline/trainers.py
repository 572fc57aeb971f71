"""TRL's trainers and their config classes by stage type; the only module that imports trl.experimental.

Everything is imported when asked for: importing TRL costs several seconds, and `rlhf --help` must not pay them.
"""

from typing import Any


def config_class(stage_type: str) -> type:
    """The TRL config class that a stage's `training:` section is passed to."""
    if stage_type in ("pretrain", "sft"):
        from trl import SFTConfig

        return SFTConfig
    if stage_type == "reward":
        from trl import RewardConfig

        return RewardConfig
    if stage_type == "dpo":
        from trl import DPOConfig

        return DPOConfig
    if stage_type == "rloo":
        from trl import RLOOConfig

        return RLOOConfig
    if stage_type == "grpo":
        from trl import GRPOConfig

        return GRPOConfig
    from trl.experimental.ppo import PPOConfig

    return PPOConfig


def ppo_trainer_class() -> type:
    """TRL's PPOTrainer, as it is."""
    from trl.experimental.ppo import PPOTrainer

    return PPOTrainer


def dpo_trainer_class() -> type:
    """TRL's DPOTrainer for rows that are tokenised already (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    SFTTrainer and RewardTrainer accept tokenised rows; DPOTrainer 1.12 has no such door.
    """
    from trl import DPOTrainer

    class TokenisedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return TokenisedDPOTrainer
