"""Choose the type of the weights of a run's models, where the config leaves it to us (`model.dtype: auto`).

A run has one type, since all its stages share one base. It is the type in which the base is stored, as long as the
base's weights stay as they are. Weights that are written are float32: bfloat16 would round most steps of an optimizer,
and most of an adapter that is merged, to nothing.
"""

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast, get_args

from safetensors import SafetensorError, safe_open

from pipeline.base import base_model
from pipeline.config.lineage import needs_float32
from pipeline.config.rules import FLASH_IN_FLOAT32, uses_flash_attention
from pipeline.config.schema import Dtype, RunConfig
from pipeline.records import manifest
from pipeline.system import kept
from pipeline.system.digests import digest
from pipeline.system.errors import UserError

_KIND = "stored types"  # of what is kept
_IN_FILES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors names them


@dataclass(frozen=True)
class Choice:
    """The type of the weights of a run's models, and why it is this one."""

    dtype: Dtype
    why: str


def choose(config: RunConfig) -> Choice:
    """Return the type of the run's weights: the config's, or for `auto` the one that fits.

    Raises:
        UserError: if that depends on the base model, and there is none.
    """
    if config.model.dtype != "auto":
        return Choice(config.model.dtype, "the config says so")
    return automatic(config)


def automatic(config: RunConfig) -> Choice:
    """Return what `model.dtype: auto` stands for.

    Raises:
        UserError: if that depends on the base model, and there is none.
    """
    reason = needs_float32(config)
    if reason is not None:
        return Choice("float32", f"`auto`: {reason}")
    base = config.model.path
    stored = _stored(config)
    if stored == "float16":
        more = f"`auto`: {base} is stored in float16, whose numbers overflow above 65,504 and bfloat16 would round"
        return Choice("float32", f"{more}; `model.dtype: bfloat16` takes half the memory")
    if stored not in get_args(Dtype):
        return Choice("float32", f"`auto`: {base} does not say in which type it is stored")
    return Choice(cast(Dtype, stored), f"`auto`: {base} is stored in it, and every stage trains an adapter")


def check_attention(config: RunConfig) -> None:
    """Refuse flash attention where `auto` is float32; the config's rules know a type that the config says.

    Raises:
        UserError: if the attention implementation does not compute in the type of the weights.
    """
    if uses_flash_attention(config) and choose(config).dtype == "float32":
        raise UserError(f"model.attn_implementation: {FLASH_IN_FLOAT32}")


def _stored(config: RunConfig) -> str | None:
    """Return the type in which the base model is stored; None if neither its files nor its config.json say it.

    A config.json may be wrong about the files beside it. But the files of a hub model do not count: they may be
    downloaded later, and a run cannot change its type then.

    Raises:
        UserError: if there is no such model.
    """

    def key() -> str | None:
        state = base_model.settled_state(config, manifest.read(config.run_path))
        return None if state is None else digest([state, kept.installation()])

    try:
        return kept.remembered(_KIND, key, lambda: {"type": _read(config)})["type"]
    except UserError:
        recorded = _recorded(config)  # not kept: what this run made of the base may not be what the next one would
        if recorded is None:
            raise
        return recorded


def _read(config: RunConfig) -> str | None:
    """Return what the model's files say.

    Raises:
        UserError: if there is no such model.
    """
    from transformers import PretrainedConfig

    location = base_model.location(config)
    try:
        values, _ = PretrainedConfig.get_config_dict(location, revision=base_model.revision_of(config))
    except (OSError, ValueError) as error:
        raise base_model.unreadable(config, "model", error) from None
    of_files = _of_files(Path(location)) if Path(location).is_dir() else None
    return of_files or _of_config(values) or _of_config(values.get("text_config"))


def _of_config(values: Any) -> str | None:
    """Return the type that a config.json names; earlier versions of transformers called the field `torch_dtype`."""
    if not isinstance(values, dict):
        return None
    return values.get("dtype") or values.get("torch_dtype")


def _of_files(folder: Path) -> str | None:
    """Return the type of most weights, by the headers of the files."""
    sizes: Counter[str] = Counter()
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    weight = file.get_slice(name)
                    sizes[weight.get_dtype()] += prod(weight.get_shape())
        except (SafetensorError, OSError):
            return None  # the check of the weights says what is wrong with it
    if not sizes:
        return None
    [(most, _)] = sizes.most_common(1)
    return _IN_FILES.get(most)


def _recorded(config: RunConfig) -> str | None:
    """Return the type that the run has on record: its hub model may not be here any more when all is finished."""
    recorded = manifest.read(config.run_path)
    model = {} if recorded is None else recorded.model
    is_the_same = model.get("path") == config.model.path and model.get("revision") == config.model.revision
    return model.get("dtype") if is_the_same else None
