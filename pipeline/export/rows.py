"""Choose the texts on which an export is compared with its stage: held-out prompts of the run, with completions."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerFast

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.data import joints
from pipeline.data.faults import RowFault
from pipeline.data.messages import Messages
from pipeline.data.rendering import render
from pipeline.export.job import Row
from pipeline.records.manifest import Manifest

NUM_ROWS = 32
MAX_TOKENS = 256  # of a row; the middle of a dialogue says as much about weights as its end
_REPORTS = ("evaluation", "shift report")
# For a run that has sampled nothing: questions and answers of the kind that chat models see.
_DIALOGUES = (
    ("Why is the sea salty?", "Rivers carry salt from rocks into the sea, and the water evaporates without it."),
    ("Write a short note to a friend about rain.", "It has rained all day here. I stayed inside and read a book."),
    ("What is 17 times 3?", "17 times 3 is 51."),
    ("Name three things to eat in winter.", "Soup, bread and baked apples."),
    ("How do I keep a houseplant alive?", "Give it light, and water it when the soil is dry."),
    ("Translate 'good morning' into French.", "Bonjour."),
    ("Is it safe to eat raw potatoes?", "A bite does no harm, but cook them: raw potatoes are hard to digest."),
    ("def add(a, b):", "    return a + b"),
)


class HeldOut(NamedTuple):
    """The rows, and where they are from, in words."""

    rows: list[Row]
    origin: str


def held_out(run_dir: Path, recorded: Manifest, tokenizer: PreTrainedTokenizerFast) -> HeldOut:
    """Return up to NUM_ROWS texts as the run's models see them.

    They are completions that the run's evaluations and shift reports have kept, or, where there are none, texts of
    this module.
    """
    for name, record in recorded.stages.items():
        if STAGE_TYPES[record.type].makes not in _REPORTS:
            continue
        dialogues = list(_sampled(run_dir / record.output.path / "samples.jsonl"))
        rows = _encoded(tokenizer, dialogues)
        if rows:
            return HeldOut(rows, f"held-out prompts of the run, with the completions that {name} has kept")
    dialogues = [([{"role": "user", "content": question}], answer, True) for question, answer in _DIALOGUES]
    rows = [Row(row.text, row.ids, 1) for row in _encoded(tokenizer, dialogues)]  # few texts: prompts count too
    return HeldOut(rows, "texts of the package: the run has kept no held-out completions")


def _sampled(file: Path) -> Iterator[tuple[Messages, str, bool]]:
    """Yield a prompt, a completion and whether it ended for each prompt of a report; policies take turns."""
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as lines:
        for number, line in zip(range(NUM_ROWS), lines, strict=False):
            row: dict[str, Any] = json.loads(line)
            prompt = row.pop("prompt")
            if isinstance(prompt, str):  # a shift report keeps the last message alone
                completions = row["completions"]
                yield [{"role": "user", "content": prompt}], completions[number % len(completions)], True
            else:
                entry = list(row.values())[number % len(row)]
                yield prompt, entry["completion"], entry["ended"]


def _encoded(tokenizer: PreTrainedTokenizerFast, dialogues: list[tuple[Messages, str, bool]]) -> list[Row]:
    """Return dialogues as rows; without those that the chat template refuses."""
    prompts = render(tokenizer, [prompt for prompt, _, _ in dialogues], [[] for _ in dialogues], True)
    parts = []
    for prompt, (_, completion, ended) in zip(prompts, dialogues, strict=True):
        if not isinstance(prompt, RowFault):
            parts.append((prompt, completion + joints.eos_text(tokenizer) * ended))
    before = joints.token_ids(tokenizer, [prompt for prompt, _ in parts])
    after = joints.continuations(tokenizer, parts)
    rows = []
    for (prompt, completion), first, rest in zip(parts, before, after, strict=True):
        surplus = max(0, len(first) + len(rest) - MAX_TOKENS)
        first = first[min(surplus, len(first) - 1) :]
        ids = (first + rest)[:MAX_TOKENS]
        if 0 < len(first) < len(ids):
            rows.append(Row(prompt + completion, ids, len(first)))
    return rows
