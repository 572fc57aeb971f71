"""Hold labels while they are made: what is asked, what was answered, and the files that follow from it."""

import hashlib
import json
from pathlib import Path

from pipeline.label import figures, folder, pairs
from pipeline.label.answers import Answers, Opinion
from pipeline.label.figures import Figures
from pipeline.label.pairs import Pair, Question
from pipeline.records.last_run import now
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject


class Labels:
    """Labels in a folder that this process holds.

    After each answer the comparisons and label.json are written anew, so that a kill leaves them as the answers are.
    """

    def __init__(self, place: Path, about: JsonObject):
        self.place = place
        self.about = about
        try:
            self.pairs: list[Pair] = pairs.read(place / folder.PAIRS)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place / folder.PAIRS}: cannot be read ({error}); restore it, or begin anew") from None
        self.questions: list[Question] = pairs.questions(self.pairs, about["settings"]["seed"])
        self.answers = Answers(place / folder.ANSWERS)

    @property
    def next(self) -> Question | None:
        """Return the first question without an answer; None if all have one."""
        answered = self.answers.by_question()
        return next((question for question in self.questions if question.number not in answered), None)

    def figures(self) -> Figures:
        return figures.figures(self.pairs, self.questions, self.answers.by_question())

    def answer(self, question: Question, opinion: Opinion, seconds: float) -> None:
        """Keep the answer to the next question."""
        self.answers.add(question.number, opinion, seconds)
        self.write()

    def undo(self) -> None:
        self.answers.undo()
        self.write()

    def write(self) -> None:
        """Write the comparisons, and what label.json says of them."""
        found = figures.verdicts(self.questions, self.answers.by_question())
        rows = figures.rows(self.pairs, found)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file = self.place / folder.COMPARISONS
        folder.replace(file, text)
        comparisons = {"file": file.name, "rows": len(rows), "sha256": hashlib.sha256(text.encode()).hexdigest()}
        figures_now = {"changed": now(), "comparisons": comparisons, "figures": self.figures()}
        folder.replace(self.place / folder.FILE, folder.as_text(self.about | figures_now))
