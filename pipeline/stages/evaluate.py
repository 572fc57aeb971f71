"""Compare policies on held-out prompts: samples, scores, win rate against the baseline, KL to it, lengths."""

import json
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from scipy import stats

from pipeline.config import functions
from pipeline.config.schema import BASE
from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling
from pipeline.models.loading import load_policy, load_reward, to_device
from pipeline.training import assertions, divergence
from pipeline.training.completions import completions, weights_of
from pipeline.training.context import Result, StageContext, write_json

Entry = dict[str, Any]  # a completion: row, ids, text, length, whether it ended, KL to the baseline in nats, scores
CONFIDENCE = 0.95
NUM_RESAMPLES = 9999


def run(ctx: StageContext) -> Result:
    stage, state = ctx.stage, PartialState()
    rows, _, datasets = ctx.rows()
    rows = rows.select(range(min(stage.num_prompts or len(rows), len(rows))))
    mine = range(state.process_index, len(rows), state.num_processes)
    sampling = Sampling(stage.temperature, stage.max_new_tokens, stage.batch_size, ctx.seed)
    table: dict[str, list[Entry]] = {}
    baseline = to_device(load_policy(ctx.loader, weights_of(ctx, stage.baseline)))
    for name in dict.fromkeys([BASE, stage.baseline, *stage.policies]):
        drawn = completions(ctx, name, rows["prompt_ids"][:], sampling)
        table[name] = _entries(ctx, name, baseline, {i: (rows[i]["prompt_ids"], drawn[i][0]) for i in mine})
    del baseline
    clear_device_cache(garbage_collection=True)
    _add_scores(ctx, rows, table)
    for name, entries in table.items():
        table[name] = sorted(gather_object(entries), key=lambda entry: entry["row"])
    metrics = {name: _summary(entries, table[stage.baseline]) for name, entries in table.items()}
    if state.is_main_process:
        _write_samples(ctx, rows, table)
        write_json(ctx.new_output / "table.json", metrics)
    datasets["data"]["used"] = len(rows)
    return Result({"baseline": stage.baseline, "policies": metrics}, datasets=datasets)


@torch.no_grad()
def _entries(ctx: StageContext, policy: str, baseline: Any, sampled: dict[int, tuple[Ids, Ids]]) -> list[Entry]:
    """Completions (`sampled`: row -> prompt, completion) with their KL to the baseline."""
    eos, entries = ctx.tokenizer.eos_token_id, []
    model = to_device(load_policy(ctx.loader, weights_of(ctx, policy)))
    prompts, drawn = ([pair[side] for pair in sampled.values()] for side in (0, 1))
    distances = divergence.kl_of_completions(model, baseline, prompts, drawn, ctx.stage.temperature)
    for row, ids, kl in zip(sampled, drawn, distances, strict=True):
        entries.append({"row": row, "ids": ids, "kl": kl, "length": len(ids), "ended": eos in ids})
    assertions.finite_values(policy, f"KL to {ctx.stage.baseline}", distances)
    del model
    clear_device_cache(garbage_collection=True)
    return entries


def _add_scores(ctx: StageContext, rows: Any, table: dict[str, list[Entry]]) -> None:
    """Put into the entries of all policies: the completion's text, the reward model's score, the judge's."""
    stage, tokenizer, judge = ctx.stage, ctx.tokenizer, None
    if stage.judge:
        judge = functions.function(stage.judge, ctx.config.folder, f"stages.{ctx.name}.judge")
    sequences = {}
    for policy, entries in table.items():
        sequences[policy] = [rows[entry["row"]]["prompt_ids"] + entry.pop("ids") for entry in entries]
    scores = _scores(ctx, [ids for of_policy in sequences.values() for ids in of_policy]) if stage.reward else {}
    for policy, entries in table.items():
        for i, entry in enumerate(entries):
            row, ids = rows[entry["row"]], sequences[policy][i]
            text = tokenizer.decode(ids[len(row["prompt_ids"]) :], skip_special_tokens=True)
            judged = None
            if judge is not None:
                where = f"row {entry['row']}, policy {policy}"
                judged = functions.judged(judge, stage.judge, row["prompt"][-1]["content"], text, where)
            entries[i] = {"completion": text, "score": scores.get(tuple(ids)), "judge": judged} | entry


def _scores(ctx: StageContext, sequences: list[Ids]) -> dict[tuple[int, ...], float]:
    """The reward model's score of each different sequence (prompt and completion).

    Beside other rows a sequence is padded otherwise, and rounding gives it another score. So it is scored once, or
    policies that say the same would win and lose against each other instead of tying.
    """
    stage = ctx.stage
    different = list(dict.fromkeys(map(tuple, sequences)))
    model = to_device(load_reward(ctx.loader, ctx.weights_of(stage.reward)))
    scores = scoring.score(model, list(map(list, different)), ctx.tokenizer.pad_token_id, stage.batch_size)
    assertions.finite_scores(stage.reward, scores)
    return dict(zip(different, scores, strict=True))


def win_rate(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Share of prompts on which we score higher, a tie counting half, with its bootstrap interval over prompts."""
    wins = np.array([(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)])
    if wins.std() == 0:  # nothing to resample: all wins, all losses or all ties
        return wins.mean(), wins.mean(), wins.mean()
    options = {"confidence_level": CONFIDENCE, "n_resamples": NUM_RESAMPLES, "method": "percentile", "rng": 0}
    interval = stats.bootstrap((wins,), np.mean, **options).confidence_interval
    return wins.mean(), interval.low, interval.high


def _summary(entries: list[Entry], baseline: list[Entry]) -> dict[str, Any]:
    summary: dict[str, Any] = {"prompts": len(entries)}
    for measure in ("kl", "length", "ended", "score", "judge"):
        ours, theirs = ([entry[measure] for entry in side] for side in (entries, baseline))
        if ours[0] is not None:
            summary[measure] = float(np.mean(ours))
        if ours[0] is not None and measure in ("score", "judge"):
            summary[f"{measure}_win_rate"] = [float(value) for value in win_rate(ours, theirs)]
    return summary


def _write_samples(ctx: StageContext, rows: Any, table: dict[str, list[Entry]]) -> None:
    """All completions side by side, one prompt a line."""
    with (ctx.new_output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            line = {"prompt": row["prompt"]}
            for name, entries in table.items():
                line[name] = {key: value for key, value in entries[i].items() if key != "row"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
