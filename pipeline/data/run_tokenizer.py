"""Make the run's one tokenizer: a chat template, a pad token that is not eos, a fingerprint all stages agree on."""

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.base import base_model
from pipeline.config.schema import RunConfig, ScratchTokenizer
from pipeline.data import chat_templates, places, sources
from pipeline.data.joints import begins_with
from pipeline.data.unreadable import readable
from pipeline.system.digests import digest
from pipeline.system.errors import UserError, reason_of

# What transformers raises at files of a tokenizer that it cannot read; the tokenizers library raises bare Exceptions.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
LONGEST_WORD = 1000  # characters; the time to train a tokenizer grows with the square of the longest word
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}")
# Tokens that pretrained vocabularies keep for padding, then those that they hold without using them in text.
PAD_CANDIDATES = [
    "<|finetune_right_pad_id|>",
    "<pad>",
    "<|pad|>",
    "[PAD]",
    "<|padding|>",
    "<|endoftext|>",
    "<|reserved_special_token_0|>",
    "<|vision_pad|>",
    "<unk>",
    "[UNK]",
]
SCRATCH_TOKENS = ["<pad>", "<eos>", "<user>", "<assistant>", "<system>"]


def fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the digest of everything that decides how text becomes ids: vocabulary, rules, template, pad and eos."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Trainers switch padding and truncation on and off in the backend; they are no part of the tokenizer.
    rules = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    special = tokenizer.special_tokens_map
    return digest([rules, tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id, special])


def build(config: RunConfig) -> PreTrainedTokenizerFast:
    """Make the run's tokenizer from the config and the base model alone.

    Raises:
        UserError: if it cannot be loaded, or no pad token other than eos can be had.
    """
    scratch = config.model.scratch
    tokenizer = _of_base(config) if scratch is None else _train(config, scratch.tokenizer)
    _set_special_tokens(config, tokenizer)
    template = config.tokenizer.chat_template
    if template is None and tokenizer.chat_template is None:
        template = chat_templates.FALLBACK if scratch is None else "scratch"
    if template is not None:
        tokenizer.chat_template = _read_template(template, config.folder, tokenizer)
    _try_template(config, tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


def open_saved(folder: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a run folder or of an output."""
    try:
        tokenizer = _load(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not _is_unreadable(error):
            raise
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise UserError(f"{folder}: holds no tokenizer that can be read ({reason}); restore it") from None
    tokenizer.padding_side = "left"  # not kept by every tokenizer class; policies generate from the right end
    return tokenizer


def _of_base(config: RunConfig) -> PreTrainedTokenizerFast:
    try:
        return _load(base_model.location(config), **base_model.hub_options(config))
    except Exception as error:
        if not _is_unreadable(error):
            raise
        raise base_model.unreadable(config, "tokenizer", error) from None


def _load(location: str | Path, **options: Any) -> PreTrainedTokenizerFast:
    tokenizer = AutoTokenizer.from_pretrained(location, **options)
    # transformers would save it whether the hub was out of reach; then equal runs would have other files.
    tokenizer.init_kwargs.pop("local_files_only", None)
    return cast("PreTrainedTokenizerFast", tokenizer)  # others have no backend, which gives the fingerprint


def _is_unreadable(error: Exception) -> bool:
    """Say whether an error means that the files of a tokenizer cannot be read."""
    return isinstance(error, _UNREADABLE) or type(error) is Exception


def _train(config: RunConfig, settings: ScratchTokenizer) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the run's own data."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=SCRATCH_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(config, settings.data), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def _texts(config: RunConfig, datasets: list[str]) -> Iterator[str]:
    """Yield the texts of all columns of datasets. A word beyond LONGEST_WORD is cut into pieces."""
    for name in datasets:
        for part in places.find(name, config.data[name], config.folder):
            with readable(part):
                rows = cast("Iterable[dict[str, Any]]", sources.load(part, config.data[name].streaming))
                for row in rows:
                    for text in row.values():
                        if isinstance(text, str):
                            yield text if len(text) < LONGEST_WORD else _LONG_WORD.sub(r"\g<0> ", text)


def _set_special_tokens(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Set the eos and pad tokens of the config, and a pad token where there is none but eos.

    Raises:
        UserError: if a token is not in the vocabulary, there is no eos, or pad would be eos.
    """
    settings = config.tokenizer
    base = config.model.path
    vocabulary = tokenizer.get_vocab()
    for field, token in settings.model_dump(include={"eos_token", "pad_token"}, exclude_none=True).items():
        if token not in vocabulary:
            where = base or "the new tokenizer"
            raise UserError(f"tokenizer.{field}: {token!r} is not in the vocabulary of {where}")
        setattr(tokenizer, field, token)
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer.eos_token: {base!r} has none; name the token that ends a completion")
    if settings.pad_token is None and tokenizer.pad_token in (None, tokenizer.eos_token):
        candidates = [token for token in PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = candidates[0] if candidates else tokenizer.eos_token
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer.pad_token: would be the same as eos ({tokenizer.eos_token!r}), so a policy could never learn "
            "to stop; name another token of the vocabulary that does not occur in your texts"
        )


def _read_template(name: str, folder: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """Read a built-in template by its name, or a Jinja file beside the config.

    A built-in one begins with BOS where the tokenizer puts it before every text: the model was trained with it.
    """
    text = chat_templates.read(name, folder)
    if not chat_templates.is_built_in(name) or begins_with(tokenizer) is None:
        return text
    return "{{- bos_token -}}" + text


def _try_template(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse a chat template that cannot work."""
    name = config.tokenizer.chat_template
    if name is None:
        where = f"{config.model.path}: its own chat template"
    elif chat_templates.is_built_in(name):
        where = f"tokenizer.chat_template: {name}"
    else:
        where = f"tokenizer.chat_template: {config.folder / name}"
    chat_templates.try_out(tokenizer, where)
