"""Cut a text into token ids: every part gets the ids it has as the continuation of what is before it.

Tokenizers made like SentencePiece's write a space before a text. A part that is encoded by itself gets one too, which
is in no prompt that a policy is sampled from.
"""

from transformers import PreTrainedTokenizerFast

# Parts that a byte-level tokenizer gives the same ids alone and after one another.
_PROBES = (("a\n", "a"), ("a", "\na"), ("a", " a"))
_ANCHORS = ("\n", "a", ":")  # texts that a part may follow without being joined to them


def token_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the token ids of texts, without what the tokenizer would add, pad or cut.

    The tokenizer's own call gives the same ids and takes half as long again.
    """
    backend = tokenizer.backend_tokenizer
    if backend.padding or backend.truncation:
        backend.no_padding()
        backend.no_truncation()
    return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]


def begins_with(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """Return the id of the BOS that the tokenizer puts before every text by itself, or None."""
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and tokenizer.encode("a")[:1] == [bos] else None


def eos_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that ends what the assistant says. The run's tokenizer always has one."""
    eos = tokenizer.eos_token_id
    assert isinstance(eos, int)
    return eos


def pad_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the id of the token that rows of a batch are padded with. The run's tokenizer always has one."""
    pad = tokenizer.pad_token_id
    assert isinstance(pad, int)
    return pad


def eos_text(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the text of the token that ends what the assistant says."""
    eos = tokenizer.eos_token
    assert isinstance(eos, str)
    return eos


def continuations(tokenizer: PreTrainedTokenizerFast, parts: list[tuple[str, str]]) -> list[list[int]]:
    """Return the token ids of the second text of each pair, as it follows the first.

    They are the rest of the ids of both together, if those begin with the ids of the first. Where a token would reach
    over the cut they are the ids that the second text has within a text: a policy goes on from the tokens of the first.
    """
    if _is_independent(tokenizer):
        return token_ids(tokenizer, [text for _, text in parts])
    texts = dict.fromkeys(text for before, part in parts for text in (before, before + part))  # prompts recur
    ids = dict(zip(texts, token_ids(tokenizer, list(texts)), strict=True))
    continued: list[list[int]] = []
    for before, part in parts:
        first = ids[before]
        joined = ids[before + part]
        is_cut_there = joined[: len(first)] == first
        continued.append(joined[len(first) :] if is_cut_there else _within(tokenizer, part))
    return continued


def _is_independent(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Tell whether a part has the same ids alone and within a text."""
    for first, second in _PROBES:
        joined, *alone = token_ids(tokenizer, [first + second, first, second])
        if joined != [*alone[0], *alone[1]]:
            return False
    return True


def _within(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the token ids of a text in the middle of another one."""
    for anchor in _ANCHORS:
        first, joined = token_ids(tokenizer, [anchor, anchor + text])
        if joined[: len(first)] == first:
            return joined[len(first) :]
    return token_ids(tokenizer, [text])[0]
