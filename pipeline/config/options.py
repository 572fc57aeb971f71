"""Check sections of the config that belong to TRL, PEFT and transformers: names, types and owners of options.

We re-declare none of them. A section is checked against the fields of the class that will take it, every value is
coerced to its field's type (YAML's `1e-5` is a string to many parsers), and fields the pipeline sets itself are
refused with the reason.
"""

import dataclasses
import enum
import functools
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import BeforeValidator, ConfigDict, TypeAdapter, ValidationError

from pipeline.config import architecture, choices, ranges
from pipeline.config.document import shown
from pipeline.config.schema import Options, Ppo, Stage, TrainingStage
from pipeline.config.stage_types import KINDS, config_class, row_of, type_of
from pipeline.system import kept
from pipeline.system.digests import digest
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
    "a tracker's run is called RUN/STAGE; WANDB_PROJECT names another project at wandb": "run_name project",
    "trackio keeps its data on this machine": "trackio_space_id trackio_bucket_id trackio_static_space_id",
    "a stage never uploads; `rlhf push` uploads what `rlhf export` has written": (
        "push_to_hub hub_model_id hub_strategy hub_token hub_private_repo log_completions_hub_repo"
    ),
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
LIBRARY_SECTIONS = {"training": "transformers:TrainingArguments", "quantization": "transformers:BitsAndBytesConfig"}
LIBRARY_SECTIONS |= {"lora": "peft:LoraConfig"}


def _by_option(reasons: Mapping[str, str]) -> dict[str, str]:
    return {option: reason for reason, options in reasons.items() for option in options.split()}


OWNED = _by_option(_REASONS)
# What the pipeline chooses where the user is silent, beside TRL's own defaults. README lists these.
DEFAULTS: dict[str, Mapping[str, Any]] = {"all": {"report_to": "none", "save_total_limit": 2}}
DEFAULTS |= {name: row.defaults for name, row in KINDS.items() if row.defaults}


def owned_by(kind: str) -> dict[str, str]:
    """Name the options of a section that the pipeline sets itself, with the reasons."""
    if kind == "lora":
        return _by_option(_LORA_REASONS)
    if kind == "quantization":
        return {}
    return OWNED | _by_option(row_of(kind).refused) if kind in KINDS else OWNED


def target_of(kind: str) -> type[Any]:
    """Find the class that takes the section `kind`: a stage type, `training`, `lora` or `quantization`."""
    return pkgutil.resolve_name(LIBRARY_SECTIONS[kind]) if kind in LIBRARY_SECTIONS else config_class(kind)


@functools.cache
def _field_types(kind: str) -> dict[str, Any]:
    target = target_of(kind)
    if dataclasses.is_dataclass(target) and kind != "quantization":
        hints = typing.get_type_hints(target)
        return {field.name: hints[field.name] for field in dataclasses.fields(target) if field.init}
    # BitsAndBytesConfig takes its options as arguments and annotates none of them: types come from the defaults.
    parameters = inspect.signature(target.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.name not in ("self", "kwargs")}
    return {name: Any if default is None else type(default) for name, default in defaults.items()}


def _default_of(kind: str, key: str) -> Any:
    field = target_of(kind).__dataclass_fields__.get(key)
    if field is not None and field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return dataclasses.MISSING if field is None else field.default


def _no_bool(value: object) -> object:
    """Refuse a truth value where a number or text is expected."""
    if isinstance(value, bool):
        raise ValueError("expected a number or text, got true or false")
    return value


def _takes_bool(hint: object) -> bool:
    """Tell whether a type allows `true` or `false` as itself."""
    inner = typing.get_args(hint)
    return bool in inner or any(isinstance(value, bool) or _takes_bool(value) for value in inner)


@functools.cache
def _adapter(kind: str, key: str) -> TypeAdapter[Any]:
    hint: Any = _field_types(kind)[key]
    if dataclasses.is_dataclass(hint):
        hint = Any  # pydantic would build the dataclass from a mapping; PEFT does that itself
    if hint is list or typing.get_origin(hint) is list:  # TRL takes one loss type or several
        hint = typing.Annotated[hint, BeforeValidator(lambda value: value if isinstance(value, list) else [value])]
    if hint is not bool and not _takes_bool(hint):
        hint = typing.Annotated[hint, BeforeValidator(_no_bool)]  # pydantic takes `true` for 1
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def names_of(kind: str) -> set[str]:
    """Return the options that a section takes."""
    return _field_types(kind).keys() - owned_by(kind).keys()


