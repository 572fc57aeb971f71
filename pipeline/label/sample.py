"""Sample the pairs that are compared: two completions of one policy for a prompt, or one of each of two."""

import dataclasses
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from pipeline.base import base_model
from pipeline.data.joints import eos_id, pad_id
from pipeline.export.source import Source
from pipeline.label.asked import Order
from pipeline.label.pairs import Completion, Pair
from pipeline.label.run import Parts
from pipeline.models import run_models, scoring
from pipeline.models.generation import Ids, Sampling, batches, generate
from pipeline.models.loading import Loader, Model, Weights, load_policy, load_reward, to_device
from pipeline.system.errors import UserError

NUM_SPARE_ROUNDS = 2  # through all prompts, where completions were equal or empty
Say = Callable[[str], None]


@dataclass
class Sampled:
    """The pairs, and how many were passed over: of equal completions, with an empty one, and drawn before.

    `sequences` has the token ids of each pair's two completions, each behind its prompt.
    """

    pairs: list[Pair] = field(default_factory=list)
    sequences: list[tuple[Ids, Ids]] = field(default_factory=list)
    identical: int = 0
    empty: int = 0
    repeated: int = 0

    def passed_over(self) -> list[str]:
        """Say how many pairs were passed over, and why."""
        counts = {
            "of two equal completions": self.identical,
            "with an empty completion": self.empty,
            "that had been drawn before": self.repeated,
        }
        return [f"{count} pairs {what} were passed over" for what, count in counts.items() if count]


class _Policies:
    """Load the policies of a run one at a time. `longest`: the tokens of the longest of all prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, sampling: Sampling, longest: int, say: Say):
        self._longest = longest
        self._tokenizer = tokenizer
        self._sampling = sampling
        self._say = say
        self._name = ""
        self._model: Model | None = None

    def complete(self, found: Source, prompts: list[Ids], draw: int) -> list[Ids]:
        """Return the policy's completion of each prompt."""
        if self._name != found.stage or self._model is None:
            self.close()
            self._say(f"loading {found.stage}")
            self._model = _loaded(load_policy, found, self._tokenizer)
            self._name = found.stage
            _check_positions(self._model, self._sampling.max_new_tokens, self._longest)
        self._say(f"sampling {len(prompts)} completions from {found.stage}")
        drawn: list[Ids] = []
        for batch in batches(prompts, self._sampling.batch_size):
            drawn += generate(self._model, batch, self._sampling, self._tokenizer, draw)
        return drawn

    def close(self) -> None:
        self._model = None
        clear_device_cache(garbage_collection=True)


def _loaded(load: Callable[[Loader, Weights], Model], found: Source, tokenizer: PreTrainedTokenizerFast) -> Model:
    """Load a stage's model as the stages of its run do.

    Raises:
        UserError: if its weights are not there.
    """
    loader = run_models.loader(found.recorded, tokenizer)
    with run_models.readable(found.full):
        return to_device(load(loader, Weights(found.full, found.adapter)))


def _check_positions(model: Model, max_new_tokens: int, longest: int) -> None:
    """Refuse completions for which the model has no positions."""
    positions = base_model.num_positions(model.config)
    if positions is not None and positions < longest + max_new_tokens:
        fault = f"the longest prompt has {longest} tokens, and the model takes {positions} in all"
        raise UserError(f"--max-new-tokens: {max_new_tokens} are too many: {fault}; ask for fewer")


