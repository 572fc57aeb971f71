"""Check the architecture of a new model, fields of a transformers config class, before any model is built.

transformers looks at a field where the model is built, layer by layer. A number that is absurd would fill the memory
first, and a wrong type is a traceback of one of a dozen kinds.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.config import ranges
from pipeline.config.document import kind_of
from pipeline.config.schema import Options
from pipeline.system.errors import nearest, reason_of

# Fields that are a size or a number of parts, and the largest that a new model may have. No one could train a model
# with all of them; they are there so that building it (on no device, without memory) ends.
_LARGEST = {
    1_000: "num_hidden_layers num_layers n_layer n_layers num_decoder_layers encoder_layers decoder_layers",
    10_000: ("num_attention_heads num_key_value_heads n_head n_heads num_heads multi_query_group_num state_size"),
    100_000: "n_positions n_ctx num_experts num_local_experts n_routed_experts moe_num_experts",
    1_000_000: "hidden_size n_embd d_model embedding_size word_embed_proj_dim head_dim d_kv",
    10_000_000: ("vocab_size intermediate_size ffn_dim d_ff n_inner moe_intermediate_size ffn_hidden_size"),
    100_000_000: "max_position_embeddings max_sequence_length",
}
_BOUNDS = {field: largest for largest, fields in _LARGEST.items() for field in fields.split()}
_LAYERS = _LARGEST[1_000].split()
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_DECODERS = ("bart", "mbart", "mvp")  # their language model is the decoder, whatever `is_decoder` says
_MOST_PARTS = 20_000  # layers times experts


def problems_of(values: Options) -> list[tuple[str, str]]:
    """Say what is wrong with the fields of `model.scratch.architecture`, as (field, message) pairs."""
    from transformers import CONFIG_MAPPING

    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        hint = nearest(str(model_type)[:100], CONFIG_MAPPING.keys())
        return [("model_type", f"is required: a model type of transformers, got {kind_of(model_type)}; {hint}")]
    config_class = CONFIG_MAPPING[model_type]
    defaults = config_class().to_dict()
    known = defaults.keys() | {"model_type"}
    problems: list[tuple[str, str]] = []
    for key, value in values.items():
        if key not in known:
            problems.append((key, f"unknown field of {config_class.__name__}; {nearest(key, known)}"))
        elif fault := _fault_of(key, value, defaults.get(key)):
            problems.append((key, fault))
    return problems or _refusal(config_class, values)


def fault_of_file(file: Path) -> str | None:
    """Say why a model's config.json describes no model that could be loaded, or return None.

    It is looked at before transformers reads it, which makes a list as long as the model has layers.
    """
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{file} cannot be read as JSON: {reason_of(error)}; restore it from where the model came"
    if not isinstance(raw, dict):
        return f"{file} holds {kind_of(raw)}, expected a mapping with model_type; restore it from where the model came"
    for key, value in raw.items():
        fault = _bounds_of(key, value)
        if fault is not None:
            return f"{file}: {key}: {fault}"
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING or "auto_map" in raw:
        return None  # what loads it says so
    raw, _ = PreTrainedConfig.get_config_dict(file.parent)  # infinite numbers are written as mappings
    error = _error_of(CONFIG_MAPPING[model_type].from_dict, {"config_dict": raw})
    return None if error is None else f"{file}: {_last_line(error)}; restore it from where the model came"


def _bounds_of(key: str, value: object) -> str | None:
    """Say why a model cannot have this size, or return None."""
    for number in ranges.numbers_in(value):
        if isinstance(number, int) and abs(number) > ranges.LARGEST:
            return ranges.not_usable(number)
    if key not in _BOUNDS or not isinstance(value, int) or isinstance(value, bool):
        return None
    least = 0 if key in _EXPERTS else 1  # a model without experts is dense
    if not least <= value <= _BOUNDS[key]:
        return f"must be at least {least} and at most {_BOUNDS[key]:,}, got {value}"
    return None


def _fault_of(key: str, value: object, default: object) -> str | None:
    """Say why a field cannot have this value, or return None; `default` is that of its class."""
    for number in ranges.numbers_in(value):
        if fault := ranges.not_usable(number):
            return fault
    wants_number = isinstance(default, (int, float)) and not isinstance(default, bool)
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    if wants_number and number is None and value is not None:
        return f"expected a number such as {default}, got {kind_of(value)}"
    if fault := _unknown_choice(key, value):
        return fault
    rule = _range_of(key)
    if number is not None and rule is not None and not rule.holds(number):
        return f"must be {rule}, got {number}"
    if key not in _BOUNDS or value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        return f"expected a whole number, got {kind_of(value)}"
    return _bounds_of(key, value)


def _unknown_choice(key: str, value: object) -> str | None:
    """Say why the model's code does not know a name, or return None; it looks names up where the model is built."""
    if isinstance(value, str) and (key.endswith("_act") or "activation" in key):
        from transformers.activations import ACT2FN

        return None if value in ACT2FN else f"there is no activation {kind_of(value)}; {nearest(value, ACT2FN)}"
    if key == "rope_parameters" and isinstance(value, dict) and isinstance(value.get("rope_type"), str):
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        known = {"default", *ROPE_INIT_FUNCTIONS}
        rope_type = value["rope_type"]
        return (
            None if rope_type in known else f"there is no rope_type {kind_of(rope_type)}; {nearest(rope_type, known)}"
        )
    return None


