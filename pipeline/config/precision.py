"""Decide the device and the autocast of a stage by its options and by what the device can compute."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.rules import uses_flash_attention
from pipeline.config.schema import RunConfig, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.system import device
from pipeline.system.device import Device

_ELSE = "Plan and run it on a machine that has one, or"


@dataclass(frozen=True)
class Autocast:
    """The type in which a training stage computes (`no`: that of its weights), and why.

    `given_up`: the device has no bf16, and nobody asked for it.
    """

    type: Literal["bf16", "fp16", "no"]
    why: str
    given_up: bool = False


def device_of(config: RunConfig, name: str, visible: Device) -> Device:
    """Return the device of a stage: the CPU where its options ask for it, else the one that is there."""
    return device.cpu("`use_cpu: true`") if asks_for_cpu(config, name) else visible


def asks_for_cpu(config: RunConfig, name: str) -> bool:
    """Tell whether the options of a stage say that it computes on the CPU."""
    stage = config.stages[name]
    training = stage.training if isinstance(stage, TrainingStage) else config.training
    return bool(training.get("use_cpu"))


def autocast(stage: TrainingStage, on: Device) -> Autocast:
    """Decide the autocast of a stage: as the user says, else TRL's default where the device is made for it."""
    options = stage.training
    if not type_of(stage).autocast:
        return Autocast("no", "PPOTrainer has none")
    if options.get("fp16"):
        return Autocast("fp16", "`fp16: true`")
    if options.get("bf16") is False:
        return Autocast("no", "`bf16: false`")
    lacks = f"the {on.name} has no instructions for bf16"
    if options.get("bf16"):
        slow = "" if on.bf16 == "native" else f", but {lacks}: `bf16: false` may be much faster"
        return Autocast("bf16", f"`bf16: true`{slow}")
    if on.bf16 == "native":
        return Autocast("bf16", "TRL's default")
    how = "; `bf16: true` turns it on all the same" if on.bf16 == "slow" else ""
    return Autocast("no", f"{lacks}, TRL's default{how}", given_up=True)


def faults(config: RunConfig, name: str, on: Device) -> list[str]:
    """Say what a stage's options ask of its device that it does not have."""
    stage = config.stages[name]
    wrong: list[str] = []
    if uses_flash_attention(config) and on.kind == "cpu":
        mend = f"{_ELSE} set `model.attn_implementation` to sdpa"
        wrong.append(f"flash attention needs a GPU, and this stage runs on the {on}. {mend}")
    if not isinstance(stage, TrainingStage):
        return wrong
    options = stage.training
    if options.get("fp16") and on.kind == "cpu":
        wrong.append(f"`fp16: true` needs a GPU, and this stage runs on the {on}. {_ELSE} leave it out")
    if type_of(stage).autocast and options.get("bf16") and on.bf16 == "none":
        wrong.append(f"`bf16: true`: the {on.name} cannot compute in bf16. Set it to false")
    if options.get("tf32") and not on.tf32:
        wrong.append(
            f"`tf32: true` needs an NVIDIA GPU of 2020 or later, and this stage runs on the {on}. {_ELSE} leave it out"
        )
    return wrong
