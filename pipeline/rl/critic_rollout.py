"""Sample completions, score them, and make of them what PPO on GRPOTrainer trains on."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from trl.trainer.utils import selective_log_softmax

from pipeline.config.critic_config import CriticConfig
from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling, batches, generate
from pipeline.models.loading import Model, num_parameters
from pipeline.models.ppo import Models
from pipeline.models.views import ScoreView
from pipeline.rl.advantages import PADDING, Rollout, advantages_and_returns, masks, token_rewards
from pipeline.rl.baselines import Prompt
from pipeline.rl.centred_reward import Figures, ScoredChunk, Subtraction
from pipeline.rl.micro_batches import pieces

# How many tokens take as long as starting a forward pass, times the number of the model's parameters: a GPU has far
# more to wait for. Roughly, from models of 1 and 135 million parameters on a CPU, and of 135 million on a GPU.
PASS_COSTS = {"cpu": 1e8, "cuda": 2e12}

# The figures of an update, by their names in PPOTrainer's log; each a tensor with one number.
Stats = dict[str, torch.Tensor]


class PolicyAndValue(nn.Module):
    """Be policy and value model in one module with one forward pass, so that DDP reduces the gradients of both.

    The value model is a view of the policy's backbone: of its own it has the score head alone.
    """

    def __init__(self, policy: Model, value: ScoreView):
        super().__init__()
        self.policy = policy
        self.value = value
        self.config = policy.config

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **_: object
    ) -> None:
        """Turn gradient checkpointing on; the Trainer calls it with the user's options."""
        cast(Any, self.policy).gradient_checkpointing_enable(activation_checkpointing_kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **_: object
    ) -> None:
        """Do the same under the name that older versions of transformers call."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs)

    def forward(self, num_logits: dict[str, int], **inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the policy's logits, and the values of all positions, shape (rows, length)."""
        hidden = self.value.transformer(**inputs).hidden_states[-1]
        values = self.value.score(hidden).squeeze(-1)
        return self.policy(**inputs, **num_logits).logits, values


@dataclass(frozen=True)
class Scored:
    """Hold some completions with their prompts; all but `sequences` of shape (rows, width) or (rows,)."""

    sequences: torch.Tensor
    lengths: torch.Tensor
    ended: torch.Tensor
    scores: torch.Tensor
    log_probs: torch.Tensor
    reference: torch.Tensor
    values: torch.Tensor


def joined(chunks: Sequence[Scored], rows: Sequence[int], pad_token_id: int) -> Scored:
    """Join the pieces of a rollout, padded to its longest prompt and its longest completion.

    `rows` are the numbers in the rollout that the pieces' rows have, piece after piece.
    """
    order = torch.tensor(rows, device=chunks[0].lengths.device).argsort()
    width = max(chunk.values.shape[1] for chunk in chunks)
    length = max(chunk.sequences.shape[1] - chunk.values.shape[1] for chunk in chunks)
    columns = defaultdict(list)
    for chunk in chunks:
        more = width - chunk.values.shape[1]
        before = length + width - more - chunk.sequences.shape[1]
        columns["sequences"].append(pad(chunk.sequences, (before, more), value=pad_token_id))
        for name in ("log_probs", "reference", "values"):
            columns[name].append(pad(getattr(chunk, name), (0, more)))
        for name in ("lengths", "ended", "scores"):
            columns[name].append(getattr(chunk, name))
    return Scored(**{name: torch.cat(values)[order] for name, values in columns.items()})


