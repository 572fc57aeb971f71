"""The score PPO learns from: r(x, y) - b(x), where b is a baseline of the prompt that comparisons cannot identify.

A reward model's score may be shifted by any amount per prompt; subtracting what other completions of the same prompt
score removes it, before any penalty or clipping. PPOTrainer stays as it is: the reward model it is given subtracts.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock
from torch import nn

from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling
from pipeline.rl import stress
from pipeline.system.digests import digest
from pipeline.system.processes import same_everywhere
from pipeline.training.completions import completions, identity_of
from pipeline.training.context import StageContext

Prompt = tuple[int, ...]  # token ids
Baseline = Callable[[list[Prompt], torch.Tensor], torch.Tensor]  # prompts and scores of completions -> what to subtract


class Watched:
    """Stands in the place of a dataloader and tells `see` each batch that is taken from it.

    With `group` > 1 every prompt is repeated that often, one after the other, and a batch becomes `group` batches.
    """

    def __init__(self, dataloader: Any, see: Callable[[dict[str, torch.Tensor]], None], group: int = 1):
        self._dataloader, self._see, self._group = dataloader, see, group

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for batch in self._dataloader:
            size = len(batch["input_ids"]) // self._group
            for start in range(0, size * self._group, size):
                part = {k: v[start : start + size].repeat_interleave(self._group, 0) for k, v in batch.items()}
                self._see(part)
                yield part


class Rollout:
    """The prompts PPOTrainer is working on, and the one whose completion is scored next."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []
        self.length = 0  # of the padded prompts, in tokens
        self._position = 0

    def see(self, batch: dict[str, torch.Tensor]) -> None:
        rows = zip(batch["input_ids"].tolist(), batch["attention_mask"].tolist(), strict=True)
        self.prompts = [tuple(i for i, real in zip(*row, strict=True) if real) for row in rows]
        self.length, self._position = batch["input_ids"].shape[1], 0

    def forget(self, _: dict[str, torch.Tensor]) -> None:
        """A batch that is not trained on: its completions are scored as they are."""
        self.prompts = []

    def take(self, number: int) -> list[Prompt]:
        """The prompts of the next `number` completions that are scored."""
        found = self.prompts[self._position : self._position + number]
        self._position += number
        assert len(found) == number, "more completions were scored than there are prompts in the batch"
        return found


class Offline:
    """A baseline scored before training: the mean score of some completions of each prompt."""

    def __init__(self, scores: dict[Prompt, list[float]], weight: float = 1.0):
        means = {prompt: float(np.mean(values)) for prompt, values in scores.items()}
        self._overall, self._weight, self._means = float(np.mean(list(means.values()))), weight, means

    def __call__(self, prompts: list[Prompt], scores: torch.Tensor) -> torch.Tensor:
        means = scores.new_tensor([self._means[prompt] for prompt in prompts])
        return self._weight * means + (1 - self._weight) * self._overall


class LeaveOneOut:
    """The mean score of the other completions of the same prompt; completions come in groups of `group`."""

    def __init__(self, group: int, weight: float = 1.0):
        self._group, self._weight = group, weight

    def __call__(self, prompts: list[Prompt], scores: torch.Tensor) -> torch.Tensor:
        groups = scores.view(-1, self._group)
        totals = groups.sum(1, keepdim=True)
        means = (totals - groups) / (self._group - 1)
        if len(scores) == self._group:  # no other prompt to shrink toward, and 0 is no score's place
            return means.view(-1)
        # Toward the mean of the other prompts: a mean that holds the score itself would not be a baseline.
        others = (totals.sum() - totals) / (len(scores) - self._group)
        return (self._weight * means + (1 - self._weight) * others).view(-1)


def reliability(icc: float, number: int) -> float:
    """How much of a prompt's mean of `number` scores is the prompt's own: the weight of shrinkage (Spearman-Brown)."""
    return number * icc / (1 + (number - 1) * icc)


class _Seen(nn.Module):
    """The reward model's transformer, with its inputs kept for the score head that follows."""

    def __init__(self, transformer: nn.Module):
        super().__init__()
        self.transformer = transformer
        self.inputs: dict[str, torch.Tensor] = {}

    def forward(self, **inputs: Any) -> Any:
        self.inputs = {key: inputs[key] for key in ("input_ids", "attention_mask")}
        return self.transformer(**inputs)


