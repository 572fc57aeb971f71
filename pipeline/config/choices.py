"""Check options of TRL, transformers and PEFT whose classes take any text, and that know a few words or a pattern.

A wrong word is found by the trainer, in its first step, or by no one: an unknown `scale_rewards` scales nothing.
"""

import enum
import re
import typing

from pipeline.config import trackers
from pipeline.config.document import shown
from pipeline.config.stage_types import KINDS, row_of
from pipeline.system.errors import nearest

# The words of an option of one stage type stand in the row of the type (`stage_types`).
_WORDS = {
    "vllm_mode": "server colocate",
    "vllm_model_impl": "transformers vllm",
    "log_level": "passive debug info warning error critical detail",
    "log_level_replica": "passive debug info warning error critical detail",
    "train_sampling_strategy": "random sequential group_by_length batch_rebalance",
    "bnb_4bit_quant_type": "nf4 fp4",
    "bnb_4bit_compute_dtype": "float32 bfloat16 float16",
}


def fault_of(kind: str, key: str, value: object, hint: object) -> str | None:
    """Say why an option does not know a text, or one of a list of them, or return None; `hint` is the option's type."""
    if isinstance(value, str) and key.endswith("_kwargs"):
        return f"expected a section of options, got {shown(value)}"
    known = _known(kind, key, hint)
    if not known:
        return None
    for word in value if isinstance(value, list) else [value]:
        if isinstance(word, str) and word not in known:
            return f"expected one of {', '.join(sorted(known))}, got {shown(word)}; {nearest(word, known)}"
    return trackers.fault_of(value) if key == trackers.KEY else None


def _known(kind: str, key: str, hint: object) -> set[str]:
    """Return the words of an option; empty where it takes any."""
    if key == trackers.KEY:
        return {trackers.NONE, *trackers.TRACKERS}
    own = row_of(kind).words if kind in KINDS else {}
    words = own.get(key, _WORDS.get(key))
    if words is not None:
        return set(words.split())
    enums = [kind for kind in typing.get_args(hint) if isinstance(kind, type) and issubclass(kind, enum.Enum)]
    return {member.value for kind in enums for member in kind}


def pattern_fault(key: str, value: object) -> str | None:
    """Say why a text that names modules is no regular expression, or return None. PEFT compiles it in its loops."""
    patterns: list[str] = []
    if key in ("target_modules", "exclude_modules", "layers_pattern") and isinstance(value, str):
        patterns = [value]
    if key in ("rank_pattern", "alpha_pattern") and isinstance(value, dict):
        patterns = list(value)
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            mend = "give a list of names, `all-linear`, or a regular expression"
            return f"{shown(pattern)} is no regular expression ({error}); {mend}"
    return None
