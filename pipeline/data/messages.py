"""Values of a row as messages: what was said by whom, in turn; anything else is a fault of that row."""

from collections.abc import Mapping
from typing import Any

from pipeline.data import media, tools
from pipeline.data.faults import Row, RowFault, shown, text_of
from pipeline.data.tools import Message

Messages = list[Message]
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user"}
ROLES |= dict.fromkeys(("assistant", "gpt", "bot", "model", *tools.CALLERS), "assistant")
ROLES |= dict.fromkeys(tools.RESULTS, "tool")
WEIGHTS = ("weight", "loss_weight")  # OpenAI's name and LLaMA-Factory's


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
    messages: Messages = []
    for turn in turns:
        message = _message(turn, field)
        if messages and _speaker(turn) in tools.CALLERS and _can_join(messages[-1], message):
            calls = [*messages[-1].get("tool_calls", ()), *message["tool_calls"]]
            messages[-1] = messages[-1] | {"tool_calls": calls}
        else:
            messages.append(message)
    return messages


def _can_join(before: Message, calls: Message) -> bool:
    """Whether a turn of calls belongs to the assistant's message before it, as text and calls of one message."""
    return before["role"] == "assistant" and before.get("weight") == calls.get("weight")


def _speaker(turn: Any) -> Any:
    return (turn.get("role") or turn.get("from")) if isinstance(turn, Mapping) else None


def _message(turn: Any, field: str) -> Message:
    speaker = _speaker(turn)
    unexpected = RowFault("malformed", field, f"expected messages with a role and text, got {shown(turn)}")
    if not isinstance(speaker, str) or speaker not in ROLES:
        raise unexpected
    media.refuse_keys(turn, field)
    tools.refuse_keys(turn, field)
    role = ROLES[speaker]
    content, calls = _content(turn, speaker, field)
    if calls and role != "assistant":
        raise RowFault("malformed", field, f"expected calls of tools by the assistant alone, got {shown(turn)}")
    if content is None and calls:
        content = ""
    if not isinstance(content, str):
        raise unexpected
    if not content.strip() and not calls and role != "tool":
        raise RowFault("empty", field, f"the message of {speaker!r} is empty")
    message: Message = {"role": role, "content": content}
    if calls:
        message["tool_calls"] = calls
    if role == "tool":
        message |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
    return message | _weight(turn, role, field)


def _content(turn: Mapping[str, Any], speaker: str, field: str) -> tuple[Any, list[Row]]:
    """The text of a turn, None or anything unexpected where it has none; and the tools it calls."""
    content = next((turn[name] for name in ("content", "value") if turn.get(name) is not None), None)
    calls: list[Row] = []
    if speaker in tools.CALLERS:
        return "", tools.calls_of(content, field)
    if isinstance(content, list) and content and all(isinstance(part, Mapping) for part in content):
        content, calls = _joined(content, field)
    elif content == []:
        content = ""
    for key in ("tool_calls", "function_call"):
        if turn.get(key):
            calls += tools.calls_of(turn[key], field)
    return content, calls


def _joined(parts: list[Mapping[str, Any]], field: str) -> tuple[str | None, list[Row]]:
    """Parts of a content: text, under `text` or `value`, and calls of tools."""
    texts: list[str] = []
    calls: list[Row] = []
    for part in parts:
        value = part.get("text") if part.get("text") is not None else part.get("value")
        if part.get("type") == "tool_call":
            calls += tools.calls_of(value, field)
        elif part.get("type") != "text":
            media.refuse_part(part, field)
            return None, []
        elif isinstance(value, str):
            texts.append(value)
        else:
            return None, []
    return "".join(texts), calls


def _weight(turn: Mapping[str, Any], role: str, field: str) -> dict[str, int]:
    """`weight: 0` of a message of the assistant that is not to be learnt from; 1 says nothing."""
    weights = [turn[name] for name in WEIGHTS if turn.get(name) is not None]
    if role != "assistant":
        if turn.get("loss_weight"):
            raise RowFault("malformed", field, f"expected a loss on the assistant's messages alone, got {shown(turn)}")
        return {}
    if not all(isinstance(weight, (int, float)) and weight in (0, 1) for weight in weights):
        raise RowFault("malformed", field, f"expected a weight of 0 or 1, got {shown(turn)}")
    return {"weight": 0} if any(weight == 0 for weight in weights) else {}


def without_weights(messages: Messages) -> Messages:
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def check_order(messages: Messages, field: str) -> None:
    """User and assistant take turns, a system message comes first or not at all.

    What tools gave takes the user's turn, as one turn where several calls were made at once.
    """
    roles = [message["role"] for message in messages]
    turns: list[str] = []
    for role in roles[1:] if roles[:1] == ["system"] else roles:
        if role != "tool" or turns[-1:] != ["tool"]:
            turns.append(role)
    in_turn = all(role == "assistant" if i % 2 else role in ("user", "tool") for i, role in enumerate(turns))
    if not in_turn or turns[:1] == ["tool"]:
        raise RowFault("roles", field, f"expected user and assistant in turn, a system message first, got {roles}")


def ends_with_user(messages: Messages, field: str = "prompt") -> Messages:
    """Messages that are in order and can be a prompt: the user's, or what a tool gave, comes last."""
    check_order(messages, field)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowFault("roles", field, f"expected it to end with a user's message, got {shown(messages[-1])}")
    return messages


def dialogue(messages: Messages, field: str) -> Row:
    """A dialogue that ends with the assistant, as prompt and completion.

    It ends with the last message that is to be learnt from: what comes later has no part in anything. Where no message
    is, it is whole, and `unlearnt` is the field: it can be a prompt and no demonstration.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise RowFault("roles", field, f"expected the last two to be user and assistant, got {roles}")
    ends_with_user(messages[:-1], field)
    learnt = [i for i, m in enumerate(messages) if m["role"] == "assistant" and "weight" not in m]
    if not learnt:
        return {"prompt": messages[:-1], "completion": tools.answer_of(messages[-1]), "unlearnt": field}
    prompt = messages[: learnt[-1]]
    return {"prompt": prompt, "completion": tools.answer_of(messages[learnt[-1]])}
