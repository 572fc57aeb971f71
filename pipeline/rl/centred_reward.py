"""Let PPOTrainer learn from r(x, y) + delta(x) - b(x), and see what it scores, without a change to PPOTrainer.

PPOTrainer is given a `CentredReward` as its reward model and `Watched` dataloaders. It never says which prompt a
completion belongs to, so this module relies on the order in which PPOTrainer calls its parts. One update is:

1. "batch": it takes one batch from `dataloader`. The batch holds all prompts that this process works on in the update,
   padded on the left: `per_device_train_batch_size * gradient_accumulation_steps` rows.
2. It samples one completion of each prompt. For each chunk of `local_rollout_forward_batch_size` rows, in the order of
   the batch, under `torch.no_grad()`:
   a. "reference": it computes the log-probabilities of the reference.
   b. "value": it asks the value model through `get_reward`, on the completions as they were sampled;
   c. "reward": it asks the reward model through `get_reward`, on the completions cut after their first eos, with
      padding behind. No other forward pass of the value model lies between b and c.
3. "train": it trains the policy and the value model; this is the only time that the value model has gradients.
4. "log": it logs the figures of the update.
5. With `num_sample_generations`, in some updates: "eval batch", then "reward" with that batch's completions, for each
   batch of `eval_dataloader`. These completions are shown, not trained on.

After the last update PPOTrainer takes no further batch. `ORDER` is this list in a form that tests compare with the
calls of a real PPOTrainer.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import nn

from pipeline.rl import stress
from pipeline.rl.baselines import Baseline, Prompt

# The calls of one update with two chunks, two optimizer steps, and one batch of completions that are shown.
CHUNK = ("reference", "value", "reward")
ORDER = ("batch", *CHUNK, *CHUNK, "train", "train", "log", "eval batch", "reward")

Batch = dict[str, torch.Tensor]  # `input_ids` and `attention_mask`, shape (rows, length), padded on the left


class Watched:
    """Stand in the place of a dataloader and tell `see` each batch that is taken from it.

    With `group` > 1 every prompt is repeated that often, one after the other, and a batch becomes `group` batches.
    """

    def __init__(self, dataloader: Iterable[Batch], see: Callable[[Batch], None], group: int = 1):
        self._dataloader = dataloader
        self._see = see
        self._group = group

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._dataloader:
            size = len(batch["input_ids"]) // self._group
            for start in range(0, size * self._group, size):
                rows = slice(start, start + size)
                part = {name: tensor[rows].repeat_interleave(self._group, 0) for name, tensor in batch.items()}
                self._see(part)
                yield part


class Rollout:
    """Know the prompts PPOTrainer is working on, and which of them is scored next."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.length = 0  # of the padded prompts, in tokens
        self._position = 0

    def see(self, batch: Batch) -> None:
        """Begin an update with this batch."""
        self.prompts = []
        for ids, mask in zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True):
            self.prompts.append(tuple(token for token, real in zip(ids, mask, strict=True) if real))
        self.length = batch["input_ids"].shape[1]
        self._position = 0

    def forget(self, _: Batch) -> None:
        """Begin a batch that is not trained on: its completions are scored as they are."""
        self.prompts = []

    def take(self, number: int) -> list[Prompt]:
        """Return the prompts of the next `number` completions that are scored."""
        prompts = self.prompts[self._position : self._position + number]
        self._position += number
        assert len(prompts) == number, "more completions were scored than there are prompts in the batch"
        return prompts


