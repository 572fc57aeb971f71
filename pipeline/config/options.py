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
import pkgutil
import tempfile
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from pipeline.config import architecture, choices, ranges
from pipeline.config.document import shown
from pipeline.config.schema import Ppo, Stage, TrainingStage
from pipeline.config.stage_types import STAGE_TYPES, config_class, type_of
from pipeline.system.errors import nearest

_REASONS = {
    "a stage writes to the run folder": "output_dir",
    "set `seed` of the run or of the stage": "seed data_seed",
    "set `model:` and `quantization:`": "model_init_kwargs trust_remote_code",
    "a stage resumes from its newest complete checkpoint by itself": "resume_from_checkpoint ignore_data_skip",
    "a checkpoint without optimizer state cannot be resumed": "save_only_model",
    "a stage's output is its last state": "load_best_model_at_end",
    "the pipeline tokenises rows": "remove_unused_columns dataset_text_field dataset_kwargs assistant_only_loss",
    "set `too_long` of the run; trainers cut nothing": "truncation_mode",
    "the run has one tokenizer; set it under `tokenizer:`": "chat_template_path eos_token pad_token",
    "generation stops at the run's eos token": "stop_token stop_token_id",
    "the pipeline gives a stage its models": "sft_model_path reward_model_path model_adapter_name ref_adapter_name",
    "the pipeline decides what a stage does": "do_train do_predict",
    "the reference of a stage is its parent, always": "sync_ref_model",
    "it never uploads; use huggingface_hub": "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo",
    "give the stage `eval_data`": "do_eval",
    "TRL computes it from other sizes": "world_size batch_size micro_batch_size mini_batch_size local_batch_size",
    "TRL computes it from other options": "num_total_batches local_mini_batch_size",
    "give the stage or the run an `accelerate_config`": "fsdp fsdp_config deepspeed parallelism_config",
    "it rounds the weights themselves before they are saved": "bf16_full_eval fp16_full_eval",
    "a signal would end a training as if it were finished; set `save_steps`": "enable_jit_checkpoint",
    "it changes the model between the checks of a stage, and a saved model is read back without it": (
        "use_liger_kernel liger_kernel_config"
    ),
}
_LORA_REASONS = {
    "the stage's type decides it": "task_type",
    "the pipeline saves a reward model's score head, and adapters of one base share the rest": "modules_to_save",
    "the pipeline decides which adapter trains": "inference_mode",
    "the adapter lies on the run's base": "base_model_name_or_path revision auto_mapping peft_type peft_version",
    "weights outside of adapters cannot differ from stage to stage": (
        "bias trainable_token_indices target_parameters layer_replication ensure_weight_tying"
    ),
    "an adapter with a bias cannot be merged into a layer that has none": "lora_bias",
    "it changes the base's weights, which all stages share": "loftq_config corda_config eva_config lora_ga_config",
    "PPO and the reference put several adapters on one base, which it does not support": (
        "alora_invocation_tokens arrow_config kasa_config megatron_config megatron_core monteclora_config "
        "qalora_group_size use_bdlora use_qalora velora_config runtime_config"
    ),
}
# Where an adapter starts at exactly 0 and the weights beneath it stay as they are.
_LORA_STARTS = (True, "gaussian")
_CLASSES = {"training": "transformers:TrainingArguments", "quantization": "transformers:BitsAndBytesConfig"}
_CLASSES |= {"lora": "peft:LoraConfig"}
# Variables by which a process knows that it is one of several.
_LAUNCHED = ("ACCELERATE_", "FSDP_", "RANK", "LOCAL_RANK", "WORLD_SIZE", "PMI_", "OMPI_", "MV2_")


def _by_option(reasons: Mapping[str, str]) -> dict[str, str]:
    return {option: reason for reason, options in reasons.items() for option in options.split()}


OWNED = _by_option(_REASONS)
# What the pipeline chooses where the user is silent, beside TRL's own defaults. README lists these.
DEFAULTS: dict[str, Mapping[str, Any]] = {"all": {"report_to": "none", "save_total_limit": 2}}
DEFAULTS |= {name: row.defaults for name, row in STAGE_TYPES.items() if row.defaults}


