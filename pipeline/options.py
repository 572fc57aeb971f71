"""Sections of the config that belong to TRL, PEFT and transformers: names, types and owners of their options.

We re-declare none of them. A section is checked against the fields of the class that will take it, every value is
coerced to its field's type (YAML's `1e-5` is a string to many parsers), and fields the pipeline sets itself are
refused with the reason.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import tempfile
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from pipeline.errors import nearest
from pipeline.trainers import config_class

_REASONS = {
    "a stage writes to the run folder": "output_dir",
    "set `seed` of the run or of the stage": "seed data_seed",
    "set `model:` and `quantization:`": "model_init_kwargs trust_remote_code",
    "a stage resumes from its newest complete checkpoint by itself": "resume_from_checkpoint ignore_data_skip",
    "a checkpoint without optimizer state cannot be resumed": "save_only_model",
    "a stage's output is its last state": "load_best_model_at_end",
    "rows are tokenised by the pipeline, the same way in every stage": (
        "remove_unused_columns dataset_text_field dataset_kwargs assistant_only_loss"
    ),
    "the run has one tokenizer; set it under `tokenizer:`": "chat_template_path eos_token pad_token",
    "generation stops at the run's eos token": "stop_token stop_token_id",
    "the pipeline wires the stages' models itself": (
        "sft_model_path reward_model_path model_adapter_name ref_adapter_name do_train do_predict"
    ),
    "the reference of a stage is its parent, always": "sync_ref_model",
    "the pipeline never uploads; push a finished output with huggingface_hub": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo"
    ),
    "give the stage `eval_data`": "do_eval",
    "TRL computes it from the other sizes": (
        "world_size num_total_batches micro_batch_size local_batch_size batch_size mini_batch_size local_mini_batch_size"
    ),
}
_PPO_REASONS = {
    "PPOTrainer samples outside autocast, so mixed precision would make the first ratio differ from 1; PPO computes in "
    "`model.dtype`": "bf16 fp16",
    "PPO's length is `total_episodes`": "max_steps",
    "PPOTrainer cannot resume from a checkpoint; a stopped PPO stage starts anew": "save_strategy save_steps",
}
_LORA_REASONS = {
    "the stage's type decides it": "task_type",
    "a reward model's score head is saved by the pipeline; adapters of one base share all other modules": "modules_to_save",
    "the pipeline decides which adapter trains": "inference_mode",
}


def _by_option(reasons: dict[str, str]) -> dict[str, str]:
    return {option: reason for reason, options in reasons.items() for option in options.split()}


OWNED = _by_option(_REASONS)
# What the pipeline chooses where the user is silent, beside TRL's own defaults. README lists these.
DEFAULTS = {
    "all": {"report_to": "none", "save_total_limit": 2},
    "pretrain": {"packing": True, "packing_strategy": "wrapped"},
    "sft": {"completion_only_loss": True},  # TRL's default would train on prompts too when rows are token ids
    "ppo": {"num_sample_generations": 0, "missing_eos_penalty": 1.0},
}


def owned_by(kind: str) -> dict[str, str]:
    """The options of a section that the pipeline sets itself, with the reasons."""
    if kind in ("lora", "quantization"):
        return _by_option(_LORA_REASONS) if kind == "lora" else {}
    return OWNED | (_by_option(_PPO_REASONS) if kind == "ppo" else {})


def _target(kind: str) -> type:
    """The class that takes the section `kind`: a stage type, `training`, `lora` or `quantization`."""
    if kind == "lora":
        from peft import LoraConfig

        return LoraConfig
    if kind == "quantization":
        from transformers import BitsAndBytesConfig

        return BitsAndBytesConfig
    if kind == "training":
        from transformers import TrainingArguments

        return TrainingArguments
    return config_class(kind)


@functools.cache
def _field_types(kind: str) -> dict[str, Any]:
    target = _target(kind)
    if dataclasses.is_dataclass(target) and kind != "quantization":
        hints = typing.get_type_hints(target)
        return {field.name: hints[field.name] for field in dataclasses.fields(target) if field.init}
    # BitsAndBytesConfig takes its options as arguments and annotates none of them: types come from the defaults.
    parameters = inspect.signature(target.__init__).parameters.values()
    return {
        p.name: Any if p.default is None else type(p.default) for p in parameters if p.name not in ("self", "kwargs")
    }


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a truth value is none")
    return value


@functools.cache
def _adapter(kind: str, key: str) -> TypeAdapter:
    hint = _field_types(kind)[key]
    if dataclasses.is_dataclass(hint):
        hint = Any  # pydantic would build the dataclass from a mapping; PEFT does that itself
    if hint is list or typing.get_origin(hint) is list:  # TRL takes one loss type or several
        hint = typing.Annotated[hint, BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
    if hint is not bool and bool not in typing.get_args(hint):
        hint = typing.Annotated[hint, BeforeValidator(_no_bool)]  # pydantic takes `true` for 1
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def check_section(kind: str, values: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Check and coerce one section.

    Returns the coerced options and the problems found, as (key, message) pairs.
    """
    types = _field_types(kind)
    owned = owned_by(kind)
    coerced, problems = {}, []
    for key, value in values.items():
        if key in owned:
            problems.append((key, f"is set by the pipeline: {owned[key]}"))
        elif key not in types:
            problems.append(
                (key, f"unknown option of {_target(kind).__name__}; {nearest(key, set(types) - set(owned))}")
            )
        else:
            try:
                coerced[key] = _adapter(kind, key).validate_python(value)
            except ValidationError as error:
                expected = getattr(types[key], "__name__", None) or str(types[key])
                problems.append((key, f"expected {expected}, got {value!r}: {error.errors()[0]['msg']}"))
    return coerced, problems


def check_architecture(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Check the fields of a new model's architecture against the config class of its `model_type`."""
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type")
    if model_type not in CONFIG_MAPPING:
        known = list(CONFIG_MAPPING.keys())
        return [("model_type", f"is required, got {model_type!r}; {nearest(str(model_type), known)}")]
    known = set(CONFIG_MAPPING[model_type]().to_dict())
    return [
        (key, f"unknown field of {CONFIG_MAPPING[model_type].__name__}; {nearest(key, known)}")
        for key in values.keys() - known - {"model_type"}
    ]


def with_defaults(stage_type: str, training: dict[str, Any]) -> dict[str, Any]:
    """The `training:` section of a stage with the pipeline's defaults beneath it."""
    return DEFAULTS["all"] | DEFAULTS.get(stage_type, {}) | training


@contextlib.contextmanager
def _environ_kept() -> Iterator[None]:
    # TrainingArguments writes ACCELERATE_* variables, which every stage's process would inherit.
    before = dict(os.environ)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def rehearse(kind: str, values: dict[str, Any]) -> str | None:
    """Build the class that takes the section, to let its own cross-field checks speak before any compute.

    Devices are left out of it (`use_cpu`), so that a plan can be made on another machine than the training.

    Returns the error's message, or None.
    """
    try:
        if kind in ("lora", "quantization"):
            _target(kind)(**values)
        else:
            device = {"use_cpu": True, "tf32": None, "output_dir": tempfile.gettempdir()}
            with _environ_kept():
                args = config_class(kind)(**with_defaults(kind, values) | device)
            if (
                kind == "ppo"
                and args.gradient_accumulation_steps * args.per_device_train_batch_size % args.num_mini_batches
            ):
                return (
                    "gradient_accumulation_steps * per_device_train_batch_size must be a multiple of num_mini_batches"
                )
    except (ValueError, TypeError, ImportError) as error:
        return " ".join(str(error).split())
    return None