@dataclass(frozen=True)
class Subtraction:
    """Add the stress test's shift to scores, and say what is taken off: b(x), or 0 without a `baseline`.

    `shift_sd` and `seed` are those of `stress.added_shift`.
    """

    baseline: Baseline | None = None
    shift_sd: float = 0.0
    seed: int = 0

    def __call__(self, prompts: list[Prompt], scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return r + delta and b of completions, from their r; all of shape (completions,)."""
        shifts = [stress.added_shift(prompt, self.shift_sd, self.seed) for prompt in prompts]
        shifted = scores + scores.new_tensor(shifts)
        if self.baseline is None:
            return shifted, torch.zeros_like(shifted)
        return shifted, self.baseline(prompts, shifted)


class ScoredRow(NamedTuple):
    """Hold what was seen of one completion; `values` are as many as it has tokens."""

    raw: float
    centred: float
    length: int
    ended: bool
    values: list[float]


@dataclass(frozen=True)
class ScoredChunk:
    """Hold what was seen of some completions, as tensors: reading numbers from them would wait for the device.

    `values` are the value model's predictions before each token of the completion, shape (completions, tokens).
    """

    raw: torch.Tensor
    centred: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    values: torch.Tensor | None

    def rows(self) -> list[ScoredRow]:
        """Return one row of plain numbers for each completion."""
        lengths = self.lengths.tolist()
        values = [[] for _ in lengths] if self.values is None else self.values.tolist()
        values = [of_tokens[:length] for of_tokens, length in zip(values, lengths, strict=True)]
        columns = (self.raw.tolist(), self.centred.tolist(), lengths, self.ended.tolist(), values)
        return [ScoredRow(*row) for row in zip(*columns, strict=True)]


class Figures:
    """Collect what is scored in an update, and compute the log's figures from it."""

    def __init__(self) -> None:
        self.chunks: list[ScoredChunk] = []
        self._values: torch.Tensor | None = None  # of the chunk that is scored next, shape (rows, length)

    def listen(self, value_head: nn.Module) -> None:
        """Keep what the value model says of each chunk of a rollout."""

        def keep(_: nn.Module, __: object, logits: torch.Tensor) -> None:
            if not torch.is_grad_enabled():
                self._values = logits.squeeze(-1).float()

        value_head.register_forward_hook(keep)

    def values(self, start: int) -> torch.Tensor | None:
        """Return what the value model foretold of the last chunk, from the position before the completions' `start`."""
        return None if self._values is None else self._values[:, start - 1 : -1]

    def observe(self) -> dict[str, float]:
        """Return the figures since the last call, over all processes: nats and tokens as elsewhere; {} if no chunk."""
        rows = gather_object([row for chunk in self.chunks for row in chunk.rows()])
        self.chunks = []
        if not rows:
            return {}
        raw = np.array([row.raw for row in rows])
        centred = np.array([row.centred for row in rows])
        figures = {
            "objective/raw_scores": raw.mean(),
            "objective/raw_scores_sd": raw.std(),
            "objective/centred_scores": centred.mean(),
            "objective/centred_scores_sd": centred.std(),
            "completions/mean_length": np.mean([row.length for row in rows]),
            "completions/missing_eos": 1 - np.mean([row.ended for row in rows]),
        }
        # Each token's value should foretell the centred score of its completion.
        target = np.repeat(centred, [len(row.values) for row in rows])
        if len(target) and target.var() > 0:
            residual = target - np.concatenate([row.values for row in rows])
            figures["value/explained_variance"] = 1 - residual.var() / target.var()
        return {name: float(value) for name, value in figures.items()}


class _InputsKept(nn.Module):
    """Run the reward model's transformer, and keep its inputs for the score head that follows."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.inputs: Batch = {}

    def forward(self, **inputs: Any) -> Any:
        self.inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return self.transformer(**inputs)


class _CentredHead(nn.Module):
    """Run the reward model's score head, and add to all positions of a row what `offsets` says."""

    def __init__(self, score: nn.Module, offsets: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.score = score
        self._offsets = offsets

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.score(hidden).float()  # an offset may be far larger than what it hides
        return logits + self._offsets(logits.squeeze(-1)).view(-1, 1, 1)


class CentredReward(nn.Module):
    """A reward model in the form PPOTrainer takes, whose scores are r(x, y) + delta(x) - b(x).

    `reward` and `value` are score models: a transformer under the name `base_model_prefix`, and a head `score`. The
    value model is listened to only. `rollout.see` and `rollout.forget` must be told the batches PPOTrainer takes.
    `observe()` returns the figures since it was last called: raw and centred scores, lengths, eos, and how well the
    value model foretold the centred scores.
    """

    base_model_prefix = "transformer"

    def __init__(self, reward: Any, value: Any, eos_token_id: int, subtraction: Subtraction):
        super().__init__()
        self.config = getattr(reward, "config", None)  # DeepSpeed asks for its sizes
        self.transformer = _InputsKept(getattr(reward, reward.base_model_prefix))
        self.score = _CentredHead(reward.score, self._offsets)
        self.rollout = Rollout()
        self._subtraction = subtraction
        self._figures = Figures()
        self._figures.listen(value.score)
        self._eos = eos_token_id

    def observe(self) -> dict[str, float]:
        """Return the figures of what was scored since the last call."""
        return self._figures.observe()

    def _offsets(self, logits: torch.Tensor) -> torch.Tensor:
        """Return what to add to all scores of each row, shape (rows,), from the scores of all positions (rows, length).

        PPOTrainer reads a row's score at the position that it chooses itself, so each row is moved as a whole.
        """
        if not self.rollout.prompts:
            return torch.zeros(len(logits), device=logits.device)
        ids = self.transformer.inputs["input_ids"]
        mask = self.transformer.inputs["attention_mask"].bool()
        start = self.rollout.length
        rows = torch.arange(len(logits), device=logits.device)
        # A completion ends before its first padding, as PPOTrainer has it.
        lengths = mask[:, start:].long().cumprod(1).sum(1)
        scores = logits[rows, start + lengths - 1]
        raw, base = self._subtraction(self.rollout.take(len(scores)), scores)
        ended = (mask & (ids == self._eos))[:, start:].any(1)
        chunk = ScoredChunk(raw, raw - base, lengths, ended, self._figures.values(start))
        self._figures.chunks.append(chunk)
        return raw - scores - base
