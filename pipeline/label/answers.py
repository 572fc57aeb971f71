"""Keep answers in a file that only ever grows: each is on disk before the next question is asked.

An answer that is taken back stays in the file, and a line after it says so. A line that a kill has cut off counts as
not written.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pipeline.records.last_run import now

Opinion = Literal["left", "right", "tie", "skip"]
OPINIONS: tuple[Opinion, ...] = get_args(Opinion)


@dataclass(frozen=True)
class Answer:
    """What was said to a question, after how many seconds; `at` is the time, in UTC."""

    question: int
    opinion: Opinion
    seconds: float
    at: str


class Answers:
    """The answers that stand, in the order in which they were given."""

    def __init__(self, file: Path):
        self._file = file
        self.standing: list[Answer] = []
        for line in file.read_bytes().split(b"\n") if file.exists() else []:
            self._take(line)

    def _take(self, line: bytes) -> None:
        """Take a line of the file."""
        try:
            entry = json.loads(line)
            if "undo" in entry:
                if self.standing and self.standing[-1].question == entry["undo"]:
                    self.standing.pop()
            elif entry["opinion"] in OPINIONS:
                self.standing.append(Answer(**entry))
        except (ValueError, KeyError, TypeError):
            return

    def by_question(self) -> dict[int, Answer]:
        return {answer.question: answer for answer in self.standing}

    def add(self, question: int, opinion: Opinion, seconds: float) -> None:
        """Keep an answer: it is on disk when this returns."""
        answer = Answer(question, opinion, round(seconds, 3), now())
        self._append(vars(answer))
        self.standing.append(answer)

    def undo(self) -> None:
        """Take back the last answer that stands; nothing happens where there is none."""
        if self.standing:
            self._append({"undo": self.standing[-1].question, "at": now()})
            self.standing.pop()

    def _append(self, entry: object) -> None:
        with self._file.open("ab") as file:
            if file.tell() and not self._ends_line():
                file.write(b"\n")  # behind a line that was cut off
            file.write(json.dumps(entry).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def _ends_line(self) -> bool:
        with self._file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"