def sample(
    parts: Parts, rows: Dataset, number: int, sampling: Sampling, tokenizer: PreTrainedTokenizerFast, say: Say
) -> Sampled:
    """Return `number` pairs, in an order drawn by the sampling's seed; fewer where completions are too often equal.

    Where prompts are fewer than pairs, several pairs have the same prompt.

    Raises:
        UserError: if no two completions differ.
    """
    one_policy = len(parts.policies) == 1
    if one_policy and sampling.temperature == 0:
        raise UserError("--temperature: at 0 both completions of a policy are the same; give more, or two policies")
    order = list(range(len(rows)))
    random.Random(f"{sampling.seed} prompts").shuffle(order)
    rounds = math.ceil(number / len(order)) + NUM_SPARE_ROUNDS
    if sampling.temperature == 0:  # a second round would give the same
        rounds = 1
    waiting = [(turn, i) for turn in range(rounds) for i in order]
    policies = _Policies(tokenizer, sampling, max(map(len, rows["prompt_ids"][:])), say)
    result = Sampled()
    known: set[tuple[int, frozenset[str]]] = set()
    least = sampling.batch_size
    while waiting and len(result.pairs) < number:
        turn = waiting[0][0]
        wanted = max(number - len(result.pairs), least)
        least *= 2  # where few completions differ, models would be loaded for each few prompts
        now = [i for its_turn, i in waiting[:wanted] if its_turn == turn]
        waiting = waiting[len(now) :]
        prompts = rows.select(now)["prompt_ids"][:]
        draws = (2 * turn, 2 * turn + 1)  # with the same random numbers policies that are near say the same
        sides = (parts.policies[0], parts.policies[-1])
        drawn = [policies.complete(side, prompts, draw) for side, draw in zip(sides, draws, strict=True)]
        for i, prompt, *both in zip(now, prompts, *drawn, strict=True):
            first, second = (_completion(tokenizer, side.stage, ids) for side, ids in zip(sides, both, strict=True))
            if _is_new(result, (first, second), i, known):
                result.pairs.append(Pair(rows[i]["prompt"], (first, second)))
                result.sequences.append((prompt + both[0], prompt + both[1]))
    policies.close()
    if not result.pairs:
        raise UserError(
            "all pairs of completions were equal or empty: there is nothing to compare. Raise --temperature"
        )
    return dataclasses.replace(result, pairs=result.pairs[:number], sequences=result.sequences[:number])


def _completion(tokenizer: PreTrainedTokenizerFast, policy: str, ids: Ids) -> Completion:
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    return Completion(policy, text, len(ids), eos_id(tokenizer) in ids)


def _is_new(
    result: Sampled, both: tuple[Completion, Completion], prompt: int, known: set[tuple[int, frozenset[str]]]
) -> bool:
    """Tell whether a reward model can learn from a pair that was not drawn before, or count why it is passed over."""
    texts = [one.text.strip() for one in both]
    pair = (prompt, frozenset(texts))
    if texts[0] == texts[1]:
        result.identical += 1
    elif not all(texts):
        result.empty += 1
    elif pair in known:
        result.repeated += 1
    else:
        known.add(pair)
        return True
    return False


def scored(sampled: Sampled, reward: Source, batch_size: int, tokenizer: PreTrainedTokenizerFast) -> list[Pair]:
    """Return the pairs with the scores of a reward model.

    Raises:
        UserError: if a score is not finite.
    """
    model = _loaded(load_reward, reward, tokenizer)
    sequences = [sequence for both in sampled.sequences for sequence in both]
    scores = scoring.score(model, sequences, pad_id(tokenizer), batch_size)
    del model
    clear_device_cache(garbage_collection=True)
    if not all(map(math.isfinite, scores)):
        raise UserError(f"the reward model {reward.stage!r} gives scores that are not finite; train it again")
    pairs = []
    for number, pair in enumerate(sampled.pairs):
        both = zip(pair.completions, scores[2 * number : 2 * number + 2], strict=True)
        first, second = (dataclasses.replace(one, score=score) for one, score in both)
        pairs.append(dataclasses.replace(pair, completions=(first, second)))
    return pairs


def ordered(pairs: Sequence[Pair], order: Order) -> list[Pair]:
    """Return the pairs in the order in which they are asked: as they were drawn, or the nearest margins first."""
    if order == "random":
        return list(pairs)
    return sorted(pairs, key=lambda pair: abs(pair.margin or 0.0))
