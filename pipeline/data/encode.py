"""From messages to token ids, the same in every stage, a batch of rows at a time.

A prompt ends with the template's assistant header, what the assistant says with eos. TRL's trainers are handed token
ids, so nothing is filtered, truncated or templated differently behind our back.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipeline.data.faults import Row, RowFault
from pipeline.data.joints import begins_with, continuations, token_ids
from pipeline.data.messages import Messages
from pipeline.data.rendering import render
from pipeline.data.tools import Message, as_message, as_text

_MEND = "set tokenizer.chat_template to `chatml` (with tools: `hermes`) or to a file of your own"


def prompt_ids(tokenizer: Any, prompt: Messages) -> list[int]:
    """Token ids of a prompt, up to and including the assistant's header."""
    (text,) = render(tokenizer, [prompt], [[]], add_generation_prompt=True)
    return token_ids(tokenizer, [text])[0]


@dataclass(frozen=True)
class _Turn:
    """What an assistant's turn adds to its dialogue: the text before it, what it says, and the text after its eos."""

    context: str
    said: str
    after: str
    is_learnt: bool = True


def _turn(head: str, text: str, done: str, answer: Message, eos: str) -> _Turn | RowFault:
    """The turn that `text` adds to `head`; `done` of it was seen before."""
    if not (head.startswith(done) and text.startswith(head)):
        seen = f"the prompt alone is {head[-200:]!r}, with its answer {text[-300:]!r}"
        what = "the chat template renders the prompt differently when an answer follows it"
        return RowFault("malformed", "prompt", f"{what}: {seen}; {_MEND}")
    rest = text[len(head) :]
    context, is_learnt = head[len(done) :], "weight" not in answer
    if rest.count(eos) <= as_text(answer).count(eos):  # the template writes none of its own
        return _Turn(context, rest, "", is_learnt)
    said, _, after = rest.rpartition(eos)
    return _Turn(context, said, after, is_learnt)


def encode_dialogues(
    tokenizer: Any, dialogues: list[Messages], tools: list[list[Row]]
) -> list[tuple[list[int], list[int]] | RowFault]:
    """Token ids of dialogues that end with the assistant, with a mask that has 1 on what the assistant says.

    A call of a tool is said by the assistant, what the tool gave is not. A message of weight 0 has no 1 in the mask.

    Each of its turns ends with eos, and follows the tokens of the prompt before it, as generation meets them. What a
    template writes after the last eos (ChatML's newline) is cut: a policy stops at eos, so the reward model must be
    trained to read the score there.
    """
    places = [(row, i) for row, d in enumerate(dialogues) for i, m in enumerate(d) if m["role"] == "assistant"]
    given = [tools[row] for row, _ in places]
    heads = render(tokenizer, [dialogues[row][:i] for row, i in places], given, add_generation_prompt=True)
    texts = render(tokenizer, [dialogues[row][: i + 1] for row, i in places], given, add_generation_prompt=False)
    turns: list[list[_Turn] | RowFault] = [[] for _ in dialogues]
    done = [""] * len(dialogues)
    for (row, i), head, text in zip(places, heads, texts, strict=True):
        answer = dialogues[row][i]
        turn = _fault(turns[row], head, text) or _turn(head, text, done[row], answer, tokenizer.eos_token)
        if isinstance(turn, RowFault):
            turns[row] = turn
        else:
            turns[row].append(turn)
            done[row] = text[: len(text) - len(turn.after)]
    parts = [part for row in turns if isinstance(row, list) for part in _parts(row, tokenizer.eos_token)]
    encoded = iter(continuations(tokenizer, parts))
    eos = tokenizer.eos_token_id
    return [row if isinstance(row, RowFault) else _joined(row, encoded, eos) for row in turns]


def _parts(turns: list[_Turn], eos: str) -> Iterator[tuple[str, str]]:
    """What is encoded of a dialogue: context and answer of every turn, each with all that is before it."""
    before = ""
    for turn in turns:
        yield before, turn.context
        yield before + turn.context, turn.said
        before += turn.context + turn.said + eos


def _fault(*values: Any) -> RowFault | None:
    return next((value for value in values if isinstance(value, RowFault)), None)


def _joined(turns: list[_Turn], encoded: Iterator[list[int]], eos_token_id: int) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    mask: list[int] = []
    for turn in turns:
        context, said = next(encoded), next(encoded)
        ids += context + said + [eos_token_id]
        mask += [0] * len(context) + [int(turn.is_learnt)] * (len(said) + 1)
    return ids, mask


