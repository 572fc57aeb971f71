"""Messages as the text of the run's chat template, with a row's tools. Nothing of a row is lost in silence."""

import functools
import json
from collections import defaultdict
from typing import Any

from jinja2 import TemplateError, UndefinedError

from pipeline.data.chat_templates import CODE_ERRORS, code_error, described, line_of
from pipeline.data.faults import Row, RowFault
from pipeline.data.messages import Messages, without_weights
from pipeline.data.tools import Message

# A dialogue whose parts are found again in a text that shows them.
_TOOL: Row = {
    "type": "function",
    "function": {
        "name": "probed_tool",
        "description": "Looks up a word.",
        "parameters": {
            "type": "object",
            "properties": {"probed_parameter": {"type": "string", "description": "A word."}},
            "required": ["probed_parameter"],
        },
    },
}
_ASKED = {"role": "user", "content": "What is salt?"}
_SAID = {"role": "assistant", "content": "A mineral."}
_WANTS_IDS = "length 9"  # what Mistral's templates say of calls with other ids, or none
_MEND = "set tokenizer.chat_template to a template with tools, such as `hermes`, or leave these rows out"


def render(
    tokenizer: Any, dialogues: list[Messages], tools: list[list[Row]], add_generation_prompt: bool
) -> list[str | RowFault]:
    """Dialogues as text, each with its tools; a RowFault in the place of one that the template does not take.

    A row with tools is at fault too where the template does not show them, or what was called or given.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, found in enumerate(tools):
        groups[json.dumps(found)].append(i)
    texts: list[str | RowFault] = [""] * len(dialogues)
    for rows in groups.values():
        has_tools = bool(tools[rows[0]])
        batch = [_as_taken(tokenizer, without_weights(dialogues[i]), has_tools) for i in rows]
        rendered = _rendered(tokenizer, batch, tools[rows[0]], add_generation_prompt)
        for i, text in zip(rows, rendered, strict=True):
            texts[i] = _lost(tokenizer, dialogues[i], tools[i]) or text
    return texts


def _rendered(
    tokenizer: Any, dialogues: list[Messages], tools: list[Row], add_generation_prompt: bool
) -> list[str | RowFault]:
    options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, "tools": tools or None}
    try:
        return tokenizer.apply_chat_template(dialogues, **options)
    except (TemplateError, *CODE_ERRORS) as error:
        if _WANTS_IDS in str(error):
            numbered = [_with_ids(dialogue) for dialogue in dialogues]
            if numbered != dialogues:
                return _rendered(tokenizer, numbered, tools, add_generation_prompt)
        if len(dialogues) == 1:
            return [_refusal(error)]
        one_by_one = (_rendered(tokenizer, [dialogue], tools, add_generation_prompt) for dialogue in dialogues)
        return [text for (text,) in one_by_one]


def _with_ids(dialogue: Messages) -> Messages:
    """A dialogue whose calls and results have ids of nine letters and digits; others are made from a count.

    So the start of a dialogue has the ids that it has within the whole. A result has the id of its call: the one that
    it names, or the next one.
    """
    made, number = [], 0
    given: dict[str | None, str] = {}
    waiting: list[str] = []
    for message in dialogue:
        if "tool_calls" in message:
            calls, given = [], {}
            for call in message["tool_calls"]:
                number += 1
                theirs = call.get("id")
                given[theirs] = theirs if _fits(theirs) else f"{number:09d}"
                calls.append(call | {"id": given[theirs]})
            message = message | {"tool_calls": calls}
            waiting = [call["id"] for call in calls]
        elif message["role"] == "tool":
            following = waiting.pop(0) if waiting else f"{number:09d}"
            theirs = message.get("tool_call_id")
            if not _fits(theirs):
                ours = given.get(theirs, following) if theirs else following
                message = message | {"tool_call_id": ours}
        made.append(message)
    return made


def _fits(key: str | None) -> bool:
    return key is not None and len(key) == 9 and key.isascii() and key.isalnum()


def _refusal(error: Exception) -> RowFault:
    """A chat template raises on purpose where it does not take a dialogue, or else it has an error."""
    if isinstance(error, TemplateError) and not isinstance(error, UndefinedError):
        return RowFault("roles", "prompt", f"the chat template refuses it: {error}")
    return RowFault("malformed", "prompt", f"the chat template fails{line_of(error)}: {code_error(error)}")


def _lost(tokenizer: Any, dialogue: Messages, tools: list[Row]) -> RowFault | None:
    """A fault where the template would leave out tools, calls or results of a dialogue."""
    calling = [message for message in dialogue if "tool_calls" in message]
    results = [message for message in dialogue if message["role"] == "tool"]
    if not (tools or calling or results):
        return None
    needed = {
        "tools": tools,
        "calls of tools": calling,
        "results of tools": results,
        "several calls at once": [message for message in calling if len(message["tool_calls"]) > 1],
        "text beside calls of tools": [message for message in calling if message["content"].strip()],
    }
    template, has_tools = str(tokenizer.chat_template), bool(tools)
    for what in _not_shown(tokenizer, template, _takes_json(tokenizer, has_tools), has_tools):
        if needed[what]:
            name = described(tokenizer.chat_template)
            return RowFault("malformed", what, f"{name} does not show {what}; {_MEND}")
    return None


def _as_taken(tokenizer: Any, dialogue: Messages, has_tools: bool) -> Messages:
    """A dialogue with the arguments of its calls in the form that the template takes."""
    if not any("tool_calls" in message for message in dialogue) or not _takes_json(tokenizer, has_tools):
        return dialogue
    return [_with_json(message) for message in dialogue]


def _takes_json(tokenizer: Any, has_tools: bool) -> bool:
    """Whether the template shows calls only where their arguments are JSON, as DeepSeek's does."""
    template, what = str(tokenizer.chat_template), "calls of tools"
    if what not in _not_shown(tokenizer, template, False, has_tools):
        return False
    return what not in _not_shown(tokenizer, template, True, has_tools)


