"""Write the data of the quickstart: the same files, byte for byte, on every run.

    python configs/quickstart/generate.py

The small world of `facts.json` (thirty subjects, four facts each) is put into templated English:

- `corpus.jsonl`: paragraphs about the subjects, for pretraining from scratch;
- `demonstrations.jsonl`: instructions with answers, good ones and flawed ones (curt, rude, about the wrong subject,
  without a reason, ...), so that the fine-tuned policy has something left to learn;
- `comparisons.jsonl`: the best of three answers to one instruction and another of them, in the order of the gold judge
  (judge.py), with one label in ten flipped;
- `prompts.jsonl`: the training instructions alone;
- `heldout_prompts.jsonl`, `heldout_comparisons.jsonl`: instructions that no file above contains; every subject
  and every wording is in the files above, but not this pair of them. No label is flipped here.
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from judge import score

HERE = Path(__file__).parent
SEED = 7
PARAGRAPHS = 2600
DEMONSTRATIONS = 1300
COMPARISONS = 1500
HELDOUT_COMPARISONS = 200
CANDIDATES = 3  # answers drawn for one comparison
MARGIN = 0.1  # least difference of their judge scores
LABEL_NOISE = 0.1
TALK = 0.65  # share of the corpus that is talk rather than plain facts

# {kind of instruction: wordings}; {np} is the subject, {do} and {take} are the verbs of its category.
WORDINGS = {
    "describe": (
        "What is {np}?",
        "Describe {np}.",
        "Tell me about {np}.",
        "Can you explain what {np} is?",
        "Explain to me what {np} is.",
        "Please describe {np} to me.",
    ),
    "recommend": (
        "Should I {take} {np}?",
        "Would you say I should {take} {np}?",
        "Is it a good idea to {take} {np}?",
        "I want to {take} {np}. What do you think?",
        "Should I really {take} {np}?",
        "Would you {take} {np}?",
    ),
    "praise": (
        "Why do people like {np}?",
        "Why is {np} so popular?",
        "Tell me why people enjoy {np}.",
        "What is good about {np}?",
        "Why would anyone like {np}?",
        "Tell me what is good about {np}.",
    ),
    "explain": (
        "How do I {do} {np}?",
        "What is the best way to {do} {np}?",
        "Teach me how to {do} {np}.",
        "Show me how to {do} {np}.",
        "Explain how to {do} {np}.",
        "I need to know how to {do} {np}.",
    ),
    "advise": (
        "Give me a tip about {np}.",
        "What should I know before I {do} {np}?",
        "Do you have advice about {np}?",
        "Share your best advice on {np}.",
        "Is there any advice about {np}?",
        "I could use a tip about {np}.",
    ),
}

# {kind: (answer, the reason that may follow it)}
ANSWERS = {
    "describe": (
        ("{Np} is {trait}", ". People like it because {good}."),
        ("{Np} is {trait}", ", and many enjoy it because {good}."),
    ),
    "recommend": (
        ("Yes, {np} is a good choice", " because {good}."),
        ("I would recommend {np} to you", " because {good}."),
    ),
    "praise": (
        ("Many people like {np}", " because {good}."),
        ("{Np} is popular", " because {good}."),
    ),
    "explain": (
        ("To {do} {np}, {act}", ". This helps because {why}."),
        ("The best way to {do} {np} is simple: {act}", ", because {why}."),
    ),
    "advise": (
        ("My tip for {np} is simple: {act}", ", because {why}."),
        ("If you think about {np}, {act}", ". I say this because {why}."),
    ),
}
OPENERS = ("Happy to help!", "Good question!", "Thank you for asking.", "Of course!")
CLOSERS = ("I hope this helps.", "Please ask me again any time.", "I wish you a nice day.")
RUDE = ("That is a silly question.", "Look it up yourself.", "I do not care about {np}.", "Stop asking me about {np}.")
CURT = ("It is fine.", "Yes.", "No, not for you.", "Just try it.", "I think so.", "{Np} is nice.")
RAMBLE = ("Maybe.", "I do not know.", "But who can say.", "That is not a good thing to ask.")


@dataclass(frozen=True)
class Subject:
    """One subject of the world, with the verbs of its category."""

    name: str
    category: str
    article: bool
    do: str
    take: str
    facts: dict[str, str]

    def fill(self, template: str) -> str:
        """Put this subject and its facts into `template`."""
        phrase = f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}" if self.article else self.name
        upper = phrase[0].upper() + phrase[1:]
        return template.format(np=phrase, Np=upper, do=self.do, take=self.take, **self.facts)


@dataclass(frozen=True)
class Instruction:
    """A prompt, with what it asks for."""

    subject: Subject
    kind: str
    wording: str

    @property
    def prompt(self) -> str:
        """The text of the instruction."""
        return self.subject.fill(self.wording)


Style = Callable[[random.Random, Instruction, list[Subject]], str]


def load_subjects() -> list[Subject]:
    """The subjects of facts.json."""
    world = json.loads((HERE / "facts.json").read_text(encoding="utf-8"))
    return [
        Subject(name, category, entry["article"], entry["do_verb"], entry["take_verb"], facts)
        for category, entry in world.items()
        for name, facts in entry["subjects"].items()
    ]


def split_instructions(subjects: list[Subject]) -> tuple[list[Instruction], list[Instruction]]:
    """All instructions as (training, held out); every subject loses one wording in three."""
    train, heldout = [], []
    for number, subject in enumerate(subjects):
        for row, (kind, wordings) in enumerate(WORDINGS.items()):
            for column, wording in enumerate(wordings):
                left_out = (number + row + column) % 3 == 0
                (heldout if left_out else train).append(Instruction(subject, kind, wording))
    return train, heldout


def core(rng: random.Random, subject: Subject, kind: str, reason: bool = True) -> str:
    """The matter of an answer: the fact asked for, with its reason if wanted."""
    answer, because = rng.choice(ANSWERS[kind])
    return subject.fill(answer + (because if reason else "."))


def courteous(rng: random.Random, text: str) -> str:
    """Add one polite sentence, before or after."""
    return f"{rng.choice(OPENERS)} {text}" if rng.random() < 0.6 else f"{text} {rng.choice(CLOSERS)}"


def good(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """What the asker hopes for: the fact, its reason and one polite sentence."""
    return courteous(rng, core(rng, ask.subject, ask.kind))


def plain(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """The fact and its reason, without courtesy."""
    return core(rng, ask.subject, ask.kind)


def no_reason(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """The fact alone."""
    text = core(rng, ask.subject, ask.kind, reason=False)
    return courteous(rng, text) if rng.random() < 0.5 else text


def wrong_subject(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """An answer about another subject of the category."""
    others = [other for other in subjects if other.category == ask.subject.category and other != ask.subject]
    text = core(rng, rng.choice(others), ask.kind, reason=rng.random() < 0.6)
    return courteous(rng, text) if rng.random() < 0.5 else text


def wrong_kind(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """An answer to another question about the subject."""
    text = core(rng, ask.subject, rng.choice([kind for kind in ANSWERS if kind != ask.kind]), reason=rng.random() < 0.5)
    return courteous(rng, text) if rng.random() < 0.3 else text


def curt(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """A few words that help nobody."""
    return ask.subject.fill(rng.choice(CURT))


def rude(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """A rebuff, sometimes with the fact after it."""
    text = ask.subject.fill(rng.choice(RUDE))
    return f"{text} {core(rng, ask.subject, ask.kind, reason=False)}" if rng.random() < 0.5 else text


def gushing(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """Politeness without measure, often without substance: what a hacked policy would say."""
    phrases = " ".join(rng.sample(OPENERS, 2) + rng.sample(CLOSERS, rng.randint(0, 2)))
    return f"{phrases} {core(rng, ask.subject, ask.kind)}" if rng.random() < 0.3 else phrases


def repetitive(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """The same sentence twice."""
    text = core(rng, ask.subject, ask.kind, reason=False)
    return f"{text} {text}"


def rambling(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """The fact, then talk that leads nowhere."""
    return f"{core(rng, ask.subject, ask.kind, reason=False)} {' '.join(rng.sample(RAMBLE, 2))}"


def mixed_up(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """The subject asked about with the facts of another, a mistake that small models make."""
    other = rng.choice([other for other in subjects if other != ask.subject])
    return courteous(rng, core(rng, replace(ask.subject, facts=other.facts), ask.kind))


def garbled(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """Two answers, each cut somewhere and glued together, another mistake that small models make."""
    start = good(rng, ask, subjects).split()
    end = core(rng, rng.choice(subjects), rng.choice(list(ANSWERS))).split()
    return " ".join(start[: rng.randrange(3, len(start))] + end[rng.randrange(2, len(end)) :])


# {way to answer: its share of the demonstrations}
STYLES: dict[Style, float] = {
    good: 0.22,
    plain: 0.15,
    no_reason: 0.18,
    wrong_subject: 0.02,
    wrong_kind: 0.02,
    curt: 0.12,
    rude: 0.12,
    gushing: 0.06,
    repetitive: 0.05,
    rambling: 0.06,
}


# What the comparisons show besides: the mistakes that people do not make, but a small policy does.
SLIPS: dict[Style, float] = {mixed_up: 0.04, garbled: 0.08}


def draw_style(rng: random.Random, shares: dict[Style, float]) -> Style:
    """A style, as often as its share says."""
    return rng.choices(list(shares), list(shares.values()))[0]


def answer(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """One answer in a style drawn by its share."""
    return draw_style(rng, STYLES)(rng, ask, subjects)


def policy_like_answer(rng: random.Random, ask: Instruction, subjects: list[Subject]) -> str:
    """One answer as a fine-tuned policy would give it: those of people, and the slips of a model."""
    return draw_style(rng, STYLES | SLIPS)(rng, ask, subjects)


def paragraph(rng: random.Random, asks: list[Instruction], subjects: list[Subject]) -> str:
    """Raw text: a recorded talk, good or bad, with the marks of the chat template, or facts about one subject.

    Adapters leave the embeddings as they are, so the marks have to be learnt here, in pretraining.
    """
    ask = rng.choice(asks)
    if rng.random() < TALK:
        return f"<user>{ask.prompt}<assistant>{answer(rng, ask, subjects)}"
    kinds = rng.sample(list(ANSWERS), rng.randint(2, 3))
    return " ".join(core(rng, ask.subject, kind, reason=rng.random() < 0.75) for kind in kinds)


def compare(rng: random.Random, ask: Instruction, subjects: list[Subject], noise: float) -> dict[str, str]:
    """The best of a few answers and another one that is clearly worse; swapped with probability `noise`."""
    while True:
        answers = [policy_like_answer(rng, ask, subjects) for _ in range(CANDIDATES)]
        answers.sort(key=lambda text: score(ask.prompt, text), reverse=True)
        pair = [answers[0], rng.choice(answers[1:])]
        if score(ask.prompt, pair[0]) - score(ask.prompt, pair[1]) >= MARGIN:
            break
    if rng.random() < noise:
        pair.reverse()
    return {"prompt": ask.prompt, "chosen": pair[0], "rejected": pair[1]}


def draw(rng: random.Random, items: list[Instruction], count: int) -> list[Instruction]:
    """`count` items in random order, each as often as any other, give or take one."""
    passes = [rng.sample(items, len(items)) for _ in range(-(-count // len(items)))]
    return [item for one in passes for item in one][:count]


def write(name: str, rows: Iterable[dict[str, str]]) -> None:
    """Write `rows` as JSON lines next to this file."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8", newline="\n")


def main() -> None:
    """Write every file."""
    subjects = load_subjects()
    train, heldout = split_instructions(subjects)
    rng = random.Random(SEED)
    write("corpus", ({"text": paragraph(rng, train, subjects)} for _ in range(PARAGRAPHS)))
    asks = draw(rng, train, DEMONSTRATIONS)
    write("demonstrations", ({"prompt": ask.prompt, "completion": answer(rng, ask, subjects)} for ask in asks))
    write("comparisons", (compare(rng, ask, subjects, LABEL_NOISE) for ask in draw(rng, train, COMPARISONS)))
    write("prompts", ({"prompt": ask.prompt} for ask in draw(rng, train, len(train))))
    write("heldout_prompts", ({"prompt": ask.prompt} for ask in draw(rng, heldout, len(heldout))))
    asks = draw(rng, heldout, HELDOUT_COMPARISONS)
    write("heldout_comparisons", (compare(rng, ask, subjects, 0.0) for ask in asks))


if __name__ == "__main__":
    main()
