"""Say of each kind of row what the rest of the package must know of it: one class for each kind.

Nothing else compares the names of kinds. A new kind is a class here and its place in ROWS: how a row of any format
becomes one, its token ids, what is measured of it, where it may be cut, and how it is shown.
"""

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any, ClassVar

import numpy as np
from datasets import List, Value
from transformers import PreTrainedTokenizerFast

from pipeline.data import media
from pipeline.data.convert import to_messages
from pipeline.data.encode import encode_answers, encode_demonstrations, encode_prompts, encode_texts, last_answer
from pipeline.data.faults import Row, RowFault, shown, text_of
from pipeline.data.messages import Messages, without_weights
from pipeline.data.row_kind import Parts, RowKind, cut_prompt
from pipeline.data.tools import as_text

_IDS = List(Value("int32"))
_BITS = List(Value("int8"))


class Text(RowKind):
    """Raw text, all of which is learnt."""

    name = "text"
    columns: ClassVar[Mapping[str, List]] = {"input_ids": _IDS}
    sides = ("text",)
    lengths = ("text",)

    def is_served_by(self, shape: str, columns: set[str]) -> bool:
        return shape == "text"

    def convert(self, row: Row, shape: str) -> Row:
        media.refuse_columns(row)
        if isinstance(row.get("text"), str) and not row["text"].strip():
            raise RowFault("blank", "text", "is blank")  # as between the paragraphs of a text file
        return {"text": text_of(row, "text")}

    def encode(self, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Row | RowFault]:
        return [{"input_ids": ids} for ids in encode_texts(tokenizer, [row["text"] for row in rows])]

    def measure(self, ids: Row) -> dict[str, int]:
        return {"text": len(ids["input_ids"])}

    def parts(self, row: Row, trains_on: tuple[str, ...], masked: bool) -> Parts:
        return [("", [(row["input_ids"], True)])]


class Demonstration(RowKind):
    """A dialogue whose answers are learnt: `completion_mask` has 1 on them, each with its eos."""

    name = "demonstrations"
    columns: ClassVar[Mapping[str, List]] = {"input_ids": _IDS, "completion_mask": _BITS}
    sides = ("completion",)
    lengths = ("prompt", "completion")

    def is_served_by(self, shape: str, columns: set[str]) -> bool:
        if shape == "hh":
            return bool(columns & {"completion", "chosen"})
        return shape not in ("text", "prompt")

    def convert(self, row: Row, shape: str) -> Row:
        converted = to_messages(row, shape)
        if converted.get("label") is False:
            raise RowFault("label_false", "label", "is false, so the completion is none to learn from", converted)
        if "unlearnt" in converted:
            why = "has nothing to learn from: all of the assistant's messages have weight 0"
            raise RowFault("malformed", converted["unlearnt"], why, converted)
        completion = converted.get("completion") or converted.get("chosen")
        if completion is None:
            raise RowFault("malformed", "completion", "expected an answer to learn from, got none")
        return _only(converted, "prompt", "tools") | {"completion": completion}

    def encode(self, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Row | RowFault]:
        return encode_demonstrations(tokenizer, rows)

    def measure(self, ids: Row) -> dict[str, int]:
        completion = sum(ids["completion_mask"])
        return {"prompt": len(ids["input_ids"]) - completion, "completion": completion}

    def marks(self, row: Row) -> list[str]:
        """Return the places of messages that are not learnt from."""
        return [str(i) for i, message in enumerate(row["prompt"]) if "weight" in message]

    def ends_early(self, row: Row, ids: Row, eos: int) -> bool:
        learnt = [i for i, bit in zip(ids["input_ids"], ids["completion_mask"], strict=True) if bit]
        earlier = [m for m in row["prompt"] if m["role"] == "assistant" and "weight" not in m]
        return learnt[-1] != eos or learnt.count(eos) != 1 + len(earlier)

    def truncate(self, ids: Row, start: int, max_length: int) -> int:
        over = len(ids["input_ids"]) - max_length
        prompt = last_answer(ids["completion_mask"])  # the last answer stays whole
        return cut_prompt(ids, self.columns, start, prompt, over)

    def parts(self, row: Row, trains_on: tuple[str, ...], masked: bool) -> Parts:
        if not masked:
            return [("", [(row["input_ids"], True)])]
        pairs = groupby(zip(row["input_ids"], row["completion_mask"], strict=True), key=lambda pair: pair[1])
        return [("", [([i for i, _ in group], bool(bit)) for bit, group in pairs])]


