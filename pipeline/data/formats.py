"""The formats people's rows come in: told by their columns, and what a stage can have of each."""

from collections.abc import Iterable
from typing import Any

from pipeline.data import media, tools
from pipeline.data.faults import Row

_SHP = {"history", "human_ref_A", "human_ref_B", "labels"}
QUESTIONS, ANSWERS = ("prompt", "question", "instruction"), ("completions", "answers")
LABELS = ("label", "kto_tag")
# LLaMA-Factory's names for the two whole dialogues of a comparison.
SIDES = {"chosen_messages": "chosen", "rejected_messages": "rejected"}
# Every column that some format reads.
FIELDS = {"text", "prompt", "completion", "chosen", "rejected", "messages", "conversations", "system", "history"}
FIELDS |= {"instruction", "input", "output", "scores", *_SHP, *QUESTIONS, *ANSWERS, *LABELS, *SIDES}
FIELDS |= {*media.MEDIA, *tools.COLUMNS}
# The columns of which a format needs one set.
_NEEDS: dict[str, list[set[str]]] = {
    "text": [{"text"}],
    "prompt": [{"prompt"}],
    "prompt_completion": [{"prompt", "completion"}],
    "messages": [{"messages"}],
    "alpaca": [{"instruction", "output"}],
    "sharegpt": [{"conversations"}],
    "unpaired": [{label} for label in LABELS],
    "comparison": [{"chosen", "rejected"}, set(SIDES)],
    "hh": [{"chosen", "rejected"}, {"prompt"}],
    "scored": [_SHP, *({answers} for answers in ANSWERS)],
}
_EXPECTED = (
    "text, prompt + completion, messages, instruction + output, conversations, chosen + rejected (with or without a "
    "prompt), chosen_messages + rejected_messages, prompt + completions + scores, prompt, or a `columns:` mapping to "
    "these"
)


def detect(row: Row) -> str:
    """The format of a dataset, told by the columns of its first row, and where they leave it open by its values.

    Raises:
        ValueError: if no format has these columns.
    """
    columns = row.keys()
    if any(label_of(row.get(label)) is not None for label in LABELS) and demonstration(row):
        return "unpaired"
    if "conversations" in columns:
        return "sharegpt"
    if columns >= set(SIDES):
        return "comparison"
    if {"chosen", "rejected"} <= columns:
        said = isinstance(row["chosen"], str) and any(is_dialogue(row.get(name)) for name in ("prompt", "chosen"))
        return "hh" if said else "comparison"
    if columns >= _SHP or (first(row, QUESTIONS) and first(row, ANSWERS)):
        return "scored"
    if found := demonstration(row):
        return found
    if "prompt" in columns:
        return "hh" if is_dialogue(row["prompt"]) else "prompt"
    if "text" in columns:
        return "text"
    raise ValueError(f"has the columns {', '.join(columns)}; expected {_EXPECTED}")


def demonstration(row: Row) -> str | None:
    """The format of a row's demonstration, told by its columns."""
    needs = {"sharegpt": {"conversations"}, "messages": {"messages"}, "alpaca": {"instruction", "output"}}
    needs["prompt_completion"] = {"prompt", "completion"}
    found = next((shape for shape, needed in needs.items() if needed <= row.keys()), None)
    return "hh" if found == "prompt_completion" and is_dialogue(row["prompt"]) else found


def label_of(value: Any) -> bool | None:
    """True or false, also as 1 and 0 or as text, as tables have them; None for anything else."""
    said = value.strip().lower() if isinstance(value, str) else value if isinstance(value, (bool, int)) else None
    return {"true": True, "false": False, "1": True, "0": False, 1: True, 0: False}.get(said)


def is_dialogue(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def missing(shape: str, columns: Iterable[str]) -> str:
    """The columns that a format needs and a dataset does not have, in words; empty if it has them."""
    columns, needs = set(columns), _NEEDS[shape]
    return "" if any(needed <= columns for needed in needs) else " or ".join(" + ".join(sorted(n)) for n in needs)


def first(row: Row, names: Iterable[str]) -> str | None:
    """The first of several fields that a row has."""
    return next((name for name in names if row.get(name) is not None), None)