class Rollouts:
    """Make rollouts. `keeps_logits` says that the model can leave out the logits of prompts.

    `figures` collects what is scored, as PPOTrainer's stage logs it.
    """

    def __init__(
        self,
        models: Models,
        args: CriticConfig,
        tokenizer: PreTrainedTokenizerBase,
        subtraction: Subtraction,
        keeps_logits: bool,
        autocast: Callable[[], AbstractContextManager[Any]],
    ):
        self._models = models
        self._args = args
        self._tokenizer = tokenizer
        self._pad = cast(int, tokenizer.pad_token_id)
        self._subtraction = subtraction
        self._keeps_logits = keeps_logits
        self._autocast = autocast
        size = args.local_rollout_forward_batch_size
        self._sampling = Sampling(args.temperature, args.response_length, size, args.seed)
        cost = PASS_COSTS.get(args.device.type, PASS_COSTS["cuda"])
        self._pass_cost = cost / num_parameters(models.policy)["total"]  # in tokens
        self.figures = Figures()

    @torch.no_grad()
    def make(self, model: nn.Module, prompts: Sequence[Ids], update: int) -> tuple[Rollout, Stats]:
        """Sample one completion of each prompt from the policy of `model`, which is in eval mode.

        The random numbers of completions follow from the update and the prompts alone.
        """
        size = self._sampling.batch_size
        policy = cast(Model, self._models.policy)
        completions: list[Ids] = []
        with self._autocast():
            for chunk in batches(list(prompts), size):
                completions += generate(policy, chunk, self._sampling, self._tokenizer, update)
        parts = pieces([len(ids) for ids in completions], size, self._pass_cost)
        scored = []
        for rows in parts:
            scored.append(self._score(model, [prompts[row] for row in rows], [completions[row] for row in rows]))
        rollout = joined(scored, [row for rows in parts for row in rows], self._pad)
        return self._judge(self._subtracted(rollout, [tuple(prompt) for prompt in prompts]))

    def _cut(self, ids: Ids) -> Ids:
        """Cut a completion before its first padding, as PPOTrainer has it: a policy may sample that token too."""
        return ids[: ids.index(self._pad)] if self._pad in ids else ids

    def _score(self, model: nn.Module, prompts: Sequence[Ids], completions: list[Ids]) -> Scored:
        """Score some completions, and say what policy, reference and value model think of them."""
        device = next(model.parameters()).device
        # The score goes to the token after the last, so that there must be one.
        width = min(self._args.response_length, max(map(len, completions)) + 1)
        padded_prompts = scoring.padded(prompts, self._pad, device, "left")["input_ids"]
        answers = scoring.padded(completions, self._pad, device, "right")["input_ids"]
        answers = pad(answers, (0, width - answers.shape[1]), value=self._pad)
        sequences = torch.cat([padded_prompts, answers], 1)
        log_probs, values, logits = self.forward(model, sequences, width)
        del logits  # before the reference makes its own
        with self._autocast():
            inputs, num_logits = self._inputs(sequences, width)
            reference = self._log_probs(self._models.reference(**inputs, **num_logits).logits, sequences, width)[0]
        eos = self._tokenizer.eos_token_id
        # As PPOTrainer, which looks behind padding that was sampled too.
        ended = torch.tensor([eos in ids for ids in completions], device=device)
        completions = [self._cut(ids) for ids in completions]
        rows = [[*prompt, *ids] for prompt, ids in zip(prompts, completions, strict=True)]
        scores = torch.tensor(scoring.score(self._models.reward, rows, self._pad, len(rows)), device=device)
        lengths = torch.tensor([len(ids) for ids in completions], device=device)
        return Scored(sequences, lengths, ended, scores, log_probs, reference, values)

    def _subtracted(self, scored: Scored, prompts: list[Prompt]) -> Scored:
        """Take the baseline off the scores, in chunks as PPOTrainer does: some baselines look at a whole chunk."""
        size = self._sampling.batch_size
        centred = []
        for start in range(0, len(prompts), size):
            rows = slice(start, start + size)
            raw, base = self._subtraction(prompts[rows], scored.scores[rows])
            centred.append(raw - base)
            seen = (scored.lengths[rows], scored.ended[rows], scored.values[rows])
            self.figures.chunks.append(ScoredChunk(raw, raw - base, *seen))
        return replace(scored, scores=torch.cat(centred))

    def _judge(self, scored: Scored) -> tuple[Rollout, Stats]:
        """Compute rewards, advantages and returns of completions."""
        args = self._args
        width = scored.values.shape[1]
        real, valued = masks(scored.lengths, width)
        scores = scored.scores
        if args.missing_eos_penalty is not None:
            scores = scores - args.missing_eos_penalty * ~scored.ended
        log_probs = scored.log_probs.masked_fill(~real, PADDING)
        reference = scored.reference.masked_fill(~real, PADDING)
        values = scored.values.masked_fill(~valued, 0)
        given = token_rewards(
            log_probs, reference, scores, scored.lengths, args.kl_coef, args.kl_estimator, args.whiten_rewards
        )
        advantages, returns = advantages_and_returns(given.rewards, values, real, args.gamma, args.lam)
        penalty = (-args.kl_coef * given.kl).sum(1).mean()
        stats = {
            "objective/kl": given.kl.sum(1).mean(),
            "objective/entropy": (-log_probs * real).sum(1).mean(),
            "objective/non_score_reward": penalty,
            "objective/rlhf_reward": penalty + scores.mean(),
            "objective/scores": scores.mean(),
            "val/num_eos_tokens": scored.ended.sum().float(),
        }
        return Rollout(scored.sequences, real, valued, log_probs, values, advantages, returns), stats

    def forward(
        self, model: nn.Module, sequences: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities, values and logits of the last `width` tokens, shape (rows, width, ...)."""
        inputs, num_logits = self._inputs(sequences, width)
        logits, values = model(num_logits=num_logits, **inputs)
        log_probs, logits = self._log_probs(logits, sequences, width)
        return log_probs, values[:, -width:], logits

    def _inputs(self, sequences: torch.Tensor, width: int) -> tuple[dict[str, torch.Tensor], dict[str, int]]:
        """Return what a model takes of padded sequences, and how many logits are asked for.

        The last token is left out: nothing is asked that comes after it.
        """
        sequences = sequences[:, :-1]
        mask = sequences != self._pad
        inputs = {
            "input_ids": sequences.masked_fill(~mask, 0),
            "attention_mask": mask,
            "position_ids": mask.cumsum(1) - mask.long(),
        }
        return inputs, {"logits_to_keep": width} if self._keeps_logits else {}

    def _log_probs(
        self, logits: torch.Tensor, sequences: torch.Tensor, width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probabilities of the last `width` tokens at the temperature of sampling, and the logits."""
        # The logits at position t - 1 are the distribution of token t, and those of the last token were not asked for.
        logits = logits[:, -width:]
        logits /= self._args.temperature + 1e-7  # in place: it may be the largest tensor there is
        return selective_log_softmax(logits, sequences[:, -width:]), logits
