"""Write the Python that loads a model with transformers and peft alone, so that it computes and ends as in its run."""

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Loading:
    """Say what is loaded: a folder or hub id of whole weights, or of an adapter on a `base`.

    `dtype` is the type to load in; None: as it is stored. `settings`: whether the folder has generation settings.
    """

    folder: str
    scores: bool = False
    trust_remote_code: bool = False
    dtype: str | None = None
    base: str | None = None
    revision: str | None = None
    quantization: dict[str, Any] | None = None
    settings: bool = False


def loading_code(loading: Loading) -> str:
    """Return lines that define `tokenizer` and `model`."""
    scores = loading.scores
    auto = "AutoModelForSequenceClassification" if scores else "AutoModelForCausalLM"
    classes = ["AutoTokenizer", auto]
    padding = ', padding_side="right"' if scores else ""
    options = ", num_labels=1" if scores else ""
    if loading.trust_remote_code:
        options += ", trust_remote_code=True"
    if loading.dtype is not None:
        options = f', dtype="{loading.dtype}"{options}'
    lines = [f"tokenizer = AutoTokenizer.from_pretrained({quoted(loading.folder)}{padding})"]
    if loading.base is None:
        lines.append(f"model = {auto}.from_pretrained({quoted(loading.folder)}{options})")
        lines += _head("model", loading)
        return "\n".join([f"from transformers import {', '.join(classes)}", *lines])
    if loading.revision:
        options += f", revision={quoted(loading.revision)}"
    if loading.quantization:
        classes.append("BitsAndBytesConfig")
        options += f", quantization_config=BitsAndBytesConfig(**{loading.quantization})"
    lines.append(f"base = {auto}.from_pretrained({quoted(loading.base)}{options})")
    if scores:  # a score is read at the last token that is not pad, and the base may have another pad token, or none
        lines.append("base.config.pad_token_id = tokenizer.pad_token_id")
        lines += _head("base", loading)
    else:
        classes.append("GenerationConfig")
        lines.append(f"base.generation_config = {_generation(loading)}")
    lines.append(f"model = PeftModel.from_pretrained(base, {quoted(loading.folder)})")
    return "\n".join([f"from transformers import {', '.join(classes)}", "from peft import PeftModel", *lines])


def _generation(loading: Loading) -> str:
    """Write the settings of a policy on a base: the base's own may end at another token, or sample otherwise."""
    if loading.settings:
        return f"GenerationConfig.from_pretrained({quoted(loading.folder)})"
    return "GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)"


def _head(model: str, loading: Loading) -> list[str]:
    """Write what lets a score head compute in float32, as in the run, on a rounded model."""
    if not loading.scores or loading.dtype in (None, "float32"):
        return []
    return [f"{model}.score.float().register_forward_pre_hook(lambda head, hidden: hidden[0].float())"]


def quoted(value: str) -> str:
    """Write a path or name as a Python string, whatever characters it has: JSON's strings are Python's too."""
    return json.dumps(value, ensure_ascii=False)
