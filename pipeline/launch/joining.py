"""Let a stage's process find the others that were launched with it, and forget what the launcher would change."""

import datetime
import os

import torch
import transformers
from accelerate import DistributedType, PartialState

from pipeline.config import options, precision
from pipeline.config.schema import Options, RunConfig, TrainingStage
from pipeline.system import device
from pipeline.system.errors import UserError


def join_processes(training: Options) -> PartialState:
    """Join the other processes of `accelerate launch`, on CPUs where there is no GPU or none is wanted.

    accelerate starts several CPU processes but does not tell them so: each would run alone, as the only one. Whoever
    joins first decides the backend and the timeout, so TRL's config class would come too late with them.
    """
    on_cpu = bool(training.get("use_cpu")) or device.wants_cpu() or not torch.cuda.is_available()
    if on_cpu:
        os.environ[device.USE_CPU] = "true"
    fields = transformers.TrainingArguments.__dataclass_fields__
    seconds = training.get("ddp_timeout", fields["ddp_timeout"].default)
    state = PartialState(
        cpu=on_cpu,
        backend=training.get("ddp_backend"),
        timeout=datetime.timedelta(seconds=seconds),
    )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != world_size:
        raise UserError(f"{world_size} processes were started, but only {state.num_processes} found each other")
    assert state.device is not None, "it has just been made"
    num_gpus = torch.cuda.device_count() if state.device.type == "cuda" else 0
    if state.distributed_type == DistributedType.NO and num_gpus > 1:
        raise UserError(
            f"one process sees {num_gpus} GPUs: torch's DataParallel would make every batch {num_gpus} times as large. "
            "Set CUDA_VISIBLE_DEVICES to one of them, e.g. CUDA_VISIBLE_DEVICES=0, or start a process for each with "
            "`accelerate launch --config_file accelerate_configs/multi_gpu.yaml`"
        )
    return state


def forget_options(config: RunConfig, name: str) -> list[str]:
    """Take the launcher's precision and accumulation out of the environment; return what to say of those that differ.

    accelerate would put them in the place of the stage's own: of precision where `bf16` and `fp16` are false, and of
    both in PPO. The stage's processes have joined.
    """
    stage = config.stages[name]
    given = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    steps = os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    own_precision = "no"
    own_steps = steps
    if isinstance(stage, TrainingStage):
        own_precision = precision.autocast(stage, precision.device_of(config, name, device.of_torch())).type
        own_steps = str(options.effective(stage.kind, stage.training)["gradient_accumulation_steps"])
    messages = []
    if given not in ("no", own_precision):
        messages.append(
            f"mixed_precision {given} of the launcher is ignored: precision comes from model.dtype and bf16"
        )
    if steps != own_steps and steps is not None:
        messages.append(
            f"gradient_accumulation_steps {steps} of the launcher is ignored: the stage's own is {own_steps}"
        )
    return messages
