"""Turn a row of each format into messages. Plain Python: one row in, one row out.

The canonical row has `text`, or `prompt` (messages that end with the user's) with `completion`, with `chosen` and
`rejected` (text, or the assistant's message where it calls tools), or alone; and `tools` where there are any. A row
that does not fit raises RowFault with its field, what was seen, what was expected.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pipeline.data import media
from pipeline.data.faults import Row, RowFault, shown, text_of
from pipeline.data.formats import ANSWERS, LABELS, QUESTIONS, SIDES, demonstration, first, is_dialogue, label_of
from pipeline.data.hh import nonempty, side_of, turns_of
from pipeline.data.messages import Messages, check_order, dialogue, ends_with_user, messages_of, without_weights
from pipeline.data.tools import Message, answer_of, as_text, tools_of

_ANSWER_TEXTS = ("text", "response", "completion", "content")
_ANSWER_SCORES = ("score", "pm_score", "overall_score")


def to_messages(row: Row, shape: str) -> Row:
    """Turn one row of any format into canonical form, with everything it holds. Raw text has no such form.

    Raises:
        RowFault: if the row does not fit its format.
    """
    if shape == "unpaired":
        labels = [label_of(row.get(name)) for name in LABELS]
        label = next((label for label in labels if label is not None), None)
        if label is None:
            raise RowFault("malformed", "label", f"expected true or false, got {shown(row.get('label'))}")
        return to_messages(row, demonstration(row) or "prompt_completion") | {"label": label}
    media.refuse_columns(row)
    converted = _READERS[shape](row)
    system = _system(row)
    tools = tools_of(row)
    if tools:
        converted = converted | {"tools": tools}
    prompt = converted["prompt"]
    if system and prompt[0]["role"] != "system":
        return converted | {"prompt": [*system, *prompt]}
    if system and system[0] != prompt[0]:
        raise RowFault("malformed", "system", f"is another than the dialogue's own system message: {shown(system)}")
    return converted


def _system(row: Row) -> Messages:
    """Return the system message from a column beside the dialogue; an empty list if there is no message."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowFault("malformed", "system", f"expected text, got {shown(system)}")
    if system is None or not system.strip():
        return []
    return [{"role": "system", "content": system}]


def _raw_text(row: Row) -> Row:
    raise RowFault("malformed", "text", f"expected a dialogue, got raw text: {shown(row.get('text'))}")


# Prompts and demonstrations


def _prompt(row: Row) -> Row:
    return {"prompt": ends_with_user(messages_of(row, "prompt", "user"))}


def _prompt_completion(row: Row) -> Row:
    prompt = messages_of(row, "prompt", "user")
    answer = messages_of(row, "completion", "assistant")
    check_order(prompt, "prompt")
    return dialogue([*prompt, *answer], "completion")


def _messages(row: Row) -> Row:
    return dialogue(messages_of(row, "messages"), "messages")


def _sharegpt(row: Row) -> Row:
    if row.get("chosen") is not None or row.get("rejected") is not None:  # LLaMA-Factory's ranking variant
        return _with_sides(row, "conversations")
    return dialogue(messages_of(row, "conversations"), "conversations")


def _alpaca(row: Row) -> Row:
    prompt = _alpaca_prompt(row)
    answer = {"role": "assistant", "content": text_of(row, "output")}
    return dialogue([*prompt, answer], "instruction")


def _alpaca_prompt(row: Row) -> Messages:
    """Return Alpaca's prompt: earlier turns (`history`: pairs of instruction and answer), instruction, input."""
    turns: Messages = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise RowFault("malformed", "history", f"expected pairs of instruction and answer, got {shown(pair)}")
        if not all(side.strip() for side in pair):
            raise RowFault("empty", "history", f"has an empty turn: {shown(pair)}")
        question, answer = pair
        turns.append({"role": "user", "content": question})
        turns.append({"role": "assistant", "content": answer})
    text = text_of(row, "instruction")
    extra = row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowFault("malformed", "input", f"expected text, got {shown(extra)}")
    if extra and extra.strip():
        text = f"{text}\n\n{extra}"
    return [*turns, {"role": "user", "content": text}]


# Comparisons


def _comparison(row: Row) -> Row:
    if row.get("chosen") is None:
        row = row | {ours: row.get(theirs) for theirs, ours in SIDES.items()}
    # A field that is empty counts as absent: then the prompt is what the two sides share.
    prompt_field = first({name: row.get(name) or None for name in QUESTIONS}, QUESTIONS)
    return _with_sides(row, prompt_field)


def _with_sides(row: Row, prompt_field: str | None) -> Row:
    """Return the comparison of `chosen` and `rejected`: answers to a prompt, or whole dialogues."""
    chosen = messages_of(row, "chosen", "assistant")
    rejected = messages_of(row, "rejected", "assistant")
    if len(chosen) > 1 or len(rejected) > 1:  # whole dialogues; a text beside them only repeats their first message
        before: Messages = []
        if prompt_field and isinstance(row[prompt_field], list):
            before = messages_of(row, prompt_field)
        return _pair(_after(before, chosen), _after(before, rejected))
    if prompt_field is None:
        raise RowFault("empty", "prompt", "is empty, and the sides are no whole dialogues")
    prompt = _question(row, prompt_field)
    return _pair([*prompt, *chosen], [*prompt, *rejected])


