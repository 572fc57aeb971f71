"""The gold judge of the quickstart: a fixed rubric that grades a completion between 0 and 1.

It stands in for the human annotator. It labels the comparisons that the reward model and DPO learn from, and it
decides the win rates of the evaluation; no trained model ever reads it. What it knows of the world is `facts.json`.

Criteria, with the most points each can bring (they add up to 1):

- subject (0.25): names the subject of the prompt, and no other subject;
- answer (0.25): states the fact the instruction asks for (what it is, what is good about it, what to do), and
  nothing that is true only of another subject (0.05 when the fact is about the subject, but not the one asked for);
- reason (0.20): has a "because" followed by a true reason about the subject;
- courtesy (0.15): exactly one polite phrase (0.05 for two, nothing for more);
- form (0.15): well-formed sentences. Each starts with a capital, ends with "." or "!", has 2 to 24 words, a verb or
  a polite phrase, no word twice in a row, no article before a word that cannot follow one, and puts each fact where
  the grammar wants it (after "is", after "because", or as a command of its own).

The sum is then multiplied by a factor for each fault: rudeness 0.2, bad form 0.4, a sentence or three words in a row
that come again 0.4, more than 40 words 0.5, and unknown words: (share of known words) to the power 8.
"""

import json
import re
from functools import cache
from itertools import pairwise
from pathlib import Path

COURTESIES = (
    "happy to help",
    "good question",
    "thank you for asking",
    "of course",
    "i hope this helps",
    "please ask me again any time",
    "i wish you a nice day",
)
RUDE = ("look it up yourself", "silly question", "i do not care", "stop asking", "leave me alone", "who cares")

# Cues in the prompt, the first that matches decides which fact the instruction asks for.
REQUESTS = (
    ("act", ("advice", "tip", "how to", "how do", "best way", "should i know")),
    ("good", ("why", "good about", "should i", "would you", "good idea", "i want to")),
    ("trait", ("what is", "describe", "tell me about", "explain")),
)
REASONS = ("good", "why")

