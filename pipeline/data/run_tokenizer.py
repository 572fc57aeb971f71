"""The run's one tokenizer: its chat template, a pad token that is not eos, and the fingerprint all stages agree on."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.base import base_model
from pipeline.config.schema import RunConfig
from pipeline.data import chat_templates, sources
from pipeline.data.joints import begins_with
from pipeline.system.digests import digest
from pipeline.system.errors import UserError, reason_of

# What transformers raises at files of a tokenizer that it cannot read; the tokenizers library raises bare Exceptions.
_UNREADABLE = (OSError, ValueError, LookupError, TypeError, AttributeError)
LONGEST_WORD = 1000  # characters; the time to train a tokenizer grows with the square of the longest word
_LONG_WORD = re.compile(rf"\S{{{LONGEST_WORD}}}")
# Tokens that pretrained vocabularies keep for padding, or hold without using them in text, best first.
_PADDING = "<|finetune_right_pad_id|> <pad> <|pad|> [PAD] <|padding|>"
_UNUSED = "<|endoftext|> <|reserved_special_token_0|> <|vision_pad|> <unk> [UNK]"
PAD_CANDIDATES = [*_PADDING.split(), *_UNUSED.split()]
SCRATCH_TOKENS = ["<pad>", "<eos>", "<user>", "<assistant>", "<system>"]


def fingerprint(tokenizer: Any) -> str:
    """Digest of everything that decides how text becomes ids: vocabulary, rules, template, pad and eos."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Trainers switch padding and truncation on and off in the backend; they are no part of the tokenizer.
    rules = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    special = tokenizer.special_tokens_map
    return digest([rules, tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id, special])


def _texts(config: RunConfig) -> Iterator[str]:
    """The texts that a new tokenizer is trained on. Words beyond any length are cut into pieces."""
    for name in config.model.scratch.tokenizer.data:
        for part in sources.find(name, config.data[name], config.folder):
            with sources.readable(part):
                for row in sources.load(part, config.data[name].streaming):
                    texts = [text for text in row.values() if isinstance(text, str)]
                    for text in texts:
                        yield text if len(text) < LONGEST_WORD else _LONG_WORD.sub(r"\g<0> ", text)


def _train(config: RunConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from the run's own data."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.model.scratch.tokenizer.vocab_size,
        special_tokens=SCRATCH_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(config), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def _template(name: str, folder: Path, tokenizer: Any) -> str:
    """A built-in template by name, or a Jinja file beside the config.

    A built-in one begins with BOS where the tokenizer puts it before every text: the model was trained with it.
    """
    text = chat_templates.read(name, folder)
    if not chat_templates.is_built_in(name) or begins_with(tokenizer) is None:
        return text
    return "{{- bos_token -}}" + text


def _try_template(config: RunConfig, tokenizer: Any) -> None:
    """Refuse a chat template that cannot work."""
    name = config.tokenizer.chat_template
    where = f"{config.model.path}: its own chat template" if name is None else f"tokenizer.chat_template: {name}"
    if name is not None and not chat_templates.is_built_in(name):
        where = f"tokenizer.chat_template: {config.folder / name}"
    chat_templates.try_out(tokenizer, where)


def build(config: RunConfig) -> Any:
    """The run's tokenizer, made from the config and the base model alone.

    Raises:
        UserError: if it cannot be loaded, or no pad token other than eos can be had.
    """
    settings, base = config.tokenizer, config.model
    if base.scratch:
        tokenizer = _train(config)
    else:
        options = {"revision": base_model.revision_of(config), "trust_remote_code": base.trust_remote_code}
        try:
            tokenizer = _load(config.resolve(base.path), **options)
        except Exception as error:
            if not _is_unreadable(error):
                raise
            raise base_model.unreadable(config, "tokenizer", error) from None
    vocabulary = tokenizer.get_vocab()
    for field, token in settings.model_dump(include={"eos_token", "pad_token"}, exclude_none=True).items():
        if token not in vocabulary:
            where = base.path or "the new tokenizer"
            raise UserError(f"tokenizer.{field}: {token!r} is not in the vocabulary of {where}")
        setattr(tokenizer, field, token)
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer.eos_token: {base.path!r} has none; name the token that ends a completion")
    if settings.pad_token is None and tokenizer.pad_token in (None, tokenizer.eos_token):
        free = [token for token in PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = free[0] if free else tokenizer.eos_token
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer.pad_token: would be the same as eos ({tokenizer.eos_token!r}), so a policy could never learn "
            "to stop; name another token of the vocabulary that does not occur in your texts"
        )
    if settings.chat_template is not None or tokenizer.chat_template is None:
        name = settings.chat_template or ("scratch" if base.scratch else "plain")
        tokenizer.chat_template = _template(name, config.folder, tokenizer)
    _try_template(config, tokenizer)
    tokenizer.padding_side = "left"
    return tokenizer


def _load(place: str | Path, **options: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(place, **options)
    # transformers would save it whether the hub was out of reach; then equal runs would have other files.
    tokenizer.init_kwargs.pop("local_files_only", None)
    return tokenizer


def _is_unreadable(error: Exception) -> bool:
    """Whether an error says that the files of a tokenizer cannot be read."""
    return isinstance(error, _UNREADABLE) or type(error) is Exception


def open_saved(folder: Path, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a run folder or of an output."""
    try:
        tokenizer = _load(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not _is_unreadable(error):
            raise
        reason = f"{type(error).__name__}: {reason_of(error)}"
        raise UserError(f"{folder}: holds no tokenizer that can be read ({reason}); restore it") from None
    tokenizer.padding_side = "left"  # not kept by every tokenizer class; policies generate from the right end
    return tokenizer