def _after(before: Messages, side: Messages) -> Messages:
    """Return a side with the messages before it, which it may hold already."""
    if side[: len(before)] == before:
        return side
    return [*before, *side]


def _question(row: Row, field: str) -> Messages:
    """Return the prompt in a field; `instruction` may have the other fields of Alpaca beside it."""
    if field == "instruction":
        return _alpaca_prompt(row)
    return messages_of(row, field, "user")


def _pair(chosen: Messages, rejected: Messages) -> Row:
    """Return the comparison of two whole dialogues, which share their prompt and differ in their last message."""
    if any("weight" in side[-1] for side in (chosen, rejected)):
        raise RowFault("malformed", "chosen", "expected two answers to compare, got one of weight 0")
    chosen = without_weights(chosen)
    rejected = without_weights(rejected)
    both = zip(chosen[:-1], rejected[:-1], strict=False)
    prompt = [message for message, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both)]
    for field, side in (("chosen", chosen[len(prompt) :]), ("rejected", rejected[len(prompt) :])):
        if len(side) != 1 or side[0]["role"] != "assistant":
            fault = f"expected one assistant's message after what both sides share, got {shown(side)}"
            raise RowFault("roles", field, fault)
    if not prompt:
        raise RowFault("empty", "prompt", "is empty: the sides share no message")
    return _sides(ends_with_user(prompt), answer_of(chosen[-1]), answer_of(rejected[-1]))


def _sides(prompt: Messages, chosen: str | Message, rejected: str | Message) -> Row:
    if as_text(chosen).strip() == as_text(rejected).strip():
        raise RowFault("identical", "chosen", f"is equal to rejected: {shown(chosen)}")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# HH-RLHF's dialogue strings


def _hh(row: Row) -> Row:
    """Read dialogue strings such as "\\n\\nHuman: ...\\n\\nAssistant: ...", the prompt within or beside them."""
    fields: tuple[str, ...] = ()
    if "chosen" in row:
        fields = ("chosen", "rejected")
    elif "completion" in row:
        fields = ("completion",)
    before: Messages = []
    if not fields or is_dialogue(row.get("prompt")):
        before = turns_of(row, "prompt")
    if before and before[-1] == {"role": "assistant", "content": ""}:
        before.pop()  # the header of the answer to come
    if not fields:
        return {"prompt": ends_with_user(nonempty(before, "prompt"))}
    sides = [nonempty(side_of(row, field, before), field) for field in fields]
    if len(sides) == 2:
        return _pair(*sides)
    return dialogue(sides[0], "completion")


# Answers with scores


def _scored(row: Row) -> Row:
    """Compare the best of several answers with the worst, by their scores."""
    if "human_ref_A" in row:
        return _shp(row)
    question = first(row, QUESTIONS)
    field = first(row, ANSWERS)
    if question is None or field is None:
        raise RowFault("malformed", "prompt", f"expected a prompt with completions, got {shown(row)}")
    prompt = ends_with_user(_question(row, question))
    answers = _answers(row, field)
    best, highest = max(answers, key=_score_of)
    worst, lowest = min(answers, key=_score_of)
    if highest == lowest:
        raise RowFault("tie", field, f"all scores are {highest}")
    if not best.strip() or not worst.strip():
        raise RowFault("empty", field, "the best or the worst answer is empty")
    return _sides(prompt, best, worst)


def _answers(row: Row, field: str) -> list[tuple[str, float]]:
    """Return the answers in a field with their scores, from the column `scores` or from within each answer."""
    values = row[field] if isinstance(row[field], list) else []
    scores = row.get("scores")
    answers: list[tuple[Any, Any]] = []
    if not isinstance(scores, list):
        answers = [(_value_of(value, _ANSWER_TEXTS), _value_of(value, _ANSWER_SCORES)) for value in values]
    elif len(scores) == len(values):
        answers = list(zip(values, scores, strict=True))
    if len(answers) < 2 or not all(isinstance(text, str) and _is_number(score) for text, score in answers):
        raise RowFault("malformed", field, f"expected at least two texts, each with a score, got {shown(row[field])}")
    return answers


def _value_of(answer: object, names: Iterable[str]) -> Any:
    """Return the value of the first of several fields that an answer has; None if it has none of them."""
    if not isinstance(answer, Mapping):
        return None
    return next((answer[name] for name in names if answer.get(name) is not None), None)


def _score_of(answer: tuple[str, float]) -> float:
    _, score = answer
    return score


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _shp(row: Row) -> Row:
    """Read SHP's two answers with a preference."""
    prompt: Messages = [{"role": "user", "content": text_of(row, "history")}]
    answer_a = text_of(row, "human_ref_A")
    answer_b = text_of(row, "human_ref_B")
    a_is_better = label_of(row.get("labels"))
    if a_is_better is None:
        value = shown(row.get("labels"))
        raise RowFault("malformed", "labels", f"expected 1 (A is better) or 0 (B is), got {value}")
    if a_is_better:
        return _sides(prompt, answer_a, answer_b)
    return _sides(prompt, answer_b, answer_a)


_READERS: dict[str, Callable[[Row], Row]] = {
    "text": _raw_text,
    "prompt": _prompt,
    "prompt_completion": _prompt_completion,
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "comparison": _comparison,
    "hh": _hh,
    "scored": _scored,
}