# Words of the English around the facts; a word that is neither here nor in facts.json counts as unknown.
FRAME_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about again also an and answer any anything are as ask asking bad because become before best but buy by can
        care cares choice course day do easy else enjoy fine first for from get give glad good happy have help helps
        here hope how i idea if in is it just keep know leave like likes look make many maybe me my need never nice no
        not of often on one people please popular question reason recommend say says should silly simple so some stop
        sure take tell thank that the them there they thing things think this time tip to true try use very visit
        want way we well what when who wish with would yes you your yourself alone""",
    )
)
VERBS = frozenset(
    re.findall(
        r"\w+",
        """are ask become buy care do does enjoy get give help helps hope is know like likes make recommend say says
        think try use visit wish would""",
    )
)
ARTICLES = frozenset({"a", "an", "the"})
CONNECTIVES = frozenset({"and", "because", "but", "for", "if", "in", "it", "of", "on", "this", "to", "you"})
NOT_AFTER_ARTICLE = VERBS | ARTICLES | CONNECTIVES
# The word that has to stand before a fact of each kind; a command ("act") stands after a pause.
BEFORE_FACT = {"trait": r"\bis", "good": r"\bbecause", "why": r"\bbecause", "act": r"(?:^|[,:])"}
MAX_WORDS = 40


def score(prompt: str, completion: str) -> float:
    """Grade `completion` as an answer to `prompt`: 0 is worthless, 1 meets every criterion."""
    words = _words(completion)
    if not words:
        return 0.0
    text = " ".join(words)
    asked = _asked_subject(prompt)
    points = (
        _subject_points(asked, words)
        + _answer_points(asked, prompt, text)
        + _reason_points(asked, text)
        + _courtesy_points(text)
        + _form_points(completion)
    )
    return round(points * _fault_factor(words, text, completion), 4)


@cache
def _facts() -> dict[str, dict[str, str]]:
    """The facts of every subject: {subject: {kind: phrase}}."""
    world = json.loads(Path(__file__).with_name("facts.json").read_text(encoding="utf-8"))
    return {subject: facts for category in world.values() for subject, facts in category["subjects"].items()}


@cache
def _known_words() -> frozenset[str]:
    """Every word the rubric accepts as English."""
    phrases = [phrase for facts in _facts().values() for phrase in facts.values()]
    return FRAME_WORDS | set(_facts()) | {word for phrase in phrases for word in phrase.split()}


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())


def _sentences(text: str) -> list[str]:
    """Split after each run of end marks; an unfinished rest is a sentence too."""
    return [sentence.strip() for sentence in re.findall(r"[^.!?]+[.!?]*", text) if sentence.strip()]


def _asked_subject(prompt: str) -> str:
    """The subject the prompt names, or "" if it names none."""
    return next((word for word in _words(prompt) if word in _facts()), "")


def _asked_fact(prompt: str) -> str:
    """The kind of fact the instruction asks for."""
    lowered = prompt.lower()
    return next((kind for kind, cues in REQUESTS if any(cue in lowered for cue in cues)), "trait")


def _subject_points(asked: str, words: list[str]) -> float:
    named = {word for word in words if word in _facts()}
    return 0.25 if named == {asked} else 0.0


def _answer_points(asked: str, prompt: str, text: str) -> float:
    others = (phrase for subject, facts in _facts().items() if subject != asked for phrase in facts.values())
    facts = _facts().get(asked, {})
    if any(phrase in text for phrase in others):
        return 0.0
    if facts.get(_asked_fact(prompt), "\0") in text:
        return 0.25
    return 0.05 if any(phrase in text for phrase in facts.values()) else 0.0


def _reason_points(asked: str, text: str) -> float:
    facts = _facts().get(asked, {})
    return 0.20 if any(f"because {facts[kind]}" in text for kind in REASONS if facts) else 0.0


def _courtesy_points(text: str) -> float:
    count = sum(text.count(phrase) for phrase in COURTESIES)
    return {1: 0.15, 2: 0.05}.get(count, 0.0)


def _form_points(completion: str) -> float:
    return 0.15 if _well_formed(completion) else 0.0


def _well_formed(completion: str) -> bool:
    return all(_is_sentence(sentence) and _facts_in_place(sentence) for sentence in _sentences(completion))


def _is_sentence(sentence: str) -> bool:
    """Capital first, one end mark, words and light punctuation between, a verb or a polite phrase, sane word pairs."""
    words = _words(sentence)
    return (
        re.fullmatch(r"[A-Z][A-Za-z]*(?:[,:]? [A-Za-z]+)*[.!]", sentence) is not None
        and 2 <= len(words) <= 24
        and words[0] != "because"
        and (bool(VERBS.intersection(words)) or any(phrase in sentence.lower() for phrase in COURTESIES))
        and not any(_clash(first, second) for first, second in pairwise(words))
    )


def _clash(first: str, second: str) -> bool:
    """Two words that cannot stand next to each other."""
    return first == second or (first in ARTICLES and second in NOT_AFTER_ARTICLE)


def _facts_in_place(sentence: str) -> bool:
    """Whether each fact in `sentence` follows the word its kind needs, and ends at a pause."""
    lowered = sentence.lower()
    stated = [(kind, fact) for facts in _facts().values() for kind, fact in facts.items() if fact in lowered]
    return all(re.search(rf"{BEFORE_FACT[kind]} ?{re.escape(fact)}[,.!]", lowered) for kind, fact in stated)


def _fault_factor(words: list[str], text: str, completion: str) -> float:
    """The product of the factors for gibberish, rudeness, bad form, repetition and length."""
    factor = (sum(word in _known_words() for word in words) / len(words)) ** 8
    if any(phrase in text for phrase in RUDE):
        factor *= 0.2
    if not _well_formed(completion):
        factor *= 0.4
    if _repeats(words, completion):
        factor *= 0.4
    if len(words) > MAX_WORDS:
        factor *= 0.5
    return factor


def _repeats(words: list[str], completion: str) -> bool:
    """Whether a sentence, or any three words in a row, come twice."""
    sentences = [sentence.lower() for sentence in _sentences(completion)]
    trigrams = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(sentences)) < len(sentences) or len(set(trigrams)) < len(trigrams)
