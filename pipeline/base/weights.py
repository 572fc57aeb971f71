"""Whether files of weights fit their model: looked at in the plan, without memory, and again where they are loaded."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from pipeline.base import base_model
from pipeline.config.schema import RunConfig
from pipeline.system.errors import UserError, reason_of

NUM_SHOWN = 3  # names of weights in a message
_POINTER = b"version https://git-lfs"
_NEW = "score."  # the head that a reward model gets when it is made of a language model


def check_base(config: RunConfig, tokenizer: Any) -> None:
    """Compare the base model's files with its `config.json`, and its embedding with the tokenizer.

    transformers loads the model onto the meta device, so that only the files' headers are read. A hub model is looked
    at where it is in the cache. One that is quantised already is left to the loading itself.

    Raises:
        UserError: with the file or the weights that are wrong.
    """
    if getattr(base_model.architecture(config), "quantization_config", None):
        return
    where = Path(config.resolve(config.model.path))
    options = {"revision": base_model.revision_of(config), "trust_remote_code": config.model.trust_remote_code}
    if not where.is_dir():
        options["local_files_only"] = True
    try:
        with quiet_loading():
            model, info = AutoModelForCausalLM.from_pretrained(
                where if where.is_dir() else config.model.path,
                device_map="meta",
                output_loading_info=True,
                ignore_mismatched_sizes=True,
                **options,
            )
    except Exception as error:
        if where.is_dir() and (fault := _unreadable(config, where, error)):
            raise fault from None
        return  # it has yet to be downloaded, or cannot be loaded without memory: the first stage will tell
    if fault := unfit(model, info):
        seen = f"the weights in {config.model.path!r} are not those of its config.json: {fault}"
        raise UserError(f"model.path: {seen}. Take the config.json that belongs to the weights")
    _embedding_has_all(config, model, tokenizer)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """Let transformers load without its progress bar and its report: what is wrong is said by `unfit`."""
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


def unfit(model: Any, info: dict[str, Any]) -> str | None:
    """What of the files does not belong to the model, by transformers' loading info; None if all fits.

    transformers would go on with random weights where a file has none.
    """
    missing = [name for name in sorted(info["missing_keys"]) if not name.startswith(_NEW)]
    if missing:
        unknown = sorted(info["unexpected_keys"])
        extra = f"; {_names(unknown)} have no place in the model" if unknown else ""
        return f"{_names(missing)} are missing, and would be random numbers{extra}"
    if info["mismatched_keys"]:
        name, saved, expected = sorted(info["mismatched_keys"])[0]
        return f"{name} has the shape {tuple(saved)}, expected {tuple(expected)}"
    own = {_without_numbers(name) for name in model.state_dict()}
    left_out = [name for name in sorted(info["unexpected_keys"]) if _without_numbers(name) in own]
    if left_out:
        return f"{_names(left_out)} belong to layers that the model does not have, and would be left out"
    return None


def _names(names: list[str]) -> str:
    shown = ", ".join(names[:NUM_SHOWN])
    more = len(names) - NUM_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown


def _without_numbers(name: str) -> str:
    """The name of a weight, the same in every layer."""
    return re.sub(r"\d+", "N", name)


def _embedding_has_all(config: RunConfig, model: Any, tokenizer: Any) -> None:
    """Every token that a run may use has its row in the embedding; the others would end training at some row.

    Some models have tokens beyond it that no text gives, such as an image's. Added tokens count only where the run
    itself uses them.
    """
    num_rows = model.get_input_embeddings().weight.shape[0]
    template = str(tokenizer.chat_template)
    used = (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id)
    added = tokenizer.added_tokens_decoder
    beyond = {id: token for token, id in tokenizer.get_vocab().items() if id >= num_rows}
    wanted = {id: token for id, token in beyond.items() if id not in added or id in used or token in template}
    if wanted:
        first = min(wanted)
        seen = f"{wanted[first]!r} is number {first}, and the embedding of {config.model.path!r} has {num_rows} rows"
        mend = (
            "take the tokenizer of the model, name another token under `tokenizer`, or resize the embedding and save it"
        )
        raise UserError(f"model.path: {len(wanted)} tokens have no embedding: {seen}; {mend}")


def _unreadable(config: RunConfig, where: Path, error: Exception) -> UserError | None:
    """What to say of a folder whose weights cannot be read: the file, and why; None if that is not the reason."""
    for file in _files(where):
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


def _files(where: Path) -> Iterable[Path]:
    return [file for file in sorted(where.iterdir()) if file.suffix in (".safetensors", ".bin") and file.is_file()]


def _fault_of(file: Path) -> str | None:
    """Why a file of weights cannot be read, or None. Code in it is not run."""
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
