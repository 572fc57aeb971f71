"""Tell what decides a stage's speed beside the sizes of its data, and what of it has changed since it was measured."""

import platform
from collections.abc import Mapping

from pipeline.base import dtype
from pipeline.config.options import effective
from pipeline.config.schema import RunConfig, TrainingStage
from pipeline.system.device import Device, num_cores
from pipeline.system.digests import digest

Basis = dict[str, str]  # what it is -> its value, in words or as a digest

CORES = "cores"
# Options of `training:` that decide how fast a step is.
_OPTIONS = ("bf16", "fp16", "tf32", "gradient_checkpointing", "num_ppo_epochs", "num_iterations", "optim")
_OPTIONS += ("torch_compile", "use_liger_kernel", "precompute_ref_log_probs")
_OPTIONS += ("steps_per_generation", "generation_batch_size", "use_vllm", "vllm_mode")
# What is long: that it is another one is all that is said of it.
_AS_DIGEST = ("model", "lora", "accelerate_config", "machine", "quantization")


def of_stage(config: RunConfig, name: str, device: Device, processes: int, launch: str | None) -> Basis:
    """Return what decides a stage's speed beside the sizes of its data.

    `launch`: the digest of how it is launched; None: by itself.
    """
    stage = config.stages[name]
    values: dict[str, object] = {
        "machine": platform.node(),
        "device": device.name,
        CORES: num_cores(),
        "processes": processes,
        "accelerate_config": launch,
        "model": config.model.model_dump(mode="json"),
        "lora": getattr(stage, "lora", None),
        "type of weights": dtype.choose(config).dtype,
        "quantization": config.quantization,
        "type of stage": stage.kind,
    }
    options = effective(stage.kind, stage.training) if isinstance(stage, TrainingStage) else {}
    values |= {f"training.{key}": options[key] for key in _OPTIONS if options.get(key) is not None}
    return {key: digest(value) if key in _AS_DIGEST else str(value) for key, value in values.items()}


def differences(measured: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Say what has changed since a stage was measured."""
    words: list[str] = []
    for key in {**now, **measured}:
        before = measured.get(key, "not set")
        after = now.get(key, "not set")
        if before == after:
            continue
        if key in _AS_DIGEST:
            words.append(f"another {key}")
        elif key == CORES:
            words.append(f"{before} core{'' if before == '1' else 's'}, here {'is' if after == '1' else 'are'} {after}")
        else:
            words.append(f"{key} {before}, now {after}")
    return words
