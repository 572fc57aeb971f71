"""TRL's trainers and their config classes by stage type; the only module that imports trl.experimental.

Everything is imported when asked for: importing TRL costs several seconds, and `rlhf --help` must not pay them.
"""

import pkgutil
from collections.abc import Callable
from typing import Any


def config_class(stage_type: str) -> type:
    """The TRL config class that a stage's `training:` section is passed to."""
    if stage_type == "ppo":
        from trl.experimental.ppo import PPOConfig

        return PPOConfig
    method = {"pretrain": "SFT", "sft": "SFT", "reward": "Reward"}.get(stage_type, stage_type.upper())
    return pkgutil.resolve_name(f"trl:{method}Config")


def ppo_trainer_class() -> type:
    """TRL's PPOTrainer as it is, but that what `observe` says of an update is logged beside its own figures."""
    from trl.experimental.ppo import PPOTrainer

    class ObservedPPOTrainer(PPOTrainer):
        observe: Callable[[], dict[str, float]] = dict

        def log(self, logs: dict[str, float], *args: Any) -> None:
            super().log(logs | self.observe(), *args)

    return ObservedPPOTrainer


def dpo_trainer_class() -> type:
    """TRL's DPOTrainer for rows that are tokenised already (`prompt_ids`, `chosen_ids`, `rejected_ids`).

    SFTTrainer and RewardTrainer accept tokenised rows; DPOTrainer 1.12 has no such door.
    """
    from trl import DPOTrainer

    class TokenisedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    return TokenisedDPOTrainer
