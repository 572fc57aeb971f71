"""Hold the dialogues, one for each policy, which reads its own answers. Answers are sampled and measured here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import PreTrainedTokenizerFast

from pipeline.chat.selection import Run, same_weights
from pipeline.chat.weights import Models
from pipeline.data.encode import prompt_ids
from pipeline.data.faults import RowFault
from pipeline.data.joints import eos_id, pad_id
from pipeline.data.messages import Messages
from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling, generate
from pipeline.models.shared import Policy
from pipeline.show.tables import number
from pipeline.system.errors import UserError
from pipeline.training import divergence


@dataclass(frozen=True)
class Settings:
    """Say how answers are drawn; temperature 0 takes the likeliest token."""

    temperature: float
    max_new_tokens: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """An answer: its text, its tokens (eos included), whether it ended by itself, and its measures.

    `kl` is in nats, to the session's baseline, over the answer's tokens. None: it is not measured.
    """

    text: str
    ids: Ids
    ended: bool = False
    score: float | None = None
    kl: float | None = None

    @property
    def figures(self) -> str:
        """Return what is shown beside the answer."""
        parts = []
        if self.score is not None:
            parts.append(f"score {number(self.score, 2)}")
        if self.kl is not None:
            parts.append(f"KL {number(self.kl, 2)}")
        tokens = "1 token" if len(self.ids) == 1 else f"{len(self.ids)} tokens"
        return ", ".join([*parts, tokens, "ended" if self.ended else "cut off"])


@dataclass(frozen=True)
class Turn:
    """A question, and the answers by policy."""

    question: str
    answers: dict[str, Answer]


Tell = Callable[[str, Answer, bool], None]  # the policy, its answer so far, and whether it is complete


@dataclass
class Session:
    """Talk to the policies `names`. `reward` and `baseline`: None where the run has no such stage.

    `version` counts the changes of the dialogues and of the stages.
    """

    run: Run
    tokenizer: PreTrainedTokenizerFast
    models: Models
    names: list[str]
    reward: nn.Module | None
    reward_name: str | None
    baseline: str | None
    turns: list[Turn] = field(default_factory=list)
    version: int = 0
    _dialogues: dict[str, Messages] = field(default_factory=dict)

    def ask(self, question: str, settings: Settings, tell: Tell) -> Turn:
        """Let every policy answer in turn. `tell` is called as text comes; what it raises takes the turn back.

        Raises:
            UserError: if the question is empty, or a dialogue is too long for its model; nothing was asked then.
        """
        if not question.strip():
            raise UserError("there is no question")
        prompts = {name: self._prompt(name, question) for name in self.names}
        rooms = {name: self._room(name, prompt, settings) for name, prompt in prompts.items()}
        answers: dict[str, Answer] = {}
        for name, prompt in prompts.items():
            answers[name] = self._answer(name, prompt, rooms[name], settings, tell)
            tell(name, answers[name], True)
        turn = Turn(question, answers)
        for name, answer in answers.items():
            said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer.text}]
            self._dialogues.setdefault(name, []).extend(said)
        self.turns.append(turn)
        self.version += 1
        return turn

    def choose(self, names: Sequence[str]) -> None:
        """Talk to these policies from now on. One that is new begins its dialogue here; one that goes loses its own.

        Raises:
            UserError: if one is no finished policy, or cannot be loaded; nothing is changed then.
        """
        if not names:
            raise UserError("name at least one stage")
        checked = self.run.checked(names)
        self.models.load(checked)
        self.names = checked
        self._dialogues = {name: said for name, said in self._dialogues.items() if name in checked}
        self.version += 1

    def reset(self) -> None:
        """Begin all dialogues anew."""
        self._dialogues.clear()
        self.turns.clear()
        self.version += 1

    def notes(self) -> list[str]:
        """Say what must be known to read the answers: what they are measured by, and which policies are the same."""
        lines = []
        if self.reward_name is not None:
            lines.append(f"score: by the reward model {self.reward_name}, in log-odds")
        if self.baseline is not None:
            lines.append(f"KL: to {self.baseline}, in nats over the answer's tokens")
        for group in same_weights(self.run, self.names):
            lines.append(f"{', '.join(group[:-1])} and {group[-1]} have the same weights, by their checksums")
        return lines

    def _prompt(self, name: str, question: str) -> Ids:
        messages = [*self._dialogues.get(name, []), {"role": "user", "content": question}]
        try:
            return prompt_ids(self.tokenizer, messages)
        except RowFault as fault:
            raise UserError(f"the chat template of the run does not take this: {fault}") from None

    def _room(self, name: str, prompt: Ids, settings: Settings) -> int:
        """Return how many tokens an answer may have.

        Raises:
            UserError: if the prompt fills all positions of the model.
        """
        positions = self.models.policy(name).shared.positions
        if positions is None:
            return settings.max_new_tokens
        if len(prompt) >= positions:
            fault = f"the dialogue with this question has {len(prompt)} tokens, and its model has {positions} positions"
            raise UserError(f"{name}: {fault}. Ask a shorter one, or begin anew; the dialogue is as it was")
        return min(settings.max_new_tokens, positions - len(prompt))

    def _answer(self, name: str, prompt: Ids, room: int, settings: Settings, tell: Tell) -> Answer:
        """Sample an answer, as an evaluation does, and measure it."""
        policy = self.models.policy(name)
        sampling = Sampling(settings.temperature, room, 1, settings.seed)
        drawn: Ids = []

        def follow(ids: Ids) -> None:
            drawn.extend(ids)
            text = self._text(drawn).rstrip("\ufffd")  # the first bytes of a character
            tell(name, Answer(text, list(drawn)), False)

        with policy.active() as model:
            (ids,) = generate(model, [prompt], sampling, self.tokenizer, follow=follow)
        return Answer(
            text=self._text(ids),
            ids=ids,
            ended=eos_id(self.tokenizer) in ids,
            score=self._score(prompt, ids),
            kl=self._kl(policy, prompt, ids, settings.temperature),
        )

    def _text(self, ids: Ids) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _score(self, prompt: Ids, ids: Ids) -> float | None:
        if self.reward is None:
            return None
        (score,) = scoring.score(self.reward, [prompt + ids], pad_id(self.tokenizer))
        return score

    @torch.no_grad()
    def _kl(self, policy: Policy, prompt: Ids, ids: Ids, temperature: float) -> float | None:
        """Measure the KL as an evaluation does; for greedy answers, which have no KL, that of temperature 1."""
        if self.baseline is None:
            return None
        baseline = self.models.policy(self.baseline)
        with policy.active() as model:
            (kl,) = divergence.kl_of_completions(model, baseline, [prompt], [ids], temperature or 1.0)
        return kl
