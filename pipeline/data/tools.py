"""Bring tools, calls of tools and their results from the forms people have to the one that chat templates read.

A tool is `{"type": "function", "function": {"name": ..., ...}}`. A call is the same with a name and `arguments`, which
are a mapping. The result of a call is a message of role `tool`.
"""

import json
from collections.abc import Mapping
from typing import Any, cast

from pipeline.data.faults import Row, RowFault, shown

Message = dict[str, Any]  # role, content; also tool_calls, name, tool_call_id, and `weight: 0` where nothing is learnt
COLUMNS = ("tools", "functions")  # where rows have the definitions of tools
CALLERS = ("function_call", "tool_call")  # who speaks in a turn that is nothing but calls
RESULTS = ("tool", "function", "observation", "ipython", "tool_response", "function_response")


def tools_of(row: Row) -> list[Row]:
    """Return the definitions of the tools that a row has in a column; an empty list if it has no tools.

    Raises:
        RowFault: if the column holds anything else.
    """
    for field in COLUMNS:
        value = _parsed(row.get(field))
        items = value if isinstance(value, list) else [value]
        tools = [tool for tool in map(_parsed, items) if not _is_nothing(tool)]
        if tools:
            return [_definition(tool, field) for tool in tools]
    return []


def _is_nothing(value: object) -> bool:
    """Tell whether a value stands for no tools, also as text, as tables have it."""
    return not value or (isinstance(value, str) and value.strip() in ("", "None"))


def _definition(tool: object, field: str) -> Row:
    """Return the definition of a tool with `type` and `function` around it."""
    mend = f"; to read the rows without it, rename the column: `columns: {{{field}: unused}}`"
    inner = _inner(tool)
    if not isinstance(inner.get("name"), str):
        fault = f"expected definitions of functions with a name, got {shown(tool)}"
        raise RowFault("malformed", field, fault + mend)
    definition: Row = {"type": "function", "function": inner}
    if inner is not tool:
        definition = cast(Row, tool)
    if not _is_json(definition):
        raise RowFault("malformed", field, f"expected values of JSON, got {shown(tool)}{mend}")
    return definition


def _is_json(value: object) -> bool:
    """Tell whether a value can be written as JSON: times and bytes of tables cannot, nor half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def calls_of(value: object, field: str) -> list[Row]:
    """Return the calls in a value: one or several, as mappings or as JSON.

    Raises:
        RowFault: if it holds anything else.
    """
    parsed = _parsed(value)
    calls = parsed if isinstance(parsed, list) else [parsed]
    return [_call(call, field) for call in calls]


def _call(value: object, field: str) -> Row:
    """Return one call with its arguments as a mapping, and with its id if it has one."""
    parsed = _parsed(value)
    inner = _inner(parsed)
    name = inner.get("name")
    arguments = inner.get("arguments")
    if arguments is None:
        arguments = inner.get("parameters")
    arguments = {} if arguments in (None, "") else _parsed(arguments)
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        fault = f"expected calls with a name and with arguments as a JSON object, got {shown(value)}"
        raise RowFault("malformed", field, fault)
    call: Row = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if isinstance(parsed.get("id"), str):
        call = {"id": parsed["id"], **call}
    if not _is_json(call):
        raise RowFault("malformed", field, f"expected values of JSON, got {shown(value)}")
    return call


def _inner(value: object) -> Row:
    """Return what `function` holds, if a definition or a call has that around it, else the value itself."""
    if not isinstance(value, dict):
        return {}
    function = value.get("function")
    return function if isinstance(function, dict) else value


def _parsed(value: object) -> Any:
    """Return a value that may be text in JSON.

    Other values lose keys that are null: a table of parquet gives every mapping the keys of all others.
    """
    if not isinstance(value, str):
        return _without_nulls(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _without_nulls(value: object) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, (list, tuple)):
        return [_without_nulls(inner) for inner in value]
    return value


def refuse_keys(message: Mapping[str, object], field: str) -> None:
    """Raise a RowFault where a message has tools, or calls under a name that is not read (OLMo's `function_calls`)."""
    if any(not _is_nothing(_parsed(message.get(name))) for name in COLUMNS):
        raise RowFault("malformed", field, f"expected tools in a column of their own, got {shown(message)}")
    if not _is_nothing(_parsed(message.get("function_calls"))):
        raise RowFault("malformed", field, f"expected calls of tools as `tool_calls`, got {shown(message)}")


def refuse_tools(row: Row) -> None:
    """Raise a RowFault where a canonical row has tools, calls, or what they gave."""
    if "tools" in row or any("tool_calls" in message or message["role"] == "tool" for message in row["prompt"]):
        what = "expected a prompt without tools: TRL renders the prompts of rloo and grpo itself, without tools"
        raise RowFault(
            "malformed", "tools", f"{what}, and labels have none; name another dataset, or use ppo or dpo", row
        )


def answer_of(message: Message) -> str | Message:
    """Return the answer in an assistant's message: its text, or the message itself if it calls tools."""
    if "tool_calls" in message:
        return message
    return message["content"]


def as_message(answer: str | Message) -> Message:
    """Return the assistant's message with an answer."""
    if isinstance(answer, str):
        return {"role": "assistant", "content": answer}
    return answer


def as_text(answer: str | Message) -> str:
    """Return an answer or a message as one text, the calls in it as JSON: to compare and to show, not to train on."""
    if isinstance(answer, str):
        return answer
    lines = [answer["content"]] if answer["content"] else []
    lines += [json.dumps(call["function"], ensure_ascii=False) for call in answer.get("tool_calls", ())]
    return "\n".join(lines)
