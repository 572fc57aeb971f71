"""Read a value of a row as messages: who says what, in turn; anything else is a fault of that row."""

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
    """Return a field as messages: a string becomes one message of `role`; lists and ShareGPT turns are checked.

    Raises:
        RowFault: if the field holds anything else.
    """
    value = row.get(field)
    if isinstance(value, str) and role:
        return [{"role": role, "content": text_of(row, field)}]
    turns = [value] if isinstance(value, Mapping) else value
    if not isinstance(turns, list):
        expected = "text or messages" if role else "messages"
        raise RowFault("malformed", field, f"expected {expected}, got {shown(value)}")
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
    """Tell whether a turn of calls belongs to the assistant's message before it, as text and calls of one message."""
    return before["role"] == "assistant" and before.get("weight") == calls.get("weight")


def _speaker(turn: object) -> Any:
    """Return what a turn holds in the place of its speaker; None if there is nothing."""
    if not isinstance(turn, Mapping):
        return None
    return turn.get("role") or turn.get("from")


def _message(turn: Any, field: str) -> Message:
    """Return one turn as a message: its role in our words, its text, the calls of tools in it."""
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
    """Return the content of a turn, which is text if nothing is wrong, and the calls of tools."""
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
    """Join the parts of a content: text, under `text` or `value`, and calls of tools.

    The text is None if a part is of no kind that is known.
    """
    texts: list[str] = []
    calls: list[Row] = []
    for part in parts:
        value = part.get("text")
        if value is None:
            value = part.get("value")
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
    """Return `weight: 0` for a message of the assistant that is not learnt; a weight of 1 is left out."""
    weights = [turn[name] for name in WEIGHTS if turn.get(name) is not None]
    if role != "assistant":
        if turn.get("loss_weight"):
            raise RowFault("malformed", field, f"expected a loss on the assistant's messages alone, got {shown(turn)}")
        return {}
    if not all(isinstance(weight, (int, float)) and weight in (0, 1) for weight in weights):
        raise RowFault("malformed", field, f"expected a weight of 0 or 1, got {shown(turn)}")
    return {"weight": 0} if any(weight == 0 for weight in weights) else {}


def without_weights(messages: Messages) -> Messages:
    """Return the messages as templates and prompts have them: whether one is learnt does not count."""
    return [{key: value for key, value in message.items() if key != "weight"} for message in messages]


def check_order(messages: Messages, field: str) -> None:
    """Refuse messages unless user and assistant take turns and a system message comes first or not at all.

    Results of tools take the user's turn. Several results in a row are one turn.
    """
    roles = [message["role"] for message in messages]
    turns: list[str] = []
    for role in roles[1:] if roles[:1] == ["system"] else roles:
        if role != "tool" or turns[-1:] != ["tool"]:
            turns.append(role)
    questions = turns[::2]
    answers = turns[1::2]
    are_in_turn = set(questions) <= {"user", "tool"} and set(answers) <= {"assistant"}
    if not are_in_turn or turns[:1] == ["tool"]:
        raise RowFault("roles", field, f"expected user and assistant in turn, a system message first, got {roles}")


def ends_with_user(messages: Messages, field: str = "prompt") -> Messages:
    """Return messages that are in order and can be a prompt: the user's message, or a tool's result, comes last."""
    check_order(messages, field)
    if messages[-1]["role"] not in ("user", "tool"):
        raise RowFault("roles", field, f"expected it to end with a user's message, got {shown(messages[-1])}")
    return messages


def dialogue(messages: Messages, field: str) -> Row:
    """Return a dialogue that ends with the assistant, as prompt and completion.

    The completion is the last message that is learnt; later messages are left out. If no message is learnt, the
    dialogue stays whole, and `unlearnt` names its field: its prompt can be used, but there is nothing to demonstrate.
    """
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        roles = [message["role"] for message in messages]
        raise RowFault("roles", field, f"expected the last two to be user and assistant, got {roles}")
    ends_with_user(messages[:-1], field)
    learnt = [i for i, message in enumerate(messages) if message["role"] == "assistant" and "weight" not in message]
    if not learnt:
        return {"prompt": messages[:-1], "completion": tools.answer_of(messages[-1]), "unlearnt": field}
    last = learnt[-1]
    return {"prompt": messages[:last], "completion": tools.answer_of(messages[last])}
