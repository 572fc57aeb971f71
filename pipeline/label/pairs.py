"""Hold pairs of completions, in the order in which they are asked, and their file."""

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

Prompt = list[dict[str, str]]  # messages: role and content
GAP = 10  # questions at least between the two of one pair, where there are as many


@dataclass(frozen=True)
class Completion:
    """A policy's completion of a prompt. `length` is in tokens; `score` is None where the run has no reward model."""

    policy: str
    text: str
    length: int
    ended: bool
    score: float | None = None


@dataclass(frozen=True)
class Pair:
    """Two completions of a prompt.

    `left` is the number of the one that is at the left when the pair is first asked; the second time the sides are
    swapped. `twice` tells whether there is a second time.
    """

    prompt: Prompt
    completions: tuple[Completion, Completion]
    left: int = 0
    twice: bool = False

    @property
    def margin(self) -> float | None:
        """Return the score of the first completion less that of the second."""
        first, second = (one.score for one in self.completions)
        return None if first is None or second is None else first - second


class Question(NamedTuple):
    """A pair as it is asked: its number, whether it is the second time, and the number of the completion at the left.

    `number` tells a question from all others, whatever their order is.
    """

    pair: int
    again: bool
    left: int

    @property
    def number(self) -> int:
        return 2 * self.pair + self.again

    @property
    def right(self) -> int:
        return 1 - self.left


def arranged(pairs: Sequence[Pair], twice: float, seed: int) -> list[Pair]:
    """Draw the sides, and the share of pairs that are asked twice.

    Pairs whose second time has no room behind the first one are taken last.
    """
    drawn = random.Random(f"{seed} sides")
    number = min(round(twice * len(pairs)), len(pairs)) if len(pairs) > 1 else 0
    roomy = list(range(len(pairs) - _gap(len(pairs))))
    rest = list(range(len(roomy), len(pairs)))
    drawn.shuffle(roomy)
    drawn.shuffle(rest)
    chosen = set([*roomy, *rest][:number])
    return [
        dataclasses.replace(pair, left=drawn.randrange(2), twice=place in chosen) for place, pair in enumerate(pairs)
    ]


def questions(pairs: Sequence[Pair], seed: int) -> list[Question]:
    """Return all questions in order: the pairs as they are sorted, and second ones somewhere behind the first."""
    drawn = random.Random(f"{seed} questions")
    gap = _gap(len(pairs))
    placed: list[tuple[float, Question]] = []
    for place, pair in enumerate(pairs):
        placed.append((place, Question(place, False, pair.left)))
        if pair.twice:
            room = len(pairs) - place - gap
            at = place + gap + drawn.random() * room if room > 0 else len(pairs) + place
            placed.append((at, Question(place, True, 1 - pair.left)))
    return [question for _, question in sorted(placed, key=lambda one: one[0])]


def _gap(number: int) -> int:
    return min(GAP, number // 2)


def write(file: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs to a new file, one in a line."""
    lines = [json.dumps(dataclasses.asdict(pair), ensure_ascii=False) + "\n" for pair in pairs]
    file.write_text("".join(lines), encoding="utf-8")


def read(file: Path) -> list[Pair]:
    """Read the pairs of a file."""
    pairs = []
    for line in file.read_text(encoding="utf-8").split("\n"):
        if line:
            fields = json.loads(line)
            first, second = (Completion(**one) for one in fields.pop("completions"))
            pairs.append(Pair(**fields, completions=(first, second)))
    return pairs
