"""Compare policies on held-out prompts: samples, scores, win rate against the baseline, KL to it, lengths."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypedDict, cast

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from scipy import stats

from pipeline.config import functions
from pipeline.config.schema import BASE, Evaluate
from pipeline.data.joints import eos_id, pad_id
from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling
from pipeline.models.loading import Weights, load_reward, to_device
from pipeline.models.shared import Policy, Shared
from pipeline.records.figures import figures_of, line_of
from pipeline.records.progress import LOADING
from pipeline.shift.calibration import wilson
from pipeline.shift.estimate import LEVEL, Estimate
from pipeline.system.json_object import JsonObject
from pipeline.system.processes import gather_in_order, share_of
from pipeline.tracking.tracker import Cell
from pipeline.tracking.trackers import Trackers
from pipeline.training import assertions, divergence
from pipeline.training.completions import completions, weights_of
from pipeline.training.context import Result, StageContext, write_json
from pipeline.training.samples import write_samples

TIE = 0.5  # of a win rate
NUM_RESAMPLES = 9999


@dataclass(frozen=True)
class Sample:
    """A policy's completion of a prompt, and the KL to the baseline over its tokens, in nats."""

    ids: Ids
    kl: float


class Entry(TypedDict):
    """What is kept of a completion; `score` or `judge` is None where the stage has no reward model or no judge."""

    completion: str
    score: float | None
    judge: float | None
    kl: float
    length: int  # in tokens, eos included
    ended: bool


def run(ctx: StageContext[Evaluate]) -> Result:
    stage = ctx.stage
    assert stage.baseline is not None and stage.policies is not None, "the config's references are filled in"
    rows, _, datasets = ctx.rows()
    rows = rows.take(stage.num_prompts or len(rows))
    of_baseline = weights_of(ctx, stage.baseline)
    shared = _full(ctx, of_baseline)
    baseline = shared.policy(of_baseline)
    sampled: dict[str, list[Sample]] = {}
    for name in dict.fromkeys([BASE, stage.baseline, *stage.policies]):
        ctx.progress.begin(LOADING)
        policy = baseline if name == stage.baseline else _policy(ctx, name, shared, of_baseline.full)
        sampled[name] = _sample(ctx, name, policy, baseline, rows)
        del policy
        clear_device_cache(garbage_collection=True)  # before the next policy is loaded
    del shared, baseline
    clear_device_cache(garbage_collection=True)
    table = {name: gather_in_order(entries) for name, entries in _entries(ctx, rows, sampled).items()}
    metrics = {name: _summary(entries, table[stage.baseline]) for name, entries in table.items()}
    if PartialState().is_main_process:
        columns = zip(*table.values(), strict=True)  # the policies' entries of each prompt
        prompts = zip(rows["prompt"], columns, strict=True)
        write_samples(
            ctx.new_output,
            ({"prompt": prompt} | dict(zip(table, entries, strict=True)) for prompt, entries in prompts),
        )
        write_json(ctx.new_output / "table.json", metrics)
        _report(ctx.trackers, [messages[-1]["content"] for messages in rows["prompt"]], table, metrics)
    datasets["data"] |= {"used": len(rows), "tokens": sum(map(len, rows["prompt_ids"]))}
    return Result({"baseline": stage.baseline, "policies": metrics}, datasets=datasets)


def _report(trackers: Trackers, prompts: list[str], table: dict[str, list[Entry]], metrics: JsonObject) -> None:
    """Let trackers have the table of policies, and the completions side by side."""
    lines = {policy: figures_of(line_of(line)) for policy, line in metrics.items()}
    names = list(dict.fromkeys(name for line in lines.values() for name in line))
    trackers.table("policies", ["policy", *names], [[policy, *map(line.get, names)] for policy, line in lines.items()])
    rows: list[list[Cell]] = []
    for i, prompt in enumerate(prompts):
        for policy, entries in table.items():
            rows.append([prompt, policy, *cast("Iterable[Cell]", entries[i].values())])
    trackers.table("completions", ["prompt", "policy", *Entry.__annotations__], rows)


def _full(ctx: StageContext[Evaluate], weights: Weights) -> Shared:
    """Load full weights, without an adapter."""
    return Shared(to_device(ctx.loader.causal(weights.full)).requires_grad_(False))


def _policy(ctx: StageContext[Evaluate], name: str, shared: Shared, full: str) -> Policy:
    """Load a policy: on the full weights of the baseline, which lie at `full`, where it is an adapter on them."""
    weights = weights_of(ctx, name)
    return (shared if weights.full == full else _full(ctx, weights)).policy(weights)


@torch.no_grad()
def _sample(ctx: StageContext[Evaluate], name: str, policy: Policy, baseline: Policy, rows: Dataset) -> list[Sample]:
    """Sample a policy and measure its KL to the baseline, on this process's share of the rows."""
    stage = ctx.stage
    sampling = Sampling(stage.temperature, stage.max_new_tokens, stage.batch_size, ctx.seed)
    prompts = rows["prompt_ids"][:]
    with policy.active() as model:
        drawn = completions(ctx, name, prompts, sampling, model=model)
        mine = share_of(range(len(rows)))
        prompts = [prompts[i] for i in mine]
        answers = [drawn[i][0] for i in mine]
        ctx.progress.begin(f"measuring the KL of {name}")
        distances = divergence.kl_of_completions(model, baseline, prompts, answers, stage.temperature)
    assertions.finite_values(name, f"KL to {stage.baseline}", distances)
    return [Sample(ids, kl) for ids, kl in zip(answers, distances, strict=True)]


