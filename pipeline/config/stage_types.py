"""The types of stages."""

import pkgutil

from pipeline.config.schema import Evaluate, Offline, Online, Ppo, Shift, Stage

STAGE_CLASSES: dict[str, type[Stage]] = {"ppo": Ppo, "rloo": Online, "grpo": Online}


STAGE_CLASSES |= {"evaluate": Evaluate, "shift": Shift}


STAGE_CLASSES |= dict.fromkeys(("pretrain", "sft", "reward", "dpo"), Offline)


FINAL_TYPES = ("ppo", "rloo", "grpo", "dpo")


POLICY_TYPES = ("pretrain", "sft", *FINAL_TYPES)


def config_class(stage_type: str) -> type:
    """The TRL config class that a stage's `training:` section is passed to."""
    if stage_type == "ppo":
        return pkgutil.resolve_name("trl.experimental.ppo:PPOConfig")
    method = {"pretrain": "SFT", "sft": "SFT", "reward": "Reward"}.get(stage_type, stage_type.upper())
    return pkgutil.resolve_name(f"trl:{method}Config")
