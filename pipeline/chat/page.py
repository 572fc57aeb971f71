"""Talk on a page of this machine: a column per policy. Answers are streamed; the page gets texts, never HTML."""

import dataclasses
import math
import queue
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.chat.session import Answer, Session, Settings
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject
from pipeline.web.server import Call, Site, serve

_FILES = Path(__file__).parent / "files"


class _Left(Exception):
    """Report that nobody listens any more: the answer was stopped, or the page was left."""


def show(session: Session, settings: Settings, port: int, say: Callable[[str], None]) -> None:
    """Serve the page until Ctrl-C. `settings` are those that its fields begin with; `port` 0 takes a free one.

    Raises:
        UserError: if the port is taken.
    """
    site = site_of(session, settings)
    serve(site, port, lambda address: say(f"The page is {address} (Ctrl-C ends it)"))


class _Windows:
    """Keep the windows of one dialogue apart: none changes a dialogue that it does not show as it is.

    A window says which version of the session it shows, and gives each question an id. The server does one call at a
    time. So a question of which a window has asked the outcome is answered by then, or never.
    """

    def __init__(self, session: Session):
        self._session = session
        self._answered: set[str] = set()
        self._over: set[str] = set()

    def check(self, body: JsonObject) -> None:
        """Compare the version that a window shows with that of the session.

        Raises:
            UserError: if they differ.
        """
        if body.get("version") != self._session.version:
            raise UserError("the dialogue has changed in another window. It is shown as it is now; try again")

    def follow(self, body: JsonObject, events: Iterator[JsonObject]) -> Iterator[JsonObject]:
        """Yield the answers to a question, which is looked at when it is its turn.

        Raises:
            UserError: if its window shows another dialogue, or waits for no answer any more.
        """
        name = _id(body)
        self.check(body)
        if name in self._over:
            raise UserError("the question was stopped")
        before = self._session.version
        try:
            yield from events
        finally:
            if self._session.version != before:  # also where the window left at the last moment
                self._answered.add(name)

    def outcome(self, body: JsonObject) -> bool:
        """Tell whether a question was answered. If it was not, it never will be."""
        name = _id(body)
        self._over.add(name)
        return name in self._answered


def site_of(session: Session, settings: Settings) -> Site:
    """Return the page and what it can ask for."""
    windows = _Windows(session)

    def state(_: JsonObject) -> JsonObject:
        return _state(session, settings)

    def ask(body: JsonObject) -> Iterator[JsonObject]:
        question = body.get("question")
        if not isinstance(question, str):
            raise UserError("there is no question")
        return windows.follow(body, _events(session, question, _settings(body)))

    def outcome(body: JsonObject) -> JsonObject:
        return {"answered": windows.outcome(body)} | _state(session, settings)

    def choose(body: JsonObject) -> JsonObject:
        names = body.get("stages")
        if not isinstance(names, list):
            raise UserError("expected a list of stages")
        windows.check(body)
        session.choose([str(name) for name in names])
        return _state(session, settings)

    def reset(body: JsonObject) -> JsonObject:
        windows.check(body)
        session.reset()
        return _state(session, settings)

    calls: dict[str, Call] = {"state": state, "ask": ask, "outcome": outcome, "choose": choose, "reset": reset}
    return Site("rlhf chat", _FILES, calls)


def _id(body: JsonObject) -> str:
    name = body.get("id")
    if not isinstance(name, str):
        raise UserError("expected the id of a question")
    return name


def _state(session: Session, settings: Settings) -> JsonObject:
    """Return all that the page shows."""
    turns = []
    for turn in session.turns:
        answers = {name: _shown(answer) for name, answer in turn.answers.items()}
        turns.append({"question": turn.question, "answers": answers})
    return {
        "run": session.run.recorded.name,
        "version": session.version,
        "stages": session.names,
        "policies": session.run.policies,
        "notes": session.notes(),
        "settings": dataclasses.asdict(settings),
        "turns": turns,
    }


def _shown(answer: Answer) -> JsonObject:
    return {"text": answer.text, "figures": answer.figures}


def _settings(body: JsonObject) -> Settings:
    """Read the page's fields.

    Raises:
        UserError: if one does not hold a number that makes sense.
    """
    temperature = body.get("temperature")
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)) or temperature < 0:
        raise UserError(f"temperature: expected a number, 0 or more, got {temperature}")
    if not math.isfinite(temperature):
        raise UserError("temperature: expected a finite number")
    numbers = {}
    for name, least in (("max_new_tokens", 1), ("seed", 0)):
        value = body.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise UserError(f"{name.replace('_', ' ')}: expected a whole number, {least} or more, got {value}")
        numbers[name] = value
    return Settings(float(temperature), **numbers)


def _events(session: Session, question: str, settings: Settings) -> Iterator[JsonObject]:
    """Yield the answers as they come. Whoever closes the iterator stops them, and the question is taken back."""
    events: queue.Queue[JsonObject | BaseException | None] = queue.Queue()
    left = threading.Event()

    def tell(name: str, answer: Answer, is_complete: bool) -> None:
        if left.is_set():
            raise _Left
        shown = _shown(answer) if is_complete else {"text": answer.text}
        events.put({"stage": name} | shown)

    def work() -> None:
        try:
            session.ask(question, settings, tell)
            events.put(None)
        except BaseException as error:  # it is raised where it is waited for
            if not isinstance(error, (UserError, _Left)):
                traceback.print_exc()  # the page can say no more than that there was a fault
            events.put(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while (event := events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        left.set()
        thread.join()
