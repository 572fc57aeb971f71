"""The run's one tokenizer: its chat template, a pad token that is not eos, and the fingerprint all stages agree on."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.data import find, load
from pipeline.errors import UserError
from pipeline.manifest import digest
from pipeline.schema import RunConfig

TEMPLATES = Path(__file__).parent / "templates"
# Tokens that pretrained vocabularies keep for padding, or hold without using them in text, best first.
PAD_CANDIDATES = (
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
)
SCRATCH_TOKENS = ("<pad>", "<eos>", "<user>", "<assistant>", "<system>")


def fingerprint(tokenizer: Any) -> str:
    """Digest of everything that decides how text becomes ids: vocabulary, rules, template, pad and eos."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    # Trainers switch padding and truncation on and off in the backend; they are no part of the tokenizer.
    rules = {key: value for key, value in backend.items() if key not in ("padding", "truncation")}
    return digest([rules, tokenizer.chat_template, tokenizer.pad_token_id, tokenizer.eos_token_id])


def _texts(config: RunConfig) -> Iterator[str]:
    for name in config.model.scratch.tokenizer.data:
        for row in load(find(name, config.data[name], config.source.parent)):
            yield from (value for value in row.values() if isinstance(value, str))


def _train(config: RunConfig) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer from the run's own data."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.model.scratch.tokenizer.vocab_size,
        special_tokens=list(SCRATCH_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(config), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def _template(name: str, folder: Path) -> str:
    """A built-in template by name, or a Jinja file beside the config."""
    for path in (TEMPLATES / f"{name}.jinja", folder / name):
        if path.is_file():
            return path.read_text(encoding="utf-8").rstrip("\n")
    known = ", ".join(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
    raise UserError(
        f"tokenizer.chat_template: {name!r} is neither a built-in template ({known}) nor a file beside the config"
    )


def build(config: RunConfig) -> Any:
    """The run's tokenizer, made from the config and the base model alone.

    Raises:
        UserError: if it cannot be loaded, or no pad token other than eos can be had.
    """
    settings = config.tokenizer
    if config.model.scratch:
        tokenizer = _train(config)
    else:
        where = config.resolve(config.model.path)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                where, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
            )
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model.path: no tokenizer at {config.model.path!r}: {reason}") from None
    vocabulary = tokenizer.get_vocab()
    for field in ("eos_token", "pad_token"):
        token = getattr(settings, field)
        if token is not None and token not in vocabulary:
            raise UserError(
                f"tokenizer.{field}: {token!r} is not in the vocabulary of {config.model.path or 'the new tokenizer'}"
            )
        if token is not None:
            setattr(tokenizer, field, token)
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer.eos_token: {config.model.path!r} has none; name the token that ends a completion")
    if settings.pad_token is None and tokenizer.pad_token in (None, tokenizer.eos_token):
        free = [token for token in PAD_CANDIDATES if token in vocabulary and token != tokenizer.eos_token]
        tokenizer.pad_token = free[0] if free else tokenizer.eos_token
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"tokenizer.pad_token: would be the same as eos ({tokenizer.eos_token!r}), so a policy could never learn to stop; "
            "name another token of the vocabulary that does not occur in your texts"
        )
    if settings.chat_template is not None:
        tokenizer.chat_template = _template(settings.chat_template, config.source.parent)
    elif tokenizer.chat_template is None:
        tokenizer.chat_template = _template("scratch" if config.model.scratch else "plain", config.source.parent)
    tokenizer.padding_side = "left"
    return tokenizer


def open_saved(folder: Path) -> Any:
    """The tokenizer of a run folder or of an output."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: holds no tokenizer that can be read ({reason}); restore it") from None
    tokenizer.padding_side = "left"  # not kept by every tokenizer class; policies generate from the right end
    return tokenizer
