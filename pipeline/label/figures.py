"""Figures on whoever answered: how often the same answer comes again, and which sides it leans to."""

from collections.abc import Mapping, Sequence
from typing import Literal, TypedDict

import numpy as np

from pipeline.label.answers import Answer
from pipeline.label.pairs import Pair, Question
from pipeline.shift.calibration import wilson
from pipeline.shift.estimate import EstimateJson

Verdict = Literal["tie", "skip", "disagree"]


class Share(TypedDict):
    """A share with its 95 % Wilson interval, of `of` cases; None where there are none."""

    value: EstimateJson | None
    of: int


class Figures(TypedDict):
    """What answers show.

    `answered` of `questions`; among them `ties` and `skips`. `comparisons`: pairs with a better side; `disagreeing`
    were asked twice with two answers. `same_answer`: of pairs asked twice, neither time skipped. `left`: of all answers
    for a side. `longer`, `as_reward_model` and `first_policy` are of first answers for a side: the longer completion by
    characters, the one with the higher score, that of the policy that was named first. `seconds`: the median.
    """

    questions: int
    answered: int
    ties: int
    skips: int
    comparisons: int
    disagreeing: int
    same_answer: Share
    left: Share
    longer: Share
    as_reward_model: Share
    first_policy: Share | None
    seconds: float | None


def opinion_of(question: Question, answer: Answer | None) -> int | Literal["tie", "skip"] | None:
    """Return the number of the completion that was chosen, `tie`, `skip`, or None where there is no answer yet."""
    if answer is None:
        return None
    if answer.opinion == "left":
        return question.left
    if answer.opinion == "right":
        return question.right
    return answer.opinion


def verdicts(questions: Sequence[Question], answers: Mapping[int, Answer]) -> dict[int, int | Verdict]:
    """Return for each pair with an answer the better completion, `tie`, `skip`, or `disagree` if two answers do.

    Of a pair that is asked twice a skip does not count beside another answer.
    """
    by_pair: dict[int, list[int | Literal["tie", "skip"]]] = {}
    for question in questions:
        opinion = opinion_of(question, answers.get(question.number))
        if opinion is not None:
            by_pair.setdefault(question.pair, []).append(opinion)
    result: dict[int, int | Verdict] = {}
    for pair in sorted(by_pair):
        opinions: list[int | Verdict] = [opinion for opinion in by_pair[pair] if opinion != "skip"]
        if len(set(opinions)) > 1:
            result[pair] = "disagree"
        else:
            result[pair] = opinions[0] if opinions else "skip"
    return result


def rows(pairs: Sequence[Pair], found: Mapping[int, int | Verdict]) -> list[dict[str, object]]:
    """Return the comparisons as rows of a dataset: messages, so that no text is taken for a dialogue."""
    result: list[dict[str, object]] = []
    for number, verdict in found.items():
        if isinstance(verdict, int):
            pair = pairs[number]
            sides = {"chosen": pair.completions[verdict], "rejected": pair.completions[1 - verdict]}
            answers = {name: [{"role": "assistant", "content": side.text}] for name, side in sides.items()}
            result.append({"prompt": pair.prompt, **answers})
    return result


def figures(pairs: Sequence[Pair], questions: Sequence[Question], answers: Mapping[int, Answer]) -> Figures:
    """Return what the answers show so far."""
    opinions = {question: opinion_of(question, answers.get(question.number)) for question in questions}
    found = list(verdicts(questions, answers).values())
    sides = [opinion == question.left for question, opinion in opinions.items() if isinstance(opinion, int)]
    first = [(pairs[q.pair], o) for q, o in opinions.items() if not q.again and isinstance(o, int)]
    given = [answer.opinion for answer in answers.values()]
    seconds = [answer.seconds for answer in answers.values()]
    policies = [[one.policy for one in pair.completions] for pair in pairs]
    return {
        "questions": len(questions),
        "answered": len(answers),
        "ties": given.count("tie"),
        "skips": given.count("skip"),
        "comparisons": sum(isinstance(verdict, int) for verdict in found),
        "disagreeing": found.count("disagree"),
        "same_answer": _share(_repeated(opinions)),
        "left": _share(sides),
        "longer": _share(_chosen_is(first, [_lengths(pair) for pair, _ in first])),
        "as_reward_model": _share(_chosen_is(first, [_scores(pair) for pair, _ in first])),
        "first_policy": _share([o == 0 for _, o in first]) if any(a != b for a, b in policies) else None,
        "seconds": float(np.median(seconds)) if seconds else None,
    }


def _repeated(opinions: Mapping[Question, int | str | None]) -> list[bool]:
    """Tell of each pair with two answers, none of them a skip, whether they are the same."""
    first = {question.pair: opinion for question, opinion in opinions.items() if not question.again}
    second = {question.pair: opinion for question, opinion in opinions.items() if question.again}
    both = [(first[pair], opinion) for pair, opinion in second.items()]
    return [before == after for before, after in both if not {before, after} & {None, "skip"}]


def _lengths(pair: Pair) -> tuple[float, ...]:
    return tuple(len(one.text) for one in pair.completions)


def _scores(pair: Pair) -> tuple[float, ...]:
    return (0.0, 0.0) if pair.margin is None else (pair.margin, 0.0)


def _chosen_is(first: Sequence[tuple[Pair, int]], values: Sequence[tuple[float, ...]]) -> list[bool]:
    """Tell of each pair with two different values whether the chosen completion has the higher one."""
    chosen = [(opinion, pair) for (_, opinion), pair in zip(first, values, strict=True) if pair[0] != pair[1]]
    return [pair[opinion] > pair[1 - opinion] for opinion, pair in chosen]


def _share(cases: Sequence[bool]) -> Share:
    return {"value": wilson(sum(cases), len(cases)).as_json() if cases else None, "of": len(cases)}
