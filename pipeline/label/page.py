"""The page on which a person answers. It gets two texts and a prompt: no policy's name, no score."""

import math
from collections.abc import Callable
from pathlib import Path

from pipeline.label import result
from pipeline.label.answers import OPINIONS
from pipeline.label.labels import Labels
from pipeline.system import disk
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject
from pipeline.web.server import Site

_FILES = Path(__file__).parent / "files"


def site(labels: Labels, finished: Callable[[], None]) -> Site:
    """Return the page for these labels; `finished` is called when the last question has been answered."""

    def state(_: JsonObject) -> JsonObject:
        return _state(labels)

    def answer(body: JsonObject) -> JsonObject:
        """Keep an answer. One to another question than the next was sent before, or comes from an older page."""
        opinion = body.get("answer")
        if opinion not in OPINIONS:
            raise UserError(f"expected one of {', '.join(OPINIONS)}, got {opinion!r}")
        seconds = body.get("seconds")
        if not isinstance(seconds, (int, float)) or not math.isfinite(seconds) or seconds < 0:
            raise UserError(f"expected a number of seconds, got {seconds!r}")
        question = labels.next
        if question is not None and question.number == body.get("question"):
            with disk.reported(labels.place, "--to"):
                labels.answer(question, opinion, seconds)
            if labels.next is None:
                finished()
        return _state(labels)

    def undo(body: JsonObject) -> JsonObject:
        """Take back the last answer, if the page has seen as many as there are."""
        if body.get("answered") == len(labels.answers.standing):
            with disk.reported(labels.place, "--to"):
                labels.undo()
        return _state(labels)

    return Site("Which answer is better?", _FILES, {"state": state, "answer": answer, "undo": undo})


def _state(labels: Labels) -> JsonObject:
    """Return what the page shows."""
    question = labels.next
    shown: JsonObject = {"answered": len(labels.answers.standing), "total": len(labels.questions)}
    if question is None:
        return shown | {"question": None, "result": result.lines(labels.figures())}
    pair = labels.pairs[question.pair]
    asked: JsonObject = {
        "number": question.number,
        "prompt": [{"role": message["role"], "content": message["content"]} for message in pair.prompt],
    }
    for side, number in (("left", question.left), ("right", question.right)):
        asked[side] = pair.completions[number].text
        asked[f"{side}_cut_off"] = not pair.completions[number].ended
    return shown | {"question": asked}
