"""Choose the texts on which an export is compared with its stage: held-out prompts of the run, with completions."""

import itertools
import json
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
Dialogue = tuple[Messages, str, bool]  # a prompt, a completion, and whether it ended by itself


class HeldOut(NamedTuple):
    """The rows, and where they are from, in words."""

    rows: list[Row]
    origin: str


def held_out(run_dir: Path, recorded: Manifest, tokenizer: PreTrainedTokenizerFast, longest: int) -> HeldOut:
    """Return up to NUM_ROWS texts as the run's models see them, of at most `longest` tokens.

    They are completions that the run's evaluations and shift reports have kept, or, where there are none, texts of
    this module.
    """
    names = []
    dialogues: list[Dialogue] = []
    for name, record in recorded.stages.items():
        if STAGE_TYPES[record.type].makes in _REPORTS:
            found = _sampled(run_dir / record.output.path / "samples.jsonl")
            names += [name] if found else []
            dialogues += found
    rows = _encoded(tokenizer, dialogues, longest)[:NUM_ROWS]
    if rows:
        kept = f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} kept"
        return HeldOut(rows, f"held-out prompts of the run, with the completions that {kept}")
    dialogues = [([{"role": "user", "content": question}], answer, True) for question, answer in _DIALOGUES]
    rows = [
        Row(row.text, row.ids, 1) for row in _encoded(tokenizer, dialogues, longest)
    ]  # few texts: prompts count too
    return HeldOut(rows, "texts of the package: the run has kept no held-out completions")


def _sampled(file: Path) -> list[Dialogue]:
    """Return dialogues that a report has kept, at most NUM_ROWS: one of each prompt, then a second one, and so on.

    Policies, or the completions of a prompt, take turns.
    """
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        prompts = [_dialogues(json.loads(line)) for line in itertools.islice(lines, NUM_ROWS)]
    turns = range(max(map(len, prompts), default=0))
    taken = [of_prompt[(number + turn) % len(of_prompt)] for turn in turns for number, of_prompt in enumerate(prompts)]
    return taken[:NUM_ROWS]


def _dialogues(row: dict[str, Any]) -> list[Dialogue]:
    """Return the dialogues of a prompt. A shift report keeps the prompt's last message alone, as text."""
    prompt = row.pop("prompt")
    if isinstance(prompt, str):
        return [([{"role": "user", "content": prompt}], completion, True) for completion in row["completions"]]
    return [(prompt, entry["completion"], entry["ended"]) for entry in row.values()]


def _encoded(tokenizer: PreTrainedTokenizerFast, dialogues: list[Dialogue], longest: int) -> list[Row]:
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
        surplus = max(0, len(first) + len(rest) - longest)
        first = first[min(surplus, len(first) - 1) :]
        ids = (first + rest)[:longest]
        if 0 < len(first) < len(ids):
            rows.append(Row(prompt + completion, ids, len(first)))
    return rows