def check_section(
    kind: str, values: Options, elsewhere: Callable[[str], str | None] = lambda key: None
) -> tuple[Options, list[tuple[str, str]]]:
    """Check and coerce one section. `elsewhere` says where an unknown option belongs, if it does anywhere.

    Returns the coerced options and the problems, as (key, message) pairs.
    """
    if kind == "architecture":
        return values, architecture.problems_of(values)
    types = _field_types(kind)
    owned = owned_by(kind)
    coerced: Options = {}
    problems: list[tuple[str, str]] = []
    for key, value in values.items():
        if kind == "lora" and key in owned and value == _default_of(kind, key):
            continue  # many write PEFT's own default out
        if key in owned:
            problems.append((key, f"is set by the pipeline: {owned[key]}"))
        elif key not in types:
            hint = elsewhere(key) or nearest(key, names_of(kind))
            problems.append((key, f"unknown option of {target_of(kind).__name__}; {hint}"))
        else:
            try:
                coerced[key] = _coerced(kind, key, value)
            except ValidationError as error:
                expected = types[key].__name__ if isinstance(types[key], type) else str(types[key])
                problems.append((key, f"expected {expected}, got {shown(value)}: {error.errors()[0]['msg']}"))
                continue
            fault = _fault_of(kind, key, coerced[key])
            if fault is not None:
                problems.append((key, fault))
            coerced[key] = _plain(coerced[key])
    return coerced, problems


def _coerced(kind: str, key: str, value: object) -> object:
    """Return the value in the type of its field.

    Raises:
        ValidationError: if it cannot have that type.
    """
    if (kind, key) == ("grpo", "scale_rewards") and isinstance(value, bool):
        value = "group" if value else "none"  # as GRPOConfig itself reads them
    return _adapter(kind, key).validate_python(value)


def _plain(value: Any) -> Any:
    """Return a value as YAML has it: the word of a choice, which the library's class makes a choice of again."""
    if isinstance(value, enum.Enum):
        return value.value
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _fault_of(kind: str, key: str, value: object) -> str | None:
    """Say why a value of the right type cannot work, or return None."""
    if kind == "lora" and key == "init_lora_weights" and value not in _LORA_STARTS:
        why = "an adapter must start at exactly 0 and leave the base's weights alone"
        return f"{value!r} starts a stage as another model than its parent; {why}: true or gaussian"
    if key == "max_completion_length" and value is None:
        return "must be a number of tokens, got null"
    if fault := choices.fault_of(kind, key, value, _field_types(kind)[key]):
        return fault
    if kind == "lora" and (fault := choices.pattern_fault(key, value)):
        return fault
    return ranges.fault_of(value, range_of(kind, key))


def range_of(kind: str, key: str) -> ranges.Range | None:
    """Find the range of an option, if it has one; `kind` is a stage type, `training`, `lora` or `quantization`."""
    own = row_of(kind).bounds if kind in KINDS else {}
    return own.get(key, ranges.RANGES.get(key))


def with_defaults(kind: str, training: Options) -> Options:
    """Lay the pipeline's defaults under the `training:` section of a stage of this kind."""
    return {**DEFAULTS["all"], **DEFAULTS.get(kind, {}), **training}


def effective(kind: str, training: Options) -> Options:
    """Return all options of a stage's `training:` section: the user's, our defaults, and TRL's plain defaults."""
    return _defaults_of_trl(kind) | with_defaults(kind, training)


@functools.cache
def _defaults_of_trl(kind: str) -> Options:
    """Return the defaults of a kind's config class that are plain values; they are kept, or TRL is imported."""

    def find_out() -> Options:
        fields = config_class(kind).__dataclass_fields__
        return {name: field.default for name, field in fields.items() if _is_plain(field.default)}

    return kept.remembered("defaults", lambda: digest([kept.installation(), kind]), find_out)


def _is_plain(value: object) -> bool:
    return value is None or type(value) in (bool, int, float, str)


def length_limit(stage: Stage) -> tuple[str, int | None]:
    """Return the option that limits a row's length, and the limit in tokens; None where texts are cut into pieces."""
    if isinstance(stage, Ppo) and stage.prompt_baseline == "reference":  # its rows are prompts with their answers
        longest = stage.max_prompt_length + effective(stage.kind, stage.training)["response_length"]
        return "max_prompt_length + training.response_length", longest
    key = type_of(stage).length_option
    return ("max_prompt_length", None) if key is None else (key, value_at(stage, key))


def value_at(stage: Stage, key: str) -> Any:
    """Return the value of a stage's own key, or of a `training.` option with all defaults beneath it."""
    section, dot, option = key.rpartition(".")
    if not dot:
        return getattr(stage, key)
    assert section == "training"
    assert isinstance(stage, TrainingStage)
    return effective(stage.kind, stage.training)[option]