def owned_by(kind: str) -> dict[str, str]:
    """The options of a section that the pipeline sets itself, with the reasons."""
    if kind == "lora":
        return _by_option(_LORA_REASONS)
    if kind == "quantization":
        return {}
    return OWNED | _by_option(STAGE_TYPES[kind].refused) if kind in STAGE_TYPES else OWNED


def _target(kind: str) -> type:
    """The class that takes the section `kind`: a stage type, `training`, `lora` or `quantization`."""
    return pkgutil.resolve_name(_CLASSES[kind]) if kind in _CLASSES else config_class(kind)


@functools.cache
def _field_types(kind: str) -> dict[str, Any]:
    target = _target(kind)
    if dataclasses.is_dataclass(target) and kind != "quantization":
        hints = typing.get_type_hints(target)
        return {field.name: hints[field.name] for field in dataclasses.fields(target) if field.init}
    # BitsAndBytesConfig takes its options as arguments and annotates none of them: types come from the defaults.
    parameters = inspect.signature(target.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in ("self", "kwargs")}
    return {name: Any if default is None else type(default) for name, default in defaults.items()}


def _default_of(kind: str, key: str) -> Any:
    field = _target(kind).__dataclass_fields__.get(key)
    if field is not None and field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING if field is None else field.default


def _no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a truth value is none")
    return value


def _takes_bool(hint: Any) -> bool:
    """Whether `true` or `false` is among what a type allows, as itself."""
    inner = typing.get_args(hint)
    return bool in inner or any(isinstance(value, bool) or _takes_bool(value) for value in inner)