def _entries(ctx: StageContext[Evaluate], rows: Dataset, sampled: dict[str, list[Sample]]) -> dict[str, list[Entry]]:
    """Decode and score every policy's completions of this process's share of the rows."""
    stage = ctx.stage
    mine = share_of(range(len(rows)))
    prompts = [rows[i]["prompt_ids"] for i in mine]
    scores: dict[tuple[int, ...], float] = {}
    if stage.reward:
        sequences = []
        for samples in sampled.values():
            sequences += [prompt + sample.ids for prompt, sample in zip(prompts, samples, strict=True)]
        scores = _scores(ctx, stage.reward, sequences)
    judge = None
    if stage.judge:
        judge = functions.function(stage.judge, ctx.config.folder, f"stages.{ctx.name}.judge")
    table: dict[str, list[Entry]] = {}
    for policy, samples in sampled.items():
        table[policy] = []
        pairs = list(zip(mine, samples, strict=True))
        for i, sample in ctx.progress.each(pairs, f"judging {policy}") if judge else pairs:
            row = rows[i]
            text = str(ctx.tokenizer.decode(sample.ids, skip_special_tokens=True))
            judged = None
            if stage.judge and judge is not None:
                where = f"row {i}, policy {policy}"
                judged = functions.judged(judge, stage.judge, row["prompt"][-1]["content"], text, where)
            entry: Entry = {
                "completion": text,
                "score": scores.get(tuple(row["prompt_ids"] + sample.ids)),
                "judge": judged,
                "kl": sample.kl,
                "length": len(sample.ids),
                "ended": eos_id(ctx.tokenizer) in sample.ids,
            }
            table[policy].append(entry)
    return table


def _scores(ctx: StageContext[Evaluate], reward: str, sequences: list[Ids]) -> dict[tuple[int, ...], float]:
    """Score each different sequence (prompt and completion) with the reward model of stage `reward`.

    Beside other rows a sequence is padded otherwise, and rounding gives it another score. So it is scored once, or
    policies that say the same would win and lose against each other instead of tying.
    """
    different = list(dict.fromkeys(map(tuple, sequences)))
    ctx.progress.begin(LOADING)
    model = to_device(load_reward(ctx.loader, ctx.weights_of(reward)))
    ctx.progress.begin(f"scoring with {reward}")
    scores = scoring.score(model, list(map(list, different)), pad_id(ctx.tokenizer), ctx.stage.batch_size)
    assertions.finite_scores(reward, scores)
    return dict(zip(different, scores, strict=True))


def win_rate(ours: Sequence[float], theirs: Sequence[float]) -> Estimate:
    """Return the share of prompts on which we score higher, a tie counting half, with its interval over prompts.

    The interval is the bootstrap's. Wilson's, which a reward model's accuracy has, takes a tie for half a win and half
    a loss, although a tie does not vary. Policies of one parent tie often: where half of the prompts tie, Wilson's
    interval is 1.4 times as wide as it should be. Where all prompts are won, or all lost, the bootstrap has nothing to
    resample and would be sure after a single prompt; there the interval is Wilson's.
    """
    wins = np.array([(a > b) + TIE * (a == b) for a, b in zip(ours, theirs, strict=True)])
    share = float(wins.mean())
    if wins.std() == 0 and share == TIE:
        return Estimate(share, share, share)
    if wins.std() == 0:
        return wilson(float(wins.sum()), len(wins))
    result = stats.bootstrap(
        (wins,), np.mean, confidence_level=LEVEL, n_resamples=NUM_RESAMPLES, method="percentile", rng=0
    )
    interval = result.confidence_interval
    return Estimate(share, float(interval.low), float(interval.high))


def _text(entry: Entry) -> tuple[str, int, bool]:
    """Return what tells completions apart, beside their scores."""
    return entry["completion"], entry["length"], entry["ended"]


def _summary(entries: list[Entry], baseline: list[Entry]) -> JsonObject:
    """Average a policy's figures over prompts, and compare its scores with the baseline's."""
    summary: JsonObject = {
        "prompts": len(entries),
        "kl": float(np.mean([entry["kl"] for entry in entries])),
        "length": float(np.mean([entry["length"] for entry in entries])),
        "ended": float(np.mean([entry["ended"] for entry in entries])),
        "same": sum(_text(ours) == _text(theirs) for ours, theirs in zip(entries, baseline, strict=True)),
    }
    for measure in ("score", "judge"):
        ours = [value for entry in entries if (value := entry[measure]) is not None]
        theirs = [value for entry in baseline if (value := entry[measure]) is not None]
        if ours:
            summary[measure] = float(np.mean(ours))
            summary[f"{measure}_win_rate"] = list(win_rate(ours, theirs))
    return summary