def _with_json(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}


@functools.lru_cache(maxsize=8)
def _not_shown(tokenizer: Any, _template: str, as_json: bool, has_tools: bool) -> list[str]:
    """What a template does not show of a dialogue whose parts are easy to find again.

    A template may have another branch, and a tokenizer another template, for dialogues without definitions of tools.
    """
    first, given = _called(1)
    second, also_given = _called(2)
    calling = {"role": "assistant", "content": "", "tool_calls": [first]}
    dialogues = [
        [_ASKED, _SAID],
        [_ASKED, calling, given, _SAID],
        [_ASKED, calling | {"tool_calls": [first, second]}, given, also_given, _SAID],
        [_ASKED, calling | {"content": "probed text"}, given, _SAID],
    ]
    if as_json:
        dialogues = [[_with_json(message) for message in dialogue] for dialogue in dialogues]
    plain, one, several, beside = _rendered(tokenizer, dialogues, [_TOOL] * has_tools, add_generation_prompt=False)
    shows = {
        "tools": not has_tools or _shows(plain, "probed_tool", "probed_parameter"),
        "calls of tools": _shows(one, "probed_call_1", "probed_key_1", "probed value 1"),
        "results of tools": _shows(one, "probed result 1"),
        # A template that raises here raises for the row as well, and says why.
        "several calls at once": isinstance(several, RowFault) or _shows(several, "probed_call_2", "probed result 2"),
        "text beside calls of tools": isinstance(beside, RowFault) or _shows(beside, "probed text"),
    }
    return [what for what, there in shows.items() if not there]


def _called(number: int) -> tuple[Row, Message]:
    """A call, and what it gave. Mistral's templates want ids of nine letters and digits."""
    name, key = f"probed_call_{number}", f"probecal{number}"
    arguments = {f"probed_key_{number}": f"probed value {number}"}
    call = {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}
    return call, {"role": "tool", "name": name, "tool_call_id": key, "content": f"probed result {number}"}


def _shows(text: str | RowFault, *parts: str) -> bool:
    return isinstance(text, str) and all(part in text for part in parts)
