"""Cut HH-RLHF's dialogue strings, "\\n\\nHuman: ...\\n\\nAssistant: ...", into messages."""

import re

from pipeline.data.faults import Row, RowFault, shown, text_of
from pipeline.data.formats import is_dialogue
from pipeline.data.messages import Messages

_HEADER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def side_of(row: Row, field: str, before: Messages) -> Messages:
    """Return one side as a whole dialogue: it is a dialogue, or the answer to the dialogue before it."""
    if is_dialogue(row.get(field)):
        return turns_of(row, field)
    answer = text_of(row, field).strip()
    if not before:
        where = "prompt" if row.get("prompt") else field
        raise RowFault("malformed", where, f"expected it to begin with 'Human:', got {shown(row[where])}")
    return [*before, {"role": "assistant", "content": answer}]


def nonempty(turns: Messages, field: str) -> Messages:
    """Return the turns if there are some and each has text; refuse others."""
    if not turns:
        raise RowFault("empty", field, "is empty")
    if not all(turn["content"] for turn in turns):
        raise RowFault("empty", field, "has an empty turn")
    return turns


def turns_of(row: Row, field: str) -> Messages:
    """Cut a dialogue string at its headers."""
    head, *parts = _HEADER.split(text_of(row, field).strip())
    if head.strip() or not parts:
        raise RowFault("malformed", field, f"expected it to begin with 'Human:', got {shown(row[field][:80])}")
    turns: Messages = []
    for speaker, text in zip(parts[::2], parts[1::2], strict=True):
        role = "user" if speaker == "Human" else "assistant"
        turns.append({"role": role, "content": text.strip()})
    return turns
