"""A function answers in the place of a person."""

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.config import functions
from pipeline.label.answers import Opinion
from pipeline.label.labels import Labels
from pipeline.system import digests
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

KEY = "--judge"
_SECONDS = 10  # between two lines that say how far it is
Ask = Callable[[str, str, str, str], float]


def find(reference: str, place: Path) -> Ask:
    """Return what gives a prompt's left and right completions a number: above 0, left is better; 0, neither is.

    The function scores one completion, as the judge of an `evaluate` stage does, or compares two. The last argument
    names the question in messages.

    Raises:
        UserError: if there is no such function, or it takes neither two texts nor three.
    """
    functions.source_of(reference, place, KEY)
    comparing = functions.comparison(reference, place, KEY)
    if comparing is not None:
        return lambda prompt, left, right, where: functions.compared(comparing, reference, prompt, left, right, where)
    try:
        scoring = functions.function(reference, place, KEY)
    except UserError as error:
        raise UserError(f"{error}, or with `prompt: str, left: str, right: str`") from None

    def difference(prompt: str, left: str, right: str, where: str) -> float:
        first = functions.judged(scoring, reference, prompt, left, where)
        return first - functions.judged(scoring, reference, prompt, right, where)

    return difference


def files(reference: str, place: Path) -> dict[str, str]:
    """Return the digests of the files that a function is in, by their names."""
    return {file.name: digests.file_digest(file) for file in functions.sources_of(reference, place, KEY)}


def check_same(reference: str, place: Path, begun: JsonObject, folder: Path) -> None:
    """Compare the function's files with those that the labels were begun with.

    Raises:
        UserError: if one has changed: half of the answers would be another judge's.
    """
    now = files(reference, place)
    changed = sorted(name for name in now.keys() | begun.keys() if now.get(name) != begun.get(name))
    if changed:
        mend = "Restore it to go on, or begin new labels with another --to"
        raise UserError(f"{KEY}: {changed[0]} has changed since the labels in {folder} were begun. {mend}")


def answer_all(labels: Labels, ask: Ask, say: Callable[[str], None]) -> None:
    """Let the function answer what has no answer yet; each answer is on disk before the next is asked for.

    `say` tells now and then how far a slow one is.

    Raises:
        UserError: if the function fails, or gives no number.
    """
    told = time.monotonic()
    while (question := labels.next) is not None:
        pair = labels.pairs[question.pair]
        left = pair.completions[question.left].text
        right = pair.completions[question.right].text
        started = time.perf_counter()
        value = ask(pair.prompt[-1]["content"], left, right, f"pair {question.pair}")
        opinion: Opinion = "tie"
        if value != 0:
            opinion = "left" if value > 0 else "right"
        labels.answers.add(question.number, opinion, time.perf_counter() - started)
        if time.monotonic() - told > _SECONDS:
            told = time.monotonic()
            say(f"{len(labels.answers.standing)} of {len(labels.questions)} answers")
    labels.write()
