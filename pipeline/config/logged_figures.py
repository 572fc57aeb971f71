"""Figures that trainers log, under our names and in our units; which of them are shown while a stage trains."""

import math
from collections.abc import Mapping

LENGTH = "completions/mean_length"  # tokens, as all of TRL's trainers of RL log it
# Our name of a figure that a trainer logs, and the power of the mean length that makes our unit of its own.
Ours = tuple[str, int]
LOSSES: Mapping[str, Ours] = {"loss": ("loss", 0), "eval_loss": ("held-out loss", 0)}
OF_REWARD: Mapping[str, Ours] = LOSSES | {"accuracy": ("accuracy", 0), "margin": ("margin", 0)}
OF_DPO: Mapping[str, Ours] = LOSSES | {"rewards/accuracies": ("accuracy", 0), "rewards/margins": ("margin", 0)}
OF_KTO: Mapping[str, Ours] = LOSSES | {"kl": ("KL", 0), "rewards/margins": ("margin", 0)}
OF_GROUPS: Mapping[str, Ours] = {"reward": ("reward", 0), "kl": ("KL", 1), LENGTH: ("length", 0)} | LOSSES
OF_PPO: Mapping[str, Ours] = {
    "objective/raw_scores": ("score", 0),
    "objective/kl": ("KL", 0),
    LENGTH: ("length", 0),
    "value/explained_variance": ("explained variance", 0),
    "loss/policy_avg": ("loss", 0),
}


def in_our_words(names: Mapping[str, Ours], logs: Mapping[str, float | None]) -> dict[str, float]:
    """Return figures of a trainer's log under our names and in our units; one that needs an absent length is left out.

    An accuracy of 0 is left out too where the margin is 0: all comparisons are ties there, as in the first step of DPO,
    and TRL counts ties as wrong.
    RLOO and GRPO log None for a value that was NaN throughout, so None is read as NaN.
    """
    logged = {name: math.nan if value is None else value for name, value in logs.items()}
    figures: dict[str, float] = {}
    for name, (ours, power) in names.items():
        if name not in logged:
            continue
        if power == 0:
            figures[ours] = logged[name]
        elif LENGTH in logged:
            figures[ours] = logged[name] * max(logged[LENGTH], 1.0) ** power
    if figures.get("margin") == figures.get("accuracy") == 0:
        del figures["accuracy"]
    return figures
