"""Tell the format of rows by their columns, and which columns each format needs."""

from collections.abc import Iterable

from pipeline.data import media, tools
from pipeline.data.faults import Row

_SHP = {"history", "human_ref_A", "human_ref_B", "labels"}
QUESTIONS = ("prompt", "question", "instruction")
ANSWERS = ("completions", "answers")
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
    """Return the format of a dataset, told by the columns of its first row, and where they leave it open by its values.

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
        has_dialogue = is_dialogue(row.get("prompt")) or is_dialogue(row["chosen"])
        return "hh" if has_dialogue and isinstance(row["chosen"], str) else "comparison"
    if columns >= _SHP or (first(row, QUESTIONS) and first(row, ANSWERS)):
        return "scored"
    if shape := demonstration(row):
        return shape
    if "prompt" in columns:
        return "hh" if is_dialogue(row["prompt"]) else "prompt"
    if "text" in columns:
        return "text"
    raise ValueError(f"has the columns {', '.join(columns)}; expected {_EXPECTED}")


def demonstration(row: Row) -> str | None:
    """Return the format of a row's demonstration, told by its columns."""
    columns = row.keys()
    if "conversations" in columns:
        return "sharegpt"
    if "messages" in columns:
        return "messages"
    if columns >= {"instruction", "output"}:
        return "alpaca"
    if columns >= {"prompt", "completion"}:
        return "hh" if is_dialogue(row["prompt"]) else "prompt_completion"
    return None


def label_of(value: object) -> bool | None:
    """Return true or false, also from 1 and 0 or from text, as tables have them; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "false": False, "1": True, "0": False}.get(value.strip().lower())
    if isinstance(value, int):  # a bool is one too
        return {1: True, 0: False}.get(value)
    return None


def is_dialogue(value: object) -> bool:
    """Tell whether a value is a dialogue as one string, as in HH-RLHF."""
    return isinstance(value, str) and value.lstrip().startswith("Human:")


def missing(shape: str, columns: Iterable[str]) -> str:
    """Return the columns that a format needs and a dataset does not have, in words; empty if it has them."""
    needs = _NEEDS[shape]
    if any(needed <= set(columns) for needed in needs):
        return ""
    return " or ".join(" + ".join(sorted(needed)) for needed in needs)


def first(row: Row, names: Iterable[str]) -> str | None:
    """Return the first of several fields that a row has."""
    return next((name for name in names if row.get(name) is not None), None)
