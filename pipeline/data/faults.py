"""Name what can be wrong with one row, and show values in messages."""

from collections.abc import Iterator
from typing import Any

Row = dict[str, Any]
# Why rows are left out, in the words of messages and tables. Those with a threshold are keys of `checks:`.
FAULTS = {
    "malformed": "do not fit their format",
    "empty": "have an empty prompt, completion or text",
    "roles": "have roles out of order",
    "identical": "have equal chosen and rejected sides",
    "tie": "have no better side",
    "label_false": "are labelled false",
    "blank": "are blank texts",
}
# Beside the faults of single rows: why else rows are left out, and what is worth a look.
DROPPED = FAULTS | {
    "held_out": "have a prompt that another dataset is evaluated on",
    "too_long": "are longer than {limit}",
    "same_prompt": "have the prompt of an earlier row",
    "weight": "are left out by the weights of their sources",
}
NOTICED = {
    "duplicate": "repeat an earlier row",
    "contradictory": "are a pair that occurs with both labels",
    "special_tokens": "hold special tokens in their text",
    "eos": "hold eos within a completion",
    "no_bos": "do not begin with the BOS that the tokenizer puts before every text",
    "other_tokens": "have other tokens in an earlier turn than prompts that policies are sampled from",
    "truncated": "lose the start of their prompt to {limit}",
}
_LONGEST = 200  # characters of a value in a message


class RowFault(Exception):
    """Report a fault of one row: its kind (a key of FAULTS), the field, what was expected and what the field holds.

    `row` is what the row holds nevertheless, in canonical form.
    """

    def __init__(self, kind: str, field: str, text: str, row: Row | None = None):
        super().__init__(f"{field}: {text}")
        self.kind = kind
        self.row = row


def shown(value: object) -> str:
    """Return a value as a message shows it, cut to 200 characters; of bytes their number.

    The rest is never turned into text: a row may hold a file.
    """
    text = ""
    for piece in _pieces(value):
        text += piece
        if len(text) > _LONGEST:
            return f"{text[:_LONGEST]}..."
    return text


def _pieces(value: object) -> Iterator[str]:
    """Yield the text of a value piece by piece; of a long text the start."""
    if isinstance(value, str):
        yield repr(value[: _LONGEST + 1])
    elif isinstance(value, (bytes, bytearray)):
        yield f"{len(value)} bytes"
    elif isinstance(value, dict):
        for i, (key, inner) in enumerate(value.items()):
            yield ", " if i else "{"
            yield from _pieces(key)
            yield ": "
            yield from _pieces(inner)
        yield "}" if value else "{}"
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield ", " if i else "["
            yield from _pieces(inner)
        yield "]" if value else "[]"
    else:
        yield repr(value)


def text_of(row: Row, field: str) -> str:
    """Return the text in a field.

    Raises:
        RowFault: if the field holds no text, or a blank one.
    """
    value = row.get(field)
    if not isinstance(value, str):
        raise RowFault("malformed", field, f"expected text, got {shown(value)}")
    if not value.strip():
        raise RowFault("empty", field, "is empty")
    return value
