"""Render messages with the run's chat template, with a row's tools. Nothing of a row is lost in silence."""

import functools
import json
from collections import defaultdict
from typing import Any, cast

from jinja2 import TemplateError, UndefinedError
from transformers import PreTrainedTokenizerFast

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
_QUESTION = {"role": "user", "content": "What is salt?"}
_ANSWER = {"role": "assistant", "content": "A mineral."}
_WANTS_IDS = "length 9"  # what Mistral's templates say of calls with other ids, or none
_MEND = "set tokenizer.chat_template to a template with tools, such as `hermes`, or leave these rows out"


def render(
    tokenizer: PreTrainedTokenizerFast, dialogues: list[Messages], tools: list[list[Row]], add_generation_prompt: bool
) -> list[str | RowFault]:
    """Return dialogues as text, each with its tools; a RowFault in the place of one that the template does not take.

    A row with tools is at fault too where the template does not show them, or what was called or given.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for i, tools_of_row in enumerate(tools):
        groups[json.dumps(tools_of_row)].append(i)
    texts: list[str | RowFault] = [""] * len(dialogues)
    for rows in groups.values():
        has_tools = bool(tools[rows[0]])
        batch = [_as_taken(tokenizer, without_weights(dialogues[i]), has_tools) for i in rows]
        rendered = _rendered(tokenizer, batch, tools[rows[0]], add_generation_prompt)
        for i, text in zip(rows, rendered, strict=True):
            texts[i] = _lost(tokenizer, dialogues[i], tools[i]) or text
    return texts


def _rendered(
    tokenizer: PreTrainedTokenizerFast, dialogues: list[Messages], tools: list[Row], add_generation_prompt: bool
) -> list[str | RowFault]:
    """Return dialogues with the same tools as text, or one by one where the template does not take all of them."""
    options: dict[str, Any] = {"add_generation_prompt": add_generation_prompt, "tools": tools or None}
    try:
        texts = tokenizer.apply_chat_template(dialogues, tokenize=False, **options)
        return cast("list[str | RowFault]", texts)  # one text for each dialogue, as nothing is tokenised
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
    """Return a dialogue whose calls and results have ids of nine letters and digits; others are made from a count.

    So the start of a dialogue has the ids that it has within the whole. A result has the id of its call: the one that
    it names, or the next one.
    """
    numbered: Messages = []
    number = 0
    ids: dict[str | None, str] = {}  # theirs -> ours, of the calls that were made last
    waiting: list[str] = []
    for message in dialogue:
        if "tool_calls" in message:
            calls = []
            ids = {}
            for call in message["tool_calls"]:
                number += 1
                theirs = call.get("id")
                ids[theirs] = theirs if _fits(theirs) else f"{number:09d}"
                calls.append(call | {"id": ids[theirs]})
            message = message | {"tool_calls": calls}
            waiting = [call["id"] for call in calls]
        elif message["role"] == "tool":
            following = waiting.pop(0) if waiting else f"{number:09d}"
            theirs = message.get("tool_call_id")
            if not _fits(theirs):
                ours = ids.get(theirs, following) if theirs else following
                message = message | {"tool_call_id": ours}
        numbered.append(message)
    return numbered


def _fits(key: str | None) -> bool:
    """Tell whether an id of a call is one that Mistral's templates take."""
    return key is not None and len(key) == 9 and key.isascii() and key.isalnum()


def _refusal(error: Exception) -> RowFault:
    """Return the fault of a row that a template refuses on purpose, or that it fails at through an error of its own."""
    if isinstance(error, TemplateError) and not isinstance(error, UndefinedError):
        return RowFault("roles", "prompt", f"the chat template refuses it: {error}")
    return RowFault("malformed", "prompt", f"the chat template fails{line_of(error)}: {code_error(error)}")


def _lost(tokenizer: PreTrainedTokenizerFast, dialogue: Messages, tools: list[Row]) -> RowFault | None:
    """Return a fault where the template would leave out tools, calls or results of a dialogue."""
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
    template = str(tokenizer.chat_template)
    has_tools = bool(tools)
    for what in _not_shown(tokenizer, template, _takes_json(tokenizer, has_tools), has_tools):
        if needed[what]:
            name = described(tokenizer.chat_template)
            return RowFault("malformed", what, f"{name} does not show {what}; {_MEND}")
    return None


def _as_taken(tokenizer: PreTrainedTokenizerFast, dialogue: Messages, has_tools: bool) -> Messages:
    """Return a dialogue with the arguments of its calls in the form that the template takes."""
    if not any("tool_calls" in message for message in dialogue) or not _takes_json(tokenizer, has_tools):
        return dialogue
    return [_with_json(message) for message in dialogue]


def _takes_json(tokenizer: PreTrainedTokenizerFast, has_tools: bool) -> bool:
    """Tell whether the template shows calls only where their arguments are JSON, as DeepSeek's does."""
    template = str(tokenizer.chat_template)
    what = "calls of tools"
    if what not in _not_shown(tokenizer, template, False, has_tools):
        return False
    return what not in _not_shown(tokenizer, template, True, has_tools)


def _with_json(message: Message) -> Message:
    """Return a message with the arguments of its calls as JSON."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append(call | {"function": call["function"] | {"arguments": arguments}})
    return message | {"tool_calls": calls}


@functools.lru_cache(maxsize=8)
def _not_shown(tokenizer: PreTrainedTokenizerFast, _template: str, as_json: bool, has_tools: bool) -> list[str]:
    """Return what a template does not show of a dialogue whose parts are easy to find again.

    A template may have another branch, and a tokenizer another template, for dialogues without definitions of tools.
    """
    first, first_result = _called(1)
    second, second_result = _called(2)
    calling = {"role": "assistant", "content": "", "tool_calls": [first]}
    dialogues = [
        [_QUESTION, _ANSWER],
        [_QUESTION, calling, first_result, _ANSWER],
        [_QUESTION, calling | {"tool_calls": [first, second]}, first_result, second_result, _ANSWER],
        [_QUESTION, calling | {"content": "probed text"}, first_result, _ANSWER],
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
    return [what for what, is_there in shows.items() if not is_there]


def _called(number: int) -> tuple[Row, Message]:
    """Return a call and the message with its result. Mistral's templates want ids of nine letters and digits."""
    name = f"probed_call_{number}"
    key = f"probecal{number}"
    arguments = {f"probed_key_{number}": f"probed value {number}"}
    call = {"id": key, "type": "function", "function": {"name": name, "arguments": arguments}}
    return call, {"role": "tool", "name": name, "tool_call_id": key, "content": f"probed result {number}"}


def _shows(text: str | RowFault, *parts: str) -> bool:
    """Tell whether a dialogue was rendered, with all these parts in it."""
    return isinstance(text, str) and all(part in text for part in parts)
