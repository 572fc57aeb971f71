"""Refuse before anything is trained the launches that split a model over processes in a way a stage cannot carry."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.base import dtype
from pipeline.config.lineage import start_of
from pipeline.config.options import effective
from pipeline.config.precision import autocast, device_of
from pipeline.config.schema import Online, Ppo, RunConfig, TrainingStage
from pipeline.config.stage_types import makes, row_of, type_of
from pipeline.config.type_row import ZERO_2, ZERO_3
from pipeline.system import device
from pipeline.system.device import Device
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

FSDP = "FSDP"
# Why a way to split a model cannot carry a type of stage; `sharded` of the type says which it can.
REASONS: Mapping[str, str] = {
    FSDP: "it puts other parameters in the place of those that the checks of a stage look at, and loads weights in one "
    "process only",
    ZERO_2: "policy and reference would be compared before it has placed them",
    ZERO_3: "no process has the whole weights, which this type of stage needs",
}
DDP_FILE = "accelerate_configs/multi_gpu.yaml"
ZERO_2_FILE = "accelerate_configs/zero2.yaml"


def of_file(path: str | Path, where: str) -> str | None:
    """Read from an accelerate config how it splits a model over processes; None: it does not.

    Raises:
        UserError: if the file cannot be read; `where` is the key that names it.
    """
    settings = _mapping(Path(path), where, YAML(typ="safe").load)
    kind = str(settings.get("distributed_type", "")).upper()
    if kind == "FSDP":
        return FSDP
    if kind != "DEEPSPEED":
        return None
    options = settings.get("deepspeed_config") or {}
    stage = options.get("zero_stage")
    if options.get("deepspeed_config_file"):
        # accelerate looks for it from the working directory
        stage = _zero_stage(options["deepspeed_config_file"], where)
    return ZERO_3 if stage == 3 else ZERO_2


def needs_gpu_id(path: str | Path, environment: Mapping[str, str] | None = None) -> bool:
    """Tell whether an accelerate config starts one process, which must see one GPU, and the environment says which."""
    settings = _mapping(Path(path), "--accelerate-config", YAML(typ="safe").load)
    if str(settings.get("distributed_type", "NO")).upper() not in ("NO", "FALSE"):
        return False
    variables = _present(environment)
    return "CUDA_VISIBLE_DEVICES" in variables or settings.get("gpu_ids", "all") == "all"


def asks_for_cpu(path: str | Path) -> bool:
    """Tell whether an accelerate config asks for the CPU; accelerate hands that on to one process alone."""
    settings = _mapping(Path(path), "--accelerate-config", YAML(typ="safe").load)
    is_single = str(settings.get("distributed_type", "NO")).upper() in ("NO", "FALSE")
    return is_single and bool(settings.get("use_cpu"))


def processes_of(path: str | Path | None) -> int:
    """Return the number of processes that an accelerate config starts; None is no launch, which is one process."""
    if path is None:
        return 1
    number = _mapping(Path(path), "--accelerate-config", YAML(typ="safe").load).get("num_processes", 1)
    return number if isinstance(number, int) and number > 0 else 1


def _present(environment: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return the environment as it is now, unless another is given.

    The datasets library puts a copy in the place of `os.environ` when it starts processes.
    """
    return os.environ if environment is None else environment


def _mapping(path: Path, where: str, read: Callable[[str], object]) -> JsonObject:
    """Read the settings of a launcher's file; `where` is the key that names it.

    Raises:
        UserError: if it cannot be read or is no mapping.
    """
    try:
        settings = read(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise UserError(f"{where}: {path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{where}: {path} holds no mapping; expected a file that `accelerate config` would write")
    return settings


def _zero_stage(path: str, where: str) -> int:
    """Read the stage of ZeRO from DeepSpeed's own config."""
    settings = _mapping(Path(path), where, json.loads)
    return (settings.get("zero_optimization") or {}).get("stage", 0)


def of_process(environment: Mapping[str, str] | None = None) -> str | None:
    """Read from the environment how the `accelerate launch` that started this process splits a model, or None."""
    variables = _present(environment)
    if variables.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return FSDP
    if variables.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    stage = variables.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
    file = variables.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file:
        stage = _zero_stage(file, "ACCELERATE_DEEPSPEED_CONFIG_FILE")
    return ZERO_3 if str(stage) == "3" else ZERO_2


def refusal(
    config: RunConfig, name: str, sharding: str | None, visible: Callable[[], Device] = device.of_stages
) -> str | None:
    """Say why stage `name` cannot run under a launch that splits the model, and what to use instead; or None.

    `visible` finds the device that there is; it is asked only where the answer depends on it.
    """
    if sharding is None:
        return None
    stage = config.stages[name]
    carried = type_of(stage).sharded
    reason = REASONS[sharding] if sharding not in carried else _own_reason(config, name, sharding, visible)
    if reason is None:
        return None
    others = ZERO_2_FILE if sharding != ZERO_2 and ZERO_2 in carried else ""
    mend = f"use {DDP_FILE}" + (f", or {others}" if others else "")
    if isinstance(stage, Ppo) and sharding not in carried and sharding in row_of(stage.type).sharded:
        reason = "DeepSpeed would place and cast the backbone that its models share several times"
        mend = f"{mend}, or `trainer: {stage.type}`"
    return f"{stage.kind} does not run under {sharding}: {reason}; {mend}"


def _own_reason(config: RunConfig, name: str, sharding: str, visible: Callable[[], Device]) -> str | None:
    """Say why a stage cannot run under a sharding that other stages of its type run under, or None."""
    stage = config.stages[name]
    if not isinstance(stage, TrainingStage):
        return None
    if sharding == ZERO_3:
        why = "the parent's adapter would be merged by one process, while the others wait for its weights"
        return why if start_of(config, name).merge else None
    if isinstance(stage, Online) and effective(stage.kind, stage.training)["beta"]:
        return REASONS[ZERO_2]
    # PPOTrainer does not tell DeepSpeed its norm. accelerate fills in 1.0 where its own file says "auto" or nothing.
    if isinstance(stage, Ppo) and effective(stage.kind, stage.training)["max_grad_norm"] != 1.0:
        return "gradients would be clipped as DeepSpeed's options say, whatever `max_grad_norm` says (leave it out)"
    precision = autocast(stage, device_of(config, name, visible())).type
    if precision == "no" and dtype.choose(config).dtype != "float32":
        return "without autocast DeepSpeed takes float32 weights only (`model.dtype: float32` works)"
    if makes(stage, "reward model") and precision != "no":
        return "in mixed precision it rounds the score head, and the saved model scores otherwise (`bf16: false` works)"
    return None
