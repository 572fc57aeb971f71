"""How a row of each format becomes messages. Plain Python: one row in, one row out.

The canonical row has `text`, or `prompt` (messages that end with the user's) with `completion`, with `chosen` and
`rejected` (text, or the assistant's message where it calls tools), or alone; and `tools` where there are any. A row
that does not fit raises RowFault with its field, what was seen, what was expected.
"""

import itertools
import re
from collections.abc import Mapping
from typing import Any

from pipeline.data import media
from pipeline.data.faults import Row, RowFault, shown, text_of
from pipeline.data.formats import ANSWERS, LABELS, QUESTIONS, SIDES, demonstration, first, is_dialogue, label_of
from pipeline.data.messages import Messages, check_order, dialogue, ends_with_user, messages_of, without_weights
from pipeline.data.tools import Message, answer_of, as_text, tools_of

_DIALOGUE = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ANSWER_TEXTS, _ANSWER_SCORES = ("text", "response", "completion", "content"), ("score", "pm_score", "overall_score")


def to_messages(row: Row, shape: str) -> Row:
    """One row of any format but raw text in canonical form, with all it holds."""
    if shape == "unpaired":
        label = next((found for name in LABELS if (found := label_of(row.get(name))) is not None), None)
        if label is None:
            raise RowFault("malformed", "label", f"expected true or false, got {shown(row.get('label'))}")
        return to_messages(row, demonstration(row) or "prompt_completion") | {"label": label}
    media.refuse_columns(row)
    if shape == "comparison" and row.get("chosen") is None:
        row = row | {ours: row.get(theirs) for theirs, ours in SIDES.items()}
    converted, system, tools = _to_messages(row, shape), _system(row), tools_of(row)
    if tools:
        converted = converted | {"tools": tools}
    if system and converted["prompt"][0]["role"] != "system":
        return converted | {"prompt": [*system, *converted["prompt"]]}
    if system and system[0] != converted["prompt"][0]:
        raise RowFault("malformed", "system", f"is another than the dialogue's own system message: {shown(system)}")
    return converted


def _to_messages(row: Row, shape: str) -> Row:
    if shape == "comparison":
        return _comparison(row, _prompt_field(row))
    if shape == "scored":
        return _scored(row)
    if shape == "hh":
        return _hh(row)
    if shape == "prompt":
        return {"prompt": ends_with_user(messages_of(row, "prompt", "user"))}
    if shape == "prompt_completion":
        prompt, answer = messages_of(row, "prompt", "user"), messages_of(row, "completion", "assistant")
        check_order(prompt, "prompt")
        return dialogue([*prompt, *answer], "completion")
    if shape == "messages":
        return dialogue(messages_of(row, "messages"), "messages")
    if shape == "alpaca":
        return dialogue([*_alpaca(row), {"role": "assistant", "content": text_of(row, "output")}], "instruction")
    if row.get("chosen") is not None or row.get("rejected") is not None:  # LLaMA-Factory's ranking variant
        return _comparison(row, "conversations")
    return dialogue(messages_of(row, "conversations"), "conversations")


def _system(row: Row) -> Messages:
    """A system message from a column beside the dialogue."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowFault("malformed", "system", f"expected text, got {shown(system)}")
    return [{"role": "system", "content": system}] if system and system.strip() else []


def _alpaca(row: Row) -> Messages:
    """Alpaca's prompt: earlier turns (`history`: pairs of instruction and answer), then instruction with input."""
    turns: Messages = []
    history = row.get("history") or []
    for pair in history if isinstance(history, list) else [history]:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(side, str) for side in pair):
            raise RowFault("malformed", "history", f"expected pairs of instruction and answer, got {shown(pair)}")
        if not all(side.strip() for side in pair):
            raise RowFault("empty", "history", f"has an empty turn: {shown(pair)}")
        turns += [{"role": role, "content": side} for role, side in zip(("user", "assistant"), pair, strict=True)]
    instruction, extra = text_of(row, "instruction"), row.get("input")
    if extra is not None and not isinstance(extra, str):
        raise RowFault("malformed", "input", f"expected text, got {shown(extra)}")
    text = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    return [*turns, {"role": "user", "content": text}]


def _prompt_field(row: Row) -> str | None:
    """The field that holds a comparison's prompt; None: it is what the two sides share."""
    return first({name: row.get(name) or None for name in QUESTIONS}, QUESTIONS)


def _comparison(row: Row, prompt_field: str | None) -> Row:
    chosen, rejected = messages_of(row, "chosen", "assistant"), messages_of(row, "rejected", "assistant")
    if len(chosen) > 1 or len(rejected) > 1:  # whole dialogues; a text beside them only repeats their first message
        before = messages_of(row, prompt_field) if prompt_field and isinstance(row[prompt_field], list) else []
        sides = [side if side[: len(before)] == before else [*before, *side] for side in (chosen, rejected)]
        return _pair(*sides)
    if prompt_field is None:
        raise RowFault("empty", "prompt", "is empty, and the sides are no whole dialogues")
    prompt = _alpaca(row) if prompt_field == "instruction" else messages_of(row, prompt_field, "user")
    return _pair([*prompt, *chosen], [*prompt, *rejected])


