"""Values of a row as messages: what was said by whom, in turn; anything else is a fault of that row."""

from collections.abc import Mapping
from typing import Any

Messages = list[dict[str, str]]
Row = dict[str, Any]
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= {"assistant": "assistant", "gpt": "assistant", "bot": "assistant", "model": "assistant"}
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


class RowFault(Exception):
    """A fault of one row: its kind (a key of FAULTS), the field, what was seen and what was expected.

    `row` is what it holds nevertheless, in canonical form.
    """

    def __init__(self, kind: str, field: str, text: str, row: Row | None = None):
        super().__init__(f"{field}: {text}")
        self.kind, self.row = kind, row


def text_of(row: Row, field: str) -> str:
    """A field that must hold text that is not blank."""
    value = row.get(field)
    if not isinstance(value, str):
        raise RowFault("malformed", field, f"expected text, got {shown(value)}")
    if not value.strip():
        raise RowFault("empty", field, "is empty")
    return value


def shown(value: Any) -> str:
    """A value as a message shows it, cut to 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def messages_of(row: Row, field: str, role: str | None = None) -> Messages:
    """A field as messages: a string becomes one message of `role`; lists and ShareGPT turns are checked."""
    value = row.get(field)
    if isinstance(value, str) and role:
        return [{"role": role, "content": text_of(row, field)}]
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        raise RowFault("malformed", field, f"expected {'text or ' if role else ''}messages, got {shown(value)}")
    if not turns:
        raise RowFault("empty", field, "has no messages")
    return [_message(turn, field) for turn in turns]


def _message(turn: Any, field: str) -> dict[str, str]:
    said = turn if isinstance(turn, Mapping) else {}
    speaker = said.get("role") or said.get("from")
    content = next((said[name] for name in ("content", "value") if said.get(name) is not None), None)
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    if said.get("tool_calls") or said.get("weight") == 0:
        what = "tool calls" if said.get("tool_calls") else "messages of weight 0"
        raise RowFault("malformed", field, f"{what} are not supported, got {shown(turn)}")
    if not isinstance(speaker, str) or speaker not in ROLES or not isinstance(content, str):
        raise RowFault("malformed", field, f"expected messages with a role and text, got {shown(turn)}")
    if not content.strip():
        raise RowFault("empty", field, f"the message of {speaker!r} is empty")
    return {"role": ROLES[speaker], "content": content}


def check_order(messages: Messages, field: str) -> None:
    """User and assistant take turns, a system message comes first or not at all."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user", "assistant"] * len(turns)
    if turns != expected[: len(turns)]:
        raise RowFault("roles", field, f"expected user and assistant in turn, a system message first, got {roles}")


def ends_with_user(messages: Messages, field: str = "prompt") -> Messages:
    """Messages that are in order and can be a prompt."""
    check_order(messages, field)
    if messages[-1]["role"] != "user":
        raise RowFault("roles", field, f"expected it to end with a user's message, got {shown(messages[-1])}")
    return messages


def dialogue(messages: Messages, field: str) -> Row:
    """A dialogue that ends with the assistant, as prompt and completion."""
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise RowFault("roles", field, f"expected the last two to be user and assistant, got {roles}")
    return {"prompt": ends_with_user(messages[:-1], field), "completion": messages[-1]["content"]}
