"""Turn canonical rows into token ids, the same in every stage, a batch of rows at a time.

A prompt ends with the template's assistant header, what the assistant says with eos. TRL's trainers are handed token
ids, so nothing is filtered, truncated or templated differently behind our back.
"""

import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from pipeline.data.faults import Row, RowFault
from pipeline.data.joints import begins_with, continuations, eos_id, eos_text, token_ids
from pipeline.data.messages import Messages
from pipeline.data.rendering import render
from pipeline.data.tools import Message, as_message, as_text

_MEND = "set tokenizer.chat_template to `chatml` (with tools: `hermes`) or to a file of your own"


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Messages) -> list[int]:
    """Return the token ids of a prompt, up to and including the assistant's header."""
    (text,) = render(tokenizer, [prompt], [[]], add_generation_prompt=True)
    if isinstance(text, RowFault):
        raise text
    return token_ids(tokenizer, [text])[0]


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the token ids of raw texts, with eos and with the BOS that the tokenizer begins a text with."""
    bos = begins_with(tokenizer)
    encoded = token_ids(tokenizer, texts)
    for ids in encoded:
        if bos is not None and ids[:1] != [bos]:  # a text may bring its own
            ids.insert(0, bos)
        ids.append(eos_id(tokenizer))
    return encoded


def encode_prompts(
    tokenizer: PreTrainedTokenizerFast, prompts: list[Messages], tools: list[list[Row]]
) -> list[list[int] | RowFault]:
    """Return the token ids of prompts, each up to and including the assistant's header."""
    texts = render(tokenizer, prompts, tools, add_generation_prompt=True)
    encoded = iter(token_ids(tokenizer, [text for text in texts if isinstance(text, str)]))
    return [text if isinstance(text, RowFault) else next(encoded) for text in texts]


@dataclass(frozen=True)
class _Answer:
    """One answer of the assistant as the template renders it: the dialogue up to its header, and up to its end."""

    message: Message
    head: str | RowFault
    text: str | RowFault


@dataclass(frozen=True)
class _Turn:
    """What an answer adds to its dialogue: the text before it, what the assistant says, the text after its eos."""

    context: str
    answer: str
    after: str
    is_learnt: bool


def _turn(answer: _Answer, before: str, eos: str) -> _Turn | RowFault:
    """Split what an answer adds to a dialogue. `before` is the part of the dialogue that earlier turns hold.

    With ChatML, the dialogue's second answer has the head "...<|im_end|>\\n<|im_start|>user\\nAnd now?<|im_end|>\\n
    <|im_start|>assistant\\n", of which all up to the first <|im_end|> is `before`. The rest of the head is the turn's
    context, and "Rain.<|im_end|>\\n" is cut at its eos into the answer "Rain." and the newline after it.
    """
    head = answer.head
    text = answer.text
    if isinstance(head, RowFault):
        return head
    if isinstance(text, RowFault):
        return text
    if not (head.startswith(before) and text.startswith(head)):
        texts = f"the prompt alone is {head[-200:]!r}, with its answer {text[-300:]!r}"
        what = "the chat template renders the prompt differently when an answer follows it"
        return RowFault("malformed", "prompt", f"{what}: {texts}; {_MEND}")
    context = head[len(before) :]
    is_learnt = "weight" not in answer.message
    rest = text[len(head) :]
    if rest.count(eos) <= as_text(answer.message).count(eos):  # the template writes none of its own
        return _Turn(context, rest, "", is_learnt)
    spoken, _, after = rest.rpartition(eos)
    return _Turn(context, spoken, after, is_learnt)