class Answers(RowKind):
    """What kinds share whose rows are a prompt and answers to it (`sides`), each in a column of its own."""

    def encode(self, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Row | RowFault]:
        return encode_answers(tokenizer, rows, self.sides)

    def measure(self, ids: Row) -> dict[str, int]:
        return {name: len(ids[f"{name}_ids"]) for name in self.lengths}

    def whole(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the lengths of prompts with the longest of their answers."""
        whole = lengths["prompt"]
        if self.sides:
            whole = whole + np.max([lengths[side] for side in self.sides], axis=0)
        return whole

    def ends_early(self, row: Row, ids: Row, eos: int) -> bool:
        answers = [ids[f"{side}_ids"] for side in self.sides]
        return any(answer.index(eos) != len(answer) - 1 for answer in answers)

    def truncate(self, ids: Row, start: int, max_length: int) -> int:
        prompt = len(ids["prompt_ids"])
        longest = max((len(ids[f"{side}_ids"]) for side in self.sides), default=0)
        return cut_prompt(ids, ["prompt_ids"], start, prompt, prompt + longest - max_length)

    def parts(self, row: Row, trains_on: tuple[str, ...], masked: bool) -> Parts:
        return [(column.removesuffix("_ids"), [(row[column], column in trains_on)]) for column in self.columns]


class Comparison(Answers):
    """A prompt with the better and the worse answer to it."""

    name = "comparisons"
    columns: ClassVar[Mapping[str, List]] = dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids"), _IDS)
    sides = ("chosen", "rejected")
    lengths = ("prompt", "chosen", "rejected")
    findings: ClassVar[Mapping[str, str]] = {"longer_wins": "prefer the longer side"}

    def is_served_by(self, shape: str, columns: set[str]) -> bool:
        return shape in ("comparison", "scored") or (shape in ("sharegpt", "hh") and columns >= {"chosen", "rejected"})

    def convert(self, row: Row, shape: str) -> Row:
        converted = to_messages(row, shape)
        if "chosen" not in converted:
            raise RowFault("malformed", "chosen", f"expected text or messages, got {shown(row.get('chosen'))}")
        return converted | {"prompt": without_weights(converted["prompt"])}

    def encode(self, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Row | RowFault]:
        encoded = super().encode(tokenizer, rows)
        for i, ids in enumerate(encoded):
            if not isinstance(ids, RowFault) and ids["chosen_ids"] == ids["rejected_ids"]:
                encoded[i] = RowFault("identical", "chosen", "has the same tokens as rejected")
        return encoded

    def find(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"longer_wins": rows["chosen"] > rows["rejected"]}


class Unpaired(Answers):
    """A prompt with one answer to it, labelled good (true) or bad (false)."""

    name = "unpaired"
    columns: ClassVar[Mapping[str, List]] = dict.fromkeys(("prompt_ids", "completion_ids"), _IDS)
    extras: ClassVar[Mapping[str, Value | List]] = {"label": Value("bool")}
    sides = ("completion",)
    lengths = ("prompt", "completion")
    findings: ClassVar[Mapping[str, str]] = {"undesirable": "are labelled false"}

    def is_served_by(self, shape: str, columns: set[str]) -> bool:
        return shape == "unpaired"

    def convert(self, row: Row, shape: str) -> Row:
        converted = to_messages(row, shape)
        if "unlearnt" in converted:
            why = "has no answer to learn from: all of the assistant's messages have weight 0"
            raise RowFault("malformed", converted["unlearnt"], why, converted)
        return converted | {"prompt": without_weights(converted["prompt"])}

    def encode(self, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Row | RowFault]:
        encoded = super().encode(tokenizer, rows)
        return [
            ids if isinstance(ids, RowFault) else ids | {"label": row["label"]}
            for row, ids in zip(rows, encoded, strict=True)
        ]

    def longest(self, lengths: Mapping[str, int], options: Mapping[str, Any]) -> tuple[int, str]:
        if options["loss_type"] != "kto":
            return super().longest(lengths, options)
        # Each prompt is met with the completion of another row too; the trainer cuts that to `max_length`.
        joined = lengths["prompt"] + lengths["completion"]
        if options["max_length"] is not None:
            joined = min(joined, options["max_length"])
        longest = max(lengths["row"], joined)
        return longest, f"its longest prompt and its longest completion, which KTO may join, have {longest} tokens"

    def marks(self, row: Row) -> list[str]:
        """Return the label: an answer with both labels is a contradiction, not a duplicate."""
        return [str(row["label"])]

    def find(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"undesirable": ~rows["label"]}

    def fault_of_all(self, num_rows: int, findings: Mapping[str, int]) -> str | None:
        expected = f"all {num_rows} rows are labelled {{}}; expected rows of both labels: {{}}"
        if findings["undesirable"] == num_rows:
            return expected.format("false", "add rows labelled true")
        if findings["undesirable"] == 0:
            return expected.format("true", "use them in an sft stage")
        return None

    def parts(self, row: Row, trains_on: tuple[str, ...], masked: bool) -> Parts:
        label = str(row["label"]).lower()
        return [*super().parts(row, trains_on, masked), ("label", [(label, False)])]


class Prompt(Answers):
    """A prompt without an answer; its messages stay beside its ids, for judges, functions and reports."""

    name = "prompts"
    columns: ClassVar[Mapping[str, List]] = {"prompt_ids": _IDS}
    extras: ClassVar[Mapping[str, Value | List]] = {
        "prompt": List({"role": Value("string"), "content": Value("string")})
    }
    lengths = ("prompt",)

    def is_served_by(self, shape: str, columns: set[str]) -> bool:
        return shape != "text"

    def convert(self, row: Row, shape: str) -> Row:
        converted = _only(to_messages(row, shape), "prompt", "tools")
        return converted | {"prompt": without_weights(converted["prompt"])}

    def encode(self, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Row | RowFault]:
        prompts = [row["prompt"] for row in rows]
        encoded = encode_prompts(tokenizer, prompts, [row.get("tools", []) for row in rows])
        return [
            ids if isinstance(ids, RowFault) else {"prompt": _texts_of(prompt), "prompt_ids": ids}
            for prompt, ids in zip(prompts, encoded, strict=True)
        ]


def _texts_of(prompt: Messages) -> list[dict[str, str]]:
    """Return a prompt as reports and judges see it: who said what, calls of tools as JSON."""
    return [{"role": message["role"], "content": as_text(message)} for message in prompt]


def _only(row: Row, *names: str) -> Row:
    return {name: row[name] for name in names if name in row}


ROWS: dict[str, RowKind] = {kind.name: kind for kind in (Text(), Demonstration(), Comparison(), Unpaired(), Prompt())}


def convert(row: Row, shape: str, want: str) -> Row:
    """Return one row of a format in the canonical form of a kind of row.

    Raises:
        RowFault: if the row does not fit.
    """
    return ROWS[want].convert(row, shape)


def serves(shape: str, columns: Iterable[str]) -> set[str]:
    """Return the kinds of rows that a format with these columns can give."""
    return {name for name, kind in ROWS.items() if kind.is_served_by(shape, set(columns))}
