"""Compute b(x), the baseline of a prompt that PPO subtracts from the scores of the prompt's completions.

Comparisons of completions cannot identify the level of a prompt's scores: a reward model may add any constant delta(x)
to all of them. The mean score of other completions of the same prompt has the same delta(x) in it.
"""

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from pipeline.config.schema import Ppo
from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling
from pipeline.rl import stress
from pipeline.system.digests import digest
from pipeline.system.errors import UserError
from pipeline.system.processes import share_of
from pipeline.training.completions import completions, identity_of
from pipeline.training.context import StageContext
from pipeline.training.store import Store

# Token ids. A tuple, as PPOTrainer's batches bring the ids of a prompt and nothing else to look its baseline up by.
Prompt = tuple[int, ...]
# From the prompts and the scores of some completions, shape (completions,), to what is subtracted, of the same shape.
Baseline = Callable[[list[Prompt], torch.Tensor], torch.Tensor]


class Offline:
    """Take the mean score that some completions of each prompt got before training.

    `weight` is the share of the prompt's own mean; the rest is the mean of the prompts' means.
    """

    def __init__(self, scores: dict[Prompt, list[float]], weight: float = 1.0):
        self._means = {prompt: float(np.mean(values)) for prompt, values in scores.items()}
        self._overall = float(np.mean(list(self._means.values())))
        self._weight = weight

    def __call__(self, prompts: list[Prompt], scores: torch.Tensor) -> torch.Tensor:
        means = scores.new_tensor([self._means[prompt] for prompt in prompts])
        return self._weight * means + (1 - self._weight) * self._overall


class LeaveOneOut:
    """Take the mean score of the other completions of the same prompt; completions come in groups of `group`."""

    def __init__(self, group: int, weight: float = 1.0):
        self._group = group
        self._weight = weight

    def __call__(self, prompts: list[Prompt], scores: torch.Tensor) -> torch.Tensor:
        groups = scores.view(-1, self._group)
        totals = groups.sum(1, keepdim=True)
        means = (totals - groups) / (self._group - 1)
        if len(scores) == self._group:  # there is no other prompt to shrink towards, and 0 has no meaning as a score
            return means.view(-1)
        # Towards the mean of the other prompts: a mean that holds the score itself would not be a baseline.
        others = (totals.sum() - totals) / (len(scores) - self._group)
        return (self._weight * means + (1 - self._weight) * others).view(-1)


def reliability(icc: float, number: int) -> float:
    """Return the share of a prompt's mean of `number` scores that is the prompt's own (Spearman-Brown).

    It is the weight of shrinkage. `icc` is the intraclass correlation: the share of one score that is the prompt's own.
    """
    return number * icc / (1 + (number - 1) * icc)


def answers_of(ctx: StageContext[Ppo], rows: Dataset, sampling: Sampling) -> dict[Prompt, list[Ids]]:
    """Return the completions whose scores make the offline baseline of each prompt.

    They are the parent's, or with `reference` the rows' own (`answer_ids`). A stage without an offline baseline has no
    such completions.
    """
    stage = ctx.stage
    if stage.prompt_baseline in ("none", "leave_one_out"):
        return {}
    prompts = rows["input_ids"][:]
    if stage.prompt_baseline == "reference":
        answers: dict[Prompt, list[Ids]] = {}
        for prompt, answer in zip(prompts, rows["answer_ids"][:], strict=True):
            answers.setdefault(tuple(prompt), []).append(answer)
        return answers
    number = stage.baseline_completions
    if stage.prompt_baseline == "greedy":
        sampling = dataclasses.replace(sampling, temperature=0.0)
        number = 1
    assert stage.init is not None, "references.py fills it in"
    unique = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    drawn = completions(ctx, stage.init, unique, sampling, number)
    return {tuple(prompt): of_prompt for prompt, of_prompt in zip(unique, drawn, strict=True)}


def make_baseline(
    ctx: StageContext[Ppo], reward: nn.Module, answers: dict[Prompt, list[Ids]], batch_size: int
) -> Baseline | None:
    """Make the baseline that the stage asks for, or None.

    `reward` is the reward model, on this process's device; `answers` are from `answers_of`. The stress test's shift is
    in an offline baseline as it is in the scores that the baseline is subtracted from.
    """
    stage = ctx.stage
    if stage.prompt_baseline == "none":
        return None
    weight = _weight(ctx) if stage.baseline_shrinkage else 1.0
    if stage.prompt_baseline == "leave_one_out":
        return LeaveOneOut(stage.baseline_completions, weight)
    scores = offline_scores(ctx, reward, answers, batch_size)
    for prompt, values in scores.items():
        offset = stress.added_shift(prompt, stage.added_shift, ctx.seed)
        scores[prompt] = [value + offset for value in values]
    return Offline(scores, weight)


def _weight(ctx: StageContext[Ppo]) -> float:
    """Return the weight of a prompt's own mean, from the ICC that the shift report measured.

    Raises:
        UserError: if the report could not measure it.
    """
    stage = ctx.stage
    number = stage.baseline_completions
    assert stage.shift is not None, "the config refuses `baseline_shrinkage` without a shift report"
    icc = ctx.record_of(stage.shift).metrics["icc"]
    if icc is None:
        fault = f"{stage.shift} could not measure the ICC: too few prompts, or all scores are equal"
        raise UserError(f"stages.{ctx.name}.baseline_shrinkage: {fault}. Give it more prompts, or do not shrink")
    # The number of scores in each prompt's mean; a greedy completion is one, and of answers there may be one only.
    counts = {"sft_mean": number, "leave_one_out": number - 1}
    weight = reliability(icc["value"], counts.get(stage.prompt_baseline, 1))
    ctx.say(f"{ctx.name}: a prompt's baseline counts {weight:.2f}, the mean of all prompts the rest")
    return weight


def offline_scores(
    ctx: StageContext[Ppo], reward: nn.Module, answers: dict[Prompt, list[Ids]], batch_size: int
) -> dict[Prompt, list[float]]:
    """Return the scores of completions by prompt, the same in all processes; the run keeps them for other stages."""
    assert ctx.stage.reward is not None, "references.py fills it in"
    keys = {prompt: digest([list(prompt), ids]) for prompt, ids in answers.items()}
    file = ctx.cache / f"scores-{identity_of(ctx, ctx.stage.reward)[:16]}.jsonl"
    store: Store[list[float]] = Store(file, "answers", "scores")
    scores_by_key = store.read()
    lacking = [prompt for prompt in answers if keys[prompt] not in scores_by_key]
    if lacking:
        ctx.say(f"{ctx.name}: scoring completions of {len(lacking)} prompts for the baseline")
        ctx.progress.begin("scoring for the baseline")
        own_share = share_of(lacking)
        sequences = [[*prompt, *ids] for prompt in own_share for ids in answers[prompt]]
        scores = iter(scoring.score(reward, sequences, cast(int, ctx.tokenizer.pad_token_id), batch_size))
        scores_by_key |= store.add({keys[prompt]: [next(scores) for _ in answers[prompt]] for prompt in own_share})
    return {prompt: scores_by_key[keys[prompt]] for prompt in answers}