def encode_dialogues(
    tokenizer: PreTrainedTokenizerFast, dialogues: list[Messages], tools: list[list[Row]]
) -> list[tuple[list[int], list[int]] | RowFault]:
    """Return the token ids of dialogues that end with the assistant, and a mask: 1 on what the assistant says.

    The assistant says its calls of tools; it does not say what a tool returns. A message of weight 0 has no 1 in the
    mask.

    Each answer ends with eos, and follows the tokens of the prompt before it, as generation meets them. What a
    template writes after the last eos (ChatML's newline) is cut: a policy stops at eos, so the reward model must be
    trained to read the score there.
    """
    eos = eos_text(tokenizer)
    turns = [_turns(answers, eos) for answers in _render_answers(tokenizer, dialogues, tools)]
    parts = [dialogue if isinstance(dialogue, RowFault) else _parts(dialogue, eos) for dialogue in turns]
    encoded: list[tuple[list[int], list[int]] | RowFault] = []
    for dialogue, ids in zip(turns, _encode_parts(tokenizer, parts), strict=True):
        if isinstance(dialogue, RowFault):
            encoded.append(dialogue)
        else:
            assert not isinstance(ids, RowFault)
            encoded.append(_join(dialogue, ids, eos_id(tokenizer)))
    return encoded


def _render_answers(
    tokenizer: PreTrainedTokenizerFast, dialogues: list[Messages], tools: list[list[Row]]
) -> list[list[_Answer]]:
    """Render each dialogue up to every answer of the assistant in it, without the answer and with it."""
    places = [
        (row, turn)
        for row, dialogue in enumerate(dialogues)
        for turn, message in enumerate(dialogue)
        if message["role"] == "assistant"
    ]
    tools_there = [tools[row] for row, _ in places]
    prompts = [dialogues[row][:turn] for row, turn in places]
    with_answer = [dialogues[row][: turn + 1] for row, turn in places]
    heads = render(tokenizer, prompts, tools_there, add_generation_prompt=True)
    texts = render(tokenizer, with_answer, tools_there, add_generation_prompt=False)
    answers: list[list[_Answer]] = [[] for _ in dialogues]
    for (row, turn), head, text in zip(places, heads, texts, strict=True):
        answers[row].append(_Answer(dialogues[row][turn], head, text))
    return answers


def _turns(answers: list[_Answer], eos: str) -> list[_Turn] | RowFault:
    """Split a dialogue into the turns that its answers add, or return the first fault."""
    turns: list[_Turn] = []
    before = ""
    for answer in answers:
        turn = _turn(answer, before, eos)
        if isinstance(turn, RowFault):
            return turn
        turns.append(turn)
        assert isinstance(answer.text, str)  # or it would have been the fault
        before = answer.text.removesuffix(turn.after)
    return turns


def _parts(turns: list[_Turn], eos: str) -> list[tuple[str, str]]:
    """Return what is encoded of a dialogue: context and answer of every turn, each with all the text before it."""
    parts: list[tuple[str, str]] = []
    before = ""
    for turn in turns:
        parts.append((before, turn.context))
        parts.append((before + turn.context, turn.answer))
        before += turn.context + turn.answer + eos
    return parts


def _encode_parts(
    tokenizer: PreTrainedTokenizerFast, rows: list[list[tuple[str, str]] | RowFault]
) -> list[list[list[int]] | RowFault]:
    """Encode the parts (text before, text) of all rows in one call, and give each row the ids of its own parts."""
    encoded = iter(continuations(tokenizer, [part for row in rows if isinstance(row, list) for part in row]))
    return [row if isinstance(row, RowFault) else [next(encoded) for _ in row] for row in rows]


def _join(turns: list[_Turn], ids: list[list[int]], eos_token_id: int) -> tuple[list[int], list[int]]:
    """Join the ids of contexts and answers (`ids` has them in turn), with eos after every answer, and their mask."""
    joined: list[int] = []
    mask: list[int] = []
    for turn, context, answer in zip(turns, ids[::2], ids[1::2], strict=True):
        joined += context + answer + [eos_token_id]
        mask += [0] * len(context) + [int(turn.is_learnt)] * (len(answer) + 1)
    return joined, mask