def _pair(chosen: Messages, rejected: Messages) -> Row:
    """A comparison from two whole dialogues, which share their prompt and differ in their last message."""
    if any("weight" in side[-1] for side in (chosen, rejected)):
        raise RowFault("malformed", "chosen", "expected two answers to compare, got one of weight 0")
    chosen, rejected = without_weights(chosen), without_weights(rejected)
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen[:-1], rejected[:-1], strict=False))
    prompt = [message for message, _ in shared]
    for field, side in (("chosen", chosen[len(prompt) :]), ("rejected", rejected[len(prompt) :])):
        if len(side) != 1 or side[0]["role"] != "assistant":
            seen = f"expected one assistant's message after what both sides share, got {shown(side)}"
            raise RowFault("roles", field, seen)
    if not prompt:
        raise RowFault("empty", "prompt", "is empty: the sides share no message")
    return _sides(ends_with_user(prompt), answer_of(chosen[-1]), answer_of(rejected[-1]))


def _sides(prompt: Messages, chosen: str | Message, rejected: str | Message) -> Row:
    if as_text(chosen).strip() == as_text(rejected).strip():
        raise RowFault("identical", "chosen", f"is equal to rejected: {shown(chosen)}")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _hh(row: Row) -> Row:
    """Dialogue strings as in HH-RLHF: "\\n\\nHuman: ...\\n\\nAssistant: ...", the prompt within or beside them."""
    fields = ("chosen", "rejected") if "chosen" in row else ("completion",) if "completion" in row else ()
    before = _turns(row, "prompt") if not fields or is_dialogue(row.get("prompt")) else []
    if before and before[-1] == {"role": "assistant", "content": ""}:
        before.pop()  # the header of the answer to come
    if not fields:
        return {"prompt": ends_with_user(_nonempty(before, "prompt"))}
    sides = [_nonempty(_hh_side(row, field, before), field) for field in fields]
    return _pair(*sides) if len(sides) == 2 else dialogue(sides[0], "completion")


def _hh_side(row: Row, field: str, before: Messages) -> Messages:
    """One side as a whole dialogue: it is one, or it is the answer to the dialogue before it."""
    if is_dialogue(row.get(field)):
        return _turns(row, field)
    answer = text_of(row, field).strip()
    if not before:
        where = "prompt" if row.get("prompt") else field
        raise RowFault("malformed", where, f"expected it to begin with 'Human:', got {shown(row[where])}")
    return [*before, {"role": "assistant", "content": answer}]


def _nonempty(turns: Messages, field: str) -> Messages:
    if not turns or not all(turn["content"] for turn in turns):
        raise RowFault("empty", field, "has an empty turn" if turns else "is empty")
    return turns


def _turns(row: Row, field: str) -> Messages:
    head, *parts = _DIALOGUE.split(text_of(row, field).strip())
    if head.strip() or not parts:
        raise RowFault("malformed", field, f"expected it to begin with 'Human:', got {shown(row[field][:80])}")
    roles = ("user" if speaker == "Human" else "assistant" for speaker in parts[::2])
    return [{"role": role, "content": said.strip()} for role, said in zip(roles, parts[1::2], strict=True)]


def _scored(row: Row) -> Row:
    """Several answers to a question with scores: the best against the worst. SHP's two answers with a preference."""
    if "human_ref_A" in row:
        prompt, texts = text_of(row, "history"), [text_of(row, "human_ref_A"), text_of(row, "human_ref_B")]
        first_is_better = label_of(row.get("labels"))
        if first_is_better is None:
            seen = shown(row.get("labels"))
            raise RowFault("malformed", "labels", f"expected 1 (A is better) or 0 (B is), got {seen}")
        chosen, rejected = texts if first_is_better else reversed(texts)
        return _sides([{"role": "user", "content": prompt}], chosen, rejected)
    question, field = first(row, QUESTIONS), first(row, ANSWERS)
    if question is None or field is None:
        raise RowFault("malformed", "prompt", f"expected a prompt with completions, got {shown(row)}")
    asked = _alpaca(row) if question == "instruction" else messages_of(row, question, "user")
    prompt = ends_with_user(asked)
    answers = row[field] if isinstance(row[field], list) else []
    if isinstance(row.get("scores"), list):
        pairs = list(zip(answers, row["scores"], strict=False)) if len(answers) == len(row["scores"]) else []
    else:
        said = [answer if isinstance(answer, Mapping) else {} for answer in answers]
        pairs = [(a.get(first(a, _ANSWER_TEXTS)), a.get(first(a, _ANSWER_SCORES))) for a in said]
    if len(pairs) < 2 or not all(isinstance(a, str) and _is_number(s) for a, s in pairs):
        raise RowFault("malformed", field, f"expected at least two texts, each with a score, got {shown(row[field])}")
    (best, high), (worst, low) = max(pairs, key=lambda pair: pair[1]), min(pairs, key=lambda pair: pair[1])
    if high == low:
        raise RowFault("tie", field, f"all scores are {high}")
    if not best.strip() or not worst.strip():
        raise RowFault("empty", field, "the best or the worst answer is empty")
    return _sides(prompt, best, worst)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value