def _range_of(key: str) -> ranges.Range | None:
    """Find the range of a field by its name: models have a dozen names for each of these."""
    if "drop" in key:
        return ranges.Range(low=0, high=1, below=True)
    if key.endswith(("eps", "epsilon", "initializer_range")):
        return ranges.Range(low=0)
    return None


def _refusal(config_class: type, values: Options) -> list[tuple[str, str]]:
    """Collect what the config class itself refuses: single fields if they are the fault, else all of them together."""
    from huggingface_hub.errors import StrictDataclassClassValidationError

    fields = {key: value for key, value in values.items() if key != "model_type"}
    name = config_class.__name__
    problems: list[tuple[str, str]] = []
    error = _error_of(config_class, fields)
    if error is None:
        fault = _disagreement(values)
        return [] if fault is None else [("", fault)]
    for key, value in fields.items():
        alone = _error_of(config_class, {key: value})
        # Alone a field may not fit the defaults of the others; that says nothing of it.
        if alone is not None and not isinstance(alone, StrictDataclassClassValidationError):
            problems.append((key, f"{name} does not take {kind_of(value)}: {_last_line(alone)}"))
    return problems or [("", f"{name} does not take these fields together: {_last_line(error)}")]


def _disagreement(values: Options) -> str | None:
    """Say why these fields make no language model, which the class does not look at."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = values["model_type"]
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return f"a model of type {kind!r} does not predict the next token; take another `model_type`, e.g. llama"
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and kind not in _DECODERS and not values.get("is_decoder"):
        fault = f"a model of type {kind!r} is an encoder: each token sees those that come after it"
        return f"{fault}; set `is_decoder: true`, or take another `model_type`, e.g. llama"
    layers = max(values.get(key) or 1 for key in _LAYERS)
    experts = max(values.get(key) or 1 for key in _EXPERTS)
    if layers * experts > _MOST_PARTS:
        return f"{layers} layers of {experts} experts are {layers * experts:,} parts, expected at most {_MOST_PARTS:,}"
    heads = values.get("num_attention_heads")
    groups = values.get("num_key_value_heads")
    if heads and groups and heads % groups:
        return f"num_attention_heads ({heads}) must be a multiple of num_key_value_heads ({groups})"
    return None


def _error_of(config_class: Callable[..., Any], fields: Options) -> Exception | None:
    """Return the error of a config class at these fields, or None."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it warns of what it then refuses, or of what is no fault here
    try:
        config_class(**copy.deepcopy(fields))  # it writes its defaults into sections that it is given
    except Exception as error:  # huggingface_hub's validators have classes of their own, models raise what they like
        return error
    finally:
        logging.set_verbosity(verbosity)
    return None


def _last_line(error: Exception) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[-1].strip()