def encode_demonstrations(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Row | RowFault]:
    """Return `input_ids` and `completion_mask` of demonstrations, with `_other_tokens` (see `_mark_other_tokens`)."""
    dialogues = [[*row["prompt"], as_message(row["completion"])] for row in rows]
    encoded: list[Row | RowFault] = []
    for dialogue in encode_dialogues(tokenizer, dialogues, _tools(rows)):
        if isinstance(dialogue, RowFault):
            encoded.append(dialogue)
        else:
            ids, mask = dialogue
            encoded.append({"input_ids": ids, "completion_mask": mask})
    _mark_other_tokens(tokenizer, rows, encoded)
    return encoded


def _mark_other_tokens(tokenizer: PreTrainedTokenizerFast, rows: list[Row], encoded: list[Row | RowFault]) -> None:
    """Set `_other_tokens` where the last answer follows other tokens than a policy would be sampled from.

    An earlier answer has the tokens that follow its own prompt. As part of a later prompt it is encoded with what is
    around it, which may join its ends to that; where the template writes no eos, it does not end with one there.
    """
    several: list[tuple[Row, Row]] = []
    for row, ids in zip(rows, encoded, strict=True):
        if not isinstance(ids, RowFault) and any(message["role"] == "assistant" for message in row["prompt"]):
            several.append((row, ids))
    prompts = [row["prompt"] for row, _ in several]
    tools = _tools([row for row, _ in several])
    for (_, ids), sampled_from in zip(several, encode_prompts(tokenizer, prompts, tools), strict=True):
        start = last_answer(ids["completion_mask"])
        ids["_other_tokens"] = int(ids["input_ids"][:start] != sampled_from)


def last_answer(mask: list[int]) -> int:
    """Return where a dialogue's last answer starts in its ids: after the last 0 of the mask."""
    return len(mask) - mask[::-1].index(0)


def encode_answers(tokenizer: PreTrainedTokenizerFast, rows: list[Row], sides: tuple[str, ...]) -> list[Row | RowFault]:
    """Return `prompt_ids` and, for each of the fields `sides`, the ids of the row's answer in it.

    The answer in `chosen` gives `chosen_ids`, and so on. Earlier answers of the assistant belong to the prompt, which
    is one text.
    """
    tools = _tools(rows)
    heads = render(tokenizer, [row["prompt"] for row in rows], tools, add_generation_prompt=True)
    texts: dict[str, list[str | RowFault]] = {}
    for side in sides:
        dialogues = [[*row["prompt"], as_message(row[side])] for row in rows]
        texts[side] = render(tokenizer, dialogues, tools, add_generation_prompt=False)
    parts: list[list[tuple[str, str]] | RowFault] = []
    for i, (row, head) in enumerate(zip(rows, heads, strict=True)):
        answers = [_Answer(as_message(row[side]), head, texts[side][i]) for side in sides]
        parts.append(_prompt_and_answers(head, answers, eos_text(tokenizer)))
    encoded: list[Row | RowFault] = []
    for ids in _encode_parts(tokenizer, parts):
        if isinstance(ids, RowFault):
            encoded.append(ids)
            continue
        prompt, *answers = ids
        row = {f"{side}_ids": [*answer, eos_id(tokenizer)] for side, answer in zip(sides, answers, strict=True)}
        encoded.append({"prompt_ids": prompt} | row)
    return encoded


def _prompt_and_answers(head: str | RowFault, answers: list[_Answer], eos: str) -> list[tuple[str, str]] | RowFault:
    """Return what is encoded of a prompt and of each of several answers to it, or the first fault."""
    if isinstance(head, RowFault):
        return head
    parts = [("", head)]
    for answer in answers:
        turn = _turn(answer, "", eos)
        if isinstance(turn, RowFault):
            return turn
        parts.append((head, turn.answer))
    return parts


def _tools(rows: list[Row]) -> list[list[Row]]:
    """Return the definitions of tools of each row."""
    return [row.get("tools", []) for row in rows]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> re.Pattern[str]:
    """Return what finds the tokenizer's special tokens in a text, where they would be read as control tokens."""
    tokens = sorted(filter(None, tokenizer.all_special_tokens), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, tokens)))