def encode_rows(tokenizer: Any, rows: list[Row], want: str) -> list[Row | RowFault]:
    """Token ids of canonical rows.

    `input_ids` (text), with `completion_mask` (demonstrations), `prompt_ids` with `chosen_ids` and `rejected_ids`
    (comparisons), `prompt_ids` beside the messages (prompts).
    """
    if want == "text":
        return [{"input_ids": ids} for ids in _encode_texts(tokenizer, [row["text"] for row in rows])]
    prompts = [row["prompt"] for row in rows]
    tools = [row.get("tools", []) for row in rows]
    if want == "prompts":
        texts = render(tokenizer, prompts, tools, add_generation_prompt=True)
        encoded = iter(token_ids(tokenizer, [text for text in texts if isinstance(text, str)]))
        pairs = zip(prompts, texts, strict=True)
        return [
            t if isinstance(t, RowFault) else {"prompt": _texts_of(p), "prompt_ids": next(encoded)} for p, t in pairs
        ]

    if want == "demonstrations":
        answers = [[*row["prompt"], as_message(row["completion"])] for row in rows]
        found = encode_dialogues(tokenizer, answers, tools)
        encoded = [e if isinstance(e, RowFault) else {"input_ids": e[0], "completion_mask": e[1]} for e in found]
        _mark_other_tokens(tokenizer, rows, encoded)
        return encoded
    return _encode_comparisons(tokenizer, rows)


def _texts_of(prompt: Messages) -> list[dict[str, str]]:
    """A prompt as reports and judges see it: who said what, calls of tools as JSON."""
    return [{"role": message["role"], "content": as_text(message)} for message in prompt]


def _mark_other_tokens(tokenizer: Any, rows: list[Row], encoded: list[Row | RowFault]) -> None:
    """Set `_other_tokens` where the last answer follows other tokens than a policy would be sampled from.

    An earlier answer has the tokens that follow its own prompt. As part of a later prompt it is encoded with what is
    around it, which may join its ends to that; where the template writes no eos, it does not end with one there.
    """
    several = []
    for row, ids in zip(rows, encoded, strict=True):
        if not isinstance(ids, RowFault) and any(message["role"] == "assistant" for message in row["prompt"]):
            several.append((row, ids))
    prompts = [row["prompt"] for row, _ in several]
    tools = [row.get("tools", []) for row, _ in several]
    texts = render(tokenizer, prompts, tools, add_generation_prompt=True)
    for (_, ids), sampled_from in zip(several, token_ids(tokenizer, texts), strict=True):
        mask = ids["completion_mask"]
        start = len(mask) - mask[::-1].index(0)
        ids["_other_tokens"] = int(ids["input_ids"][:start] != sampled_from)


def _encode_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of raw texts, with eos and with the BOS that the tokenizer begins a text with."""
    bos, eos = begins_with(tokenizer), tokenizer.eos_token_id
    encoded = token_ids(tokenizer, texts)
    for ids in encoded:
        if bos is not None and ids[:1] != [bos]:  # a text may bring its own
            ids.insert(0, bos)
        ids.append(eos)
    return encoded


def _encode_comparisons(tokenizer: Any, rows: list[Row]) -> list[Row | RowFault]:
    """Token ids of comparisons. Earlier answers of the assistant belong to the prompt, which is one text."""
    tools = [row.get("tools", []) for row in rows]
    heads = render(tokenizer, [row["prompt"] for row in rows], tools, add_generation_prompt=True)
    sides = []
    for side in ("chosen", "rejected"):
        dialogues = [[*row["prompt"], as_message(row[side])] for row in rows]
        sides.append(render(tokenizer, dialogues, tools, add_generation_prompt=False))
    eos, found, parts = [tokenizer.eos_token_id], [], []
    for row, head, *texts in zip(rows, heads, *sides, strict=True):
        said = [
            _fault(head, text) or _turn(head, text, "", as_message(row[side]), tokenizer.eos_token)
            for side, text in zip(("chosen", "rejected"), texts, strict=True)
        ]
        found.append(_fault(*said))
        if found[-1] is None:
            parts += [("", head), *((head, turn.said) for turn in said)]
    ids = iter(continuations(tokenizer, parts))
    encoded: list[Row | RowFault] = []
    for fault in found:
        row = fault or {"prompt_ids": next(ids), "chosen_ids": next(ids) + eos, "rejected_ids": next(ids) + eos}
        if fault is None and row["chosen_ids"] == row["rejected_ids"]:
            row = RowFault("identical", "chosen", "has the same tokens as rejected")
        encoded.append(row)
    return encoded


def special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What finds the tokenizer's special tokens in a text, where they would be read as control tokens."""
    tokens = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)))
