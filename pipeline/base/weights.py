"""Check that files of weights fit their model: in the plan, without memory, and again where they are loaded."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from pipeline.base import base_model
from pipeline.config.schema import RunConfig
from pipeline.system.errors import UserError, reason_of

NUM_SHOWN = 3  # names of weights in a message
_POINTER = b"version https://git-lfs"
_NEW = "score."  # the head that a reward model gets when it is made of a language model


def check_base(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Compare the base model's files with its `config.json`, and its embedding with the tokenizer.

    transformers loads the model onto the meta device, so that only the files' headers are read. A hub model is looked
    at where it is in the cache. One that is quantised already is left to the loading itself.

    Raises:
        UserError: with the file or the weights that are wrong.
    """
    if getattr(base_model.architecture(config), "quantization_config", None):
        return
    location = base_model.location(config)
    folder = Path(location)
    options = base_model.hub_options(config)
    if not folder.is_dir():
        options["local_files_only"] = True
    try:
        with quiet_loading():
            loaded = AutoModelForCausalLM.from_pretrained(
                location,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:
        if folder.is_dir() and (refusal := _unreadable(config, folder, error)):
            raise refusal from None
        return  # it has yet to be downloaded, or cannot be loaded without memory: the first stage will tell
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)  # a pair, since it was asked for the info
    if misfit := unfit(model, info):
        fault = f"the weights in {config.model.path!r} are not those of its config.json: {misfit}"
        raise UserError(f"model.path: {fault}. Take the config.json that belongs to the weights")
    _check_embedding(config, model, tokenizer)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Let transformers load without its progress bar and its report: `unfit` says what is wrong."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def unfit(model: PreTrainedModel, info: dict[str, Any]) -> str | None:
    """Say which weights of the files and of the model do not fit, by transformers' loading info; None if all fit.

    transformers would go on with random numbers in the place of missing weights.
    """
    missing = [name for name in sorted(info["missing_keys"]) if not name.startswith(_NEW)]
    if missing:
        unknown = sorted(info["unexpected_keys"])
        surplus = f"; {_names(unknown)} have no place in the model" if unknown else ""
        return f"{_names(missing)} are missing, and would be random numbers{surplus}"
    if info["mismatched_keys"]:
        name, saved, expected = sorted(info["mismatched_keys"])[0]
        return f"{name} has the shape {tuple(saved)}, expected {tuple(expected)}"
    own = {_without_numbers(name) for name in model.state_dict()}
    surplus = [name for name in sorted(info["unexpected_keys"]) if _without_numbers(name) in own]
    if surplus:
        return f"{_names(surplus)} belong to layers that the model does not have, and would be left out"
    return None


def _names(names: list[str]) -> str:
    text = ", ".join(names[:NUM_SHOWN])
    num_more = len(names) - NUM_SHOWN
    return f"{text} and {num_more} more" if num_more > 0 else text


def _without_numbers(name: str) -> str:
    """Return the name of a weight with `N` for every number: the same in every layer."""
    return re.sub(r"\d+", "N", name)


def _check_embedding(config: RunConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a base whose embedding lacks a row for a token that the run may use: training would end at some row.

    Some models have tokens beyond the embedding that no text gives, such as an image's. Added tokens count only where
    the run itself uses them.
    """
    num_rows = len(cast("nn.Embedding", model.get_input_embeddings()).weight)
    template = str(tokenizer.chat_template)
    special_ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    added = tokenizer.added_tokens_decoder
    lacking: dict[int, str] = {}
    for token, id in tokenizer.get_vocab().items():
        is_used = id not in added or id in special_ids or token in template
        if id >= num_rows and is_used:
            lacking[id] = token
    if lacking:
        first = min(lacking)
        fault = f"{lacking[first]!r} is number {first}, and the embedding of {config.model.path!r} has {num_rows} rows"
        mend = (
            "take the tokenizer of the model, name another token under `tokenizer`, or resize the embedding and save it"
        )
        raise UserError(f"model.path: {len(lacking)} tokens have no embedding: {fault}; {mend}")


def _unreadable(config: RunConfig, folder: Path, error: Exception) -> UserError | None:
    """Return the error that names the file of weights that cannot be read, and why; None if that is not the reason."""
    for file in _files(folder):
        with file.open("rb") as content:
            start = content.read(len(_POINTER))
        if start == _POINTER:
            return UserError(f"model.path: {file} is a git-lfs pointer, not weights; run `git lfs pull` in its folder")
        if fault := _fault_of(file):
            mend = "it may have been cut off: copy or download it again"
            return UserError(f"model.path: {file} cannot be read: {fault}; {mend}")
    if isinstance(error, OSError):
        return base_model.unreadable(config, "model", error)
    return None


def _files(folder: Path) -> Iterable[Path]:
    return [file for file in sorted(folder.iterdir()) if file.suffix in (".safetensors", ".bin") and file.is_file()]


def _fault_of(file: Path) -> str | None:
    """Say why a file of weights cannot be read; None if it can. Code in it is not run."""
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return None
        torch.load(file, map_location="meta", weights_only=True)
    except UnpicklingError:
        return "it is no file of weights, or holds code beside them, which is not run; save it as safetensors"
    except Exception as error:  # torch's reader of old files raises what it likes
        return f"{type(error).__name__}: {reason_of(error)}"
    return None