@functools.cache
def _adapter(kind: str, key: str) -> TypeAdapter:
    hint = _field_types(kind)[key]
    if dataclasses.is_dataclass(hint):
        hint = Any  # pydantic would build the dataclass from a mapping; PEFT does that itself
    if hint is list or typing.get_origin(hint) is list:  # TRL takes one loss type or several
        hint = typing.Annotated[hint, BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
    if hint is not bool and not _takes_bool(hint):
        hint = typing.Annotated[hint, BeforeValidator(_no_bool)]  # pydantic takes `true` for 1
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def check_section(kind: str, values: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Check and coerce one section.

    Returns the coerced options and the problems found, as (key, message) pairs.
    """
    if kind == "architecture":
        return values, architecture.problems_of(values)
    types, owned = _field_types(kind), owned_by(kind)
    coerced, problems = {}, []
    for key, value in values.items():
        if kind == "lora" and key in owned and value == _default_of(kind, key):
            continue  # many write PEFT's own default out
        if key in owned:
            problems.append((key, f"is set by the pipeline: {owned[key]}"))
        elif key not in types:
            hint = nearest(key, types.keys() - owned.keys())
            problems.append((key, f"unknown option of {_target(kind).__name__}; {hint}"))
        else:
            try:
                if (kind, key) == ("grpo", "scale_rewards") and isinstance(value, bool):
                    value = "group" if value else "none"  # as GRPOConfig itself reads them
                coerced[key] = _adapter(kind, key).validate_python(value)
                if fault := _unfit(kind, key, coerced[key]):
                    problems.append((key, fault))
            except ValidationError as error:
                expected = types[key].__name__ if isinstance(types[key], type) else str(types[key])
                problems.append((key, f"expected {expected}, got {shown(value)}: {error.errors()[0]['msg']}"))
    return coerced, problems


def _unfit(kind: str, key: str, value: Any) -> str | None:
    """Why a value of the right type cannot work, or None."""
    if kind == "lora" and key == "init_lora_weights" and value not in _LORA_STARTS:
        why = "an adapter must start at exactly 0 and leave the base's weights alone"
        return f"{value!r} starts a stage as another model than its parent; {why}: true or gaussian"
    if key == "max_completion_length" and value is None:
        return "must be a number of tokens, got null"
    if fault := choices.fault_of(kind, key, value, _field_types(kind)[key]):
        return fault
    if kind == "lora" and (fault := choices.pattern_fault(key, value)):
        return fault
    return ranges.fault_of(kind, key, value)


def with_defaults(stage_type: str, training: dict[str, Any]) -> dict[str, Any]:
    """The `training:` section of a stage with the pipeline's defaults beneath it."""
    return DEFAULTS["all"] | DEFAULTS.get(stage_type, {}) | training


def effective(stage_type: str, training: dict[str, Any]) -> dict[str, Any]:
    """All options of a stage's `training:` section: the given ones, ours, and TRL's defaults."""
    fields = config_class(stage_type).__dataclass_fields__
    return {key: field.default for key, field in fields.items()} | with_defaults(stage_type, training)


def precision(stage_type: str, training: dict[str, Any]) -> str:
    """The autocast of a stage as accelerate names it: bf16, fp16 or no. TRL's default is bf16, and PPO has none."""
    if not STAGE_TYPES[stage_type].autocast:
        return "no"
    if training.get("fp16"):
        return "fp16"
    return "no" if training.get("bf16") is False else "bf16"


def length_limit(stage: Stage) -> tuple[str, int | None]:
    """The option that limits a row's length in tokens, and the limit; None where texts are cut into pieces."""
    if isinstance(stage, Ppo) and stage.prompt_baseline == "reference":  # its rows are prompts with their answers
        longest = stage.max_prompt_length + effective(stage.type, stage.training)["response_length"]
        return "max_prompt_length + training.response_length", longest
    key = type_of(stage).length_option
    return ("max_prompt_length", None) if key is None else (key, value_at(stage, key))


def value_at(stage: Stage, key: str) -> Any:
    """The value of a stage's own key, or of a `training.` option with all defaults beneath it."""
    section, dot, option = key.rpartition(".")
    if not dot:
        return getattr(stage, key)
    assert section == "training"
    assert isinstance(stage, TrainingStage)
    return effective(stage.type, stage.training)[option]


@contextlib.contextmanager
def _without_a_trace() -> Iterator[None]:
    """Build TrainingArguments as a process of its own would, and forget it.

    It joins the processes that the environment tells of, writes ACCELERATE_* variables that every stage's process
    would inherit, and makes the device it found that of the whole process.
    """
    from accelerate.state import AcceleratorState, PartialState

    environment, states = dict(os.environ), (PartialState._shared_state, AcceleratorState._shared_state)
    before = [dict(state) for state in states]
    try:
        for name in environment:
            if name.startswith(_LAUNCHED):
                del os.environ[name]
        for state in states:
            state.clear()
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        for state, content in zip(states, before, strict=True):
            state.clear()
            state.update(content)


def rehearse(kind: str, values: dict[str, Any]) -> str | None:
    """Build the class that takes the section, to let its own cross-field checks speak before any compute.

    Devices are left out of it (`use_cpu`), so that a plan can be made on another machine than the training.

    Returns the error's message, or None.
    """
    try:
        if kind in _CLASSES:
            _target(kind)(**values)
            return None
        device = {"use_cpu": True, "tf32": None, "output_dir": tempfile.gettempdir()}
        with _without_a_trace():
            args = config_class(kind)(**with_defaults(kind, values) | device)
    except (ValueError, TypeError, AttributeError, ImportError) as error:
        return " ".join(str(error).split())
    return _sizes_of_ppo(args) if STAGE_TYPES[kind].section is Ppo else None


def _sizes_of_ppo(args: Any) -> str | None:
    """What is wrong with the sizes of a PPO stage, or None.

    An update's batch is cut into mini-batches, and these into micro-batches.
    """
    batch = args.gradient_accumulation_steps * args.per_device_train_batch_size
    if batch % args.num_mini_batches:
        return "gradient_accumulation_steps * per_device_train_batch_size must be a multiple of num_mini_batches"
    mini = batch // args.num_mini_batches
    micro = min(mini, args.per_device_train_batch_size)
    if mini % micro:
        seen = f"a mini-batch of {mini} is cut into micro-batches of {micro} and {mini % micro}, which weigh the same"
        return f"{seen}; make {mini} (batch / num_mini_batches) a multiple of per_device_train_batch_size"
    if batch // micro % args.gradient_accumulation_steps:
        seen = f"an update has {batch // micro} micro-batches and takes a step every {args.gradient_accumulation_steps}"
        mend = "choose gradient_accumulation_steps and num_mini_batches so that one divides the other"
        return f"{seen}, so that gradients of one update would be applied in the next; {mend}"
    if args.whiten_rewards and mini < 8:
        return f"whiten_rewards needs mini-batches of at least 8, and these have {mini}; lower num_mini_batches"
    return None
