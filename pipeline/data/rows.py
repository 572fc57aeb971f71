"""What is done to a batch of raw rows: converted, tokenised and measured, one row in, one row out."""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Features, List, Value

from pipeline.data.convert import convert, to_messages
from pipeline.data.encode import encode_rows, special_tokens
from pipeline.data.faults import FAULTS, Row, RowFault
from pipeline.data.heldout import key
from pipeline.data.joints import begins_with
from pipeline.data.tools import as_text, refuse_tools
from pipeline.system.digests import hash64

KINDS = list(FAULTS)
# The columns of token ids, and the lengths that are measured of each row, in tokens.
IDS = {"text": ["input_ids"], "demonstrations": ["input_ids", "completion_mask"], "prompts": ["prompt_ids"]}
IDS["comparisons"] = ["prompt_ids", "chosen_ids", "rejected_ids"]
LENGTHS = {"text": ["text"], "demonstrations": ["prompt", "completion"], "prompts": ["prompt"]}
LENGTHS["comparisons"] = ["prompt", "chosen", "rejected"]
NO_KEY = 0  # of a row without a prompt
_NUMBERS = ("int8", "int32", "uint64")


def _weights(row: Row) -> list[str]:
    """The places of messages that are not learnt from: rows that differ in them are different rows."""
    return [str(i) for i, message in enumerate(row.get("prompt", ())) if "weight" in message]


@dataclass(frozen=True)
class Measure:
    """What is done to a batch of raw rows: convert, tokenise, measure. Without a tokenizer: the prompts' keys alone.

    A row that does not fit gets the number of its fault (`_fault`, 0 for none) and the reason (`_why`).
    """

    shape: str
    want: str
    tokenizer: Any = None
    max_length: int | None = None  # longer prompts lose their start; None: they stay as they are
    tools: bool = True  # whether what reads the rows can read tools

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        found = [self._convert(row) for row in rows]
        good = [row for row in found if not isinstance(row, RowFault)]
        done = iter(self._finished(good))
        out = [self._fault(row) if isinstance(row, RowFault) else next(done) for row in found]
        columns: dict[str, Any] = {}
        for column, feature in self.features().items():
            kind = getattr(feature, "dtype", "")
            if kind in _NUMBERS:
                columns[column] = np.array([row.get(column, 0) for row in out], kind)
            else:
                columns[column] = [row.get(column) for row in out]
        return columns

    def _convert(self, row: Row) -> Row | RowFault:
        try:
            if self.tokenizer is None:
                return convert(row, self.shape, "text") if self.shape == "text" else to_messages(row, self.shape)
            converted = convert(row, self.shape, self.want)
            if not self.tools:
                refuse_tools(converted)
            return converted
        except RowFault as fault:
            return fault

    def _fault(self, fault: RowFault) -> Row:
        known = {} if fault.row is None else {"_key": key(fault.row)}
        return known | {"_fault": KINDS.index(fault.kind) + 1, "_why": str(fault)}

    def _finished(self, rows: list[Row]) -> list[Row]:
        if self.tokenizer is None:
            return [{"_fault": 0, "_key": key(row)} for row in rows]
        special, eos, bos = special_tokens(self.tokenizer), self.tokenizer.eos_token_id, begins_with(self.tokenizer)
        encoded = encode_rows(self.tokenizer, rows, self.want)
        return [
            self._fault(ids) if isinstance(ids, RowFault) else self._measured(row, ids, special, eos, bos)
            for row, ids in zip(rows, encoded, strict=True)
        ]

    def _measured(self, row: Row, ids: Row, special: Any, eos: int, bos: int | None) -> Row:
        texts = [as_text(message) for message in row.get("prompt", ())]
        texts += [json.dumps(tool, ensure_ascii=False) for tool in row.get("tools", ())]
        sides = [as_text(row[side]) for side in ("text", "completion", "chosen", "rejected") if side in row]
        early_eos = self._early_eos(row, ids, eos)
        starts = ids[IDS[self.want][0]][:1] == [bos]
        cut = self._truncate(ids, int(starts))  # shortens ids
        measured = {
            "_fault": 0,
            "_key": key(row),
            "_digest": hash64(*texts, "", *sides, *_weights(row)),
            "_pair": hash64(*texts, "", *sorted(sides)),
            "_special_tokens": int(any(map(special.search, [*texts, *sides]))),
            "_eos": int(early_eos),
            "_no_bos": int(bos is not None and not starts),
            "_truncated": cut,
        }
        if self.want == "demonstrations":
            completion = sum(ids["completion_mask"])
            measured |= {"_prompt": len(ids["input_ids"]) - completion, "_completion": completion}
        else:
            names = {"text": "input_ids"} if self.want == "text" else {n: f"{n}_ids" for n in LENGTHS[self.want]}
            measured |= {f"_{name}": len(ids[column]) for name, column in names.items()}
        return measured | ids

    def _early_eos(self, row: Row, ids: Row, eos: int) -> bool:
        """Whether a completion has eos anywhere but at its end, or not there."""
        if self.want == "demonstrations":
            said = [i for i, bit in zip(ids["input_ids"], ids["completion_mask"], strict=True) if bit]
            learnt = [m for m in row["prompt"] if m["role"] == "assistant" and "weight" not in m]
            return said[-1] != eos or said.count(eos) != 1 + len(learnt)
        return any(ids[side].index(eos) != len(ids[side]) - 1 for side in ("chosen_ids", "rejected_ids") if side in ids)

    def _truncate(self, ids: Row, start: int) -> int:
        """Cut a prompt that does not fit after its first `start` tokens (its BOS); returns the number of tokens cut."""
        if self.max_length is None or self.want == "text":
            return 0
        if self.want == "demonstrations":
            over, mask = len(ids["input_ids"]) - self.max_length, ids["completion_mask"]
            prompt = len(mask) - mask[::-1].index(0)  # the last answer stays whole
            columns = ("input_ids", "completion_mask")
        else:
            sides = max((len(ids[side]) for side in ("chosen_ids", "rejected_ids") if side in ids), default=0)
            prompt = len(ids["prompt_ids"])
            over = prompt + sides - self.max_length
            columns = ("prompt_ids",)
        if over <= 0 or over >= prompt - start:
            return 0
        for column in columns:
            ids[column] = ids[column][:start] + ids[column][start + over :]
        return over

    def features(self) -> Features:
        if self.tokenizer is None:
            return Features({"_fault": Value("int8"), "_why": Value("string"), "_key": Value("uint64")})
        types = dict.fromkeys(("_key", "_digest", "_pair"), Value("uint64")) | {"_why": Value("string")}
        types |= dict.fromkeys(("_fault", "_special_tokens", "_eos", "_no_bos", "_other_tokens"), Value("int8"))
        types["_truncated"] = Value("int32")
        types |= {f"_{name}": Value("int32") for name in LENGTHS[self.want]}
        types |= {name: List(Value("int8" if name.endswith("mask") else "int32")) for name in IDS[self.want]}
        if self.want == "prompts":
            types["prompt"] = List({"role": Value("string"), "content": Value("string")})
        return Features(types)