class _Centred(nn.Module):
    """The reward model's score head, less the baseline of each row's prompt."""

    def __init__(self, score: nn.Module, centre: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.score, self._centre = score, centre

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.score(hidden).float()  # an offset may be far larger than what it hides
        return logits + self._centre(logits.squeeze(-1)).view(-1, 1, 1)


class CentredReward(nn.Module):
    """A reward model as PPOTrainer takes one, whose scores have a shift added and the prompt's `baseline` taken off.

    `observe()` tells what was seen since it was last called: raw and centred scores, lengths, eos, and how well the
    value model foretold the centred scores.
    """

    base_model_prefix = "transformer"

    def __init__(self, reward: Any, eos_token_id: int, shift: tuple[float, int]):
        super().__init__()
        self.config = getattr(reward, "config", None)  # DeepSpeed asks for its sizes
        self.transformer = _Seen(getattr(reward, reward.base_model_prefix))
        self.score = _Centred(reward.score, self._centre)
        self.rollout = Rollout()
        self.baseline: Baseline | None = None
        self._eos, self._shift = eos_token_id, shift
        self._rows: list[dict[str, float]] = []
        self._values: torch.Tensor | None = None

    def watch(self, value: Any) -> None:
        """Keep what the value model says of a rollout: it is asked just before the reward model."""

        def keep(_: nn.Module, __: Any, logits: torch.Tensor) -> None:
            if not torch.is_grad_enabled():
                self._values = logits.squeeze(-1).float()

        value.score.register_forward_hook(keep)

    def _centre(self, logits: torch.Tensor) -> torch.Tensor:
        """What to add to each row's scores, from the scores of all positions (rows, length)."""
        ids, mask = self.transformer.inputs["input_ids"], self.transformer.inputs["attention_mask"].bool()
        if not self.rollout.prompts:
            return torch.zeros(len(logits), device=logits.device)
        start, rows = self.rollout.length, torch.arange(len(logits), device=logits.device)
        # A completion ends before its first padding, as PPOTrainer has it.
        lengths = mask[:, start:].long().cumprod(1).sum(1)
        raw = logits[rows, start + lengths - 1]
        prompts = self.rollout.take(len(raw))
        raw = raw + raw.new_tensor([stress.added_shift(prompt, *self._shift) for prompt in prompts])
        base = torch.zeros_like(raw) if self.baseline is None else self.baseline(prompts, raw)
        ended = (mask & (ids == self._eos))[:, start:].any(1)
        for i in range(len(raw)):
            seen = {"raw": raw[i], "centred": raw[i] - base[i], "length": lengths[i], "ended": ended[i]}
            self._rows.append({key: float(value) for key, value in seen.items()} | self._foretold(i, start, lengths[i]))
        return raw - logits[rows, start + lengths - 1] - base

    def _foretold(self, row: int, start: int, length: torch.Tensor) -> dict[str, Any]:
        values = self._values
        return {"values": [] if values is None else values[row, start - 1 : start - 1 + int(length)].tolist()}

    def observe(self) -> dict[str, float]:
        """Figures of the update's completions, over all processes: nats and tokens as elsewhere."""
        rows, self._rows = gather_object(self._rows), []
        if not rows:
            return {}
        raw, centred, length, ended = (
            np.array([row[key] for row in rows]) for key in ("raw", "centred", "length", "ended")
        )
        found = {"objective/raw_scores": raw.mean(), "objective/raw_scores_sd": raw.std()}
        found |= {"objective/centred_scores": centred.mean(), "objective/centred_scores_sd": centred.std()}
        found |= {"completions/mean_length": length.mean(), "completions/missing_eos": 1 - ended.mean()}
        target = np.repeat(centred, [len(row["values"]) for row in rows])
        if len(target) and target.var() > 0:
            residual = target - np.concatenate([row["values"] for row in rows])
            found["value/explained_variance"] = 1 - residual.var() / target.var()
        return {key: float(value) for key, value in found.items()}


def offline_scores(
    ctx: StageContext, reward: Any, answers: dict[Prompt, list[Ids]], batch_size: int
) -> dict[Prompt, list[float]]:
    """Scores of completions by prompt, the same in all processes; kept in the run by prompt, scored only once."""
    names = {prompt: digest([list(prompt), ids]) for prompt, ids in answers.items()}
    file = ctx.cache / f"scores-{identity_of(ctx, ctx.stage.reward)[:16]}.json"
    kept = same_everywhere(lambda: json.loads(file.read_text()) if file.exists() else {})
    state = PartialState()
    lacking = [prompt for prompt in answers if names[prompt] not in kept]
    if lacking:
        ctx.say(f"{ctx.name}: scoring completions of {len(lacking)} prompts for the baseline")
        mine = lacking[state.process_index :: state.num_processes]
        sequences = [[*prompt, *ids] for prompt in mine for ids in answers[prompt]]
        scores = iter(scoring.score(reward, sequences, ctx.tokenizer.pad_token_id, batch_size))
        found = [(names[prompt], [next(scores) for _ in answers[prompt]]) for prompt in mine]
        kept |= dict(gather_object(found))
        if state.is_main_process:
            _keep(file, kept)
        state.wait_for_everyone()
    return {prompt: kept[names[prompt]] for prompt in answers}


def _keep(file: Path, scores: dict[str, list[float]]) -> None:
    """Add scores to those that are kept, in one step."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")  # the same for all processes, or what a killed one leaves would stay for good
    with FileLock(f"{file}.lock"):
        if file.exists():
            scores = json.loads(file.read_text()) | scores
        temporary.write_text(json.dumps(scores))
        temporary.replace(file)


def answers_of(ctx: StageContext, rows: Any, sampling: Sampling) -> dict[Prompt, list[Ids]]:
    """The completions whose scores make the offline baseline of each prompt: the parent's, or the rows' own."""
    stage, prompts = ctx.stage, rows["input_ids"][:]
    if stage.prompt_baseline == "reference":
        found: dict[Prompt, list[Ids]] = {}
        for prompt, answer in zip(prompts, rows["answer_ids"][:], strict=True):
            found.setdefault(tuple(prompt), []).append(answer)
        return found
    greedy = stage.prompt_baseline == "greedy"
    if greedy:
        sampling = dataclasses.replace(sampling, temperature=0.0)
    unique = [list(prompt) for prompt in dict.fromkeys(map(tuple, prompts))]
    number = 1 if greedy else stage.baseline_completions
    drawn = completions(ctx, stage.init, unique, sampling, number)
    return {tuple(prompt): ids for prompt, ids in zip(unique, drawn, strict=True)}
