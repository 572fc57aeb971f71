"""Compare policies on held-out prompts: samples, scores, win rate against the baseline, KL to it, lengths."""

import json
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from scipy import stats
from transformers import GenerationConfig, set_seed

from pipeline import scoring
from pipeline.context import Result, StageContext, write_json
from pipeline.lineage import root
from pipeline.models import Weights, load_policy, load_reward

Rows = list[list[int]]  # token ids
Entry = dict[str, Any]  # a completion: row, ids, text, length, whether it ended, KL to the baseline in nats, scores
CONFIDENCE = 0.95
NUM_RESAMPLES = 9999


def run(ctx: StageContext) -> Result:
    stage, state = ctx.stage, PartialState()
    rows, _, datasets = ctx.rows()
    rows = rows.select(range(min(stage.num_prompts or len(rows), len(rows))))
    mine = range(state.process_index, len(rows), state.num_processes)
    prompt_ids = [rows[i]["prompt_ids"] for i in mine]
    policies = {"base": ctx.weights(root(ctx.config))}
    policies |= {name: ctx.weights_of(name) for name in dict.fromkeys([stage.baseline, *stage.policies])}
    table: dict[str, list[Entry]] = {}
    baseline = _to_device(load_policy(ctx.loader, policies[stage.baseline]))
    for name, weights in policies.items():
        ctx.say(f"{ctx.name}: sampling {len(rows)} completions from {name}")
        samples = _sample(ctx, weights, baseline, prompt_ids)
        table[name] = [{"row": i} | entry for i, entry in zip(mine, samples, strict=True)]
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


def _to_device(model: Any) -> Any:
    if not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_loaded_in_8bit", False):
        model = model.to(PartialState().device)
    return model.eval()


@torch.no_grad()
def _sample(ctx: StageContext, weights: Weights, baseline: Any, prompts: Rows) -> list[Entry]:
    """One completion per prompt, with its KL to the baseline."""
    stage, eos, pad = ctx.stage, ctx.tokenizer.eos_token_id, ctx.tokenizer.pad_token_id
    model = _to_device(load_policy(ctx.loader, weights))
    # Every policy samples with the same random numbers, so equal policies give equal completions.
    set_seed(ctx.seed + PartialState().process_index)
    options = {"do_sample": True, "temperature": stage.temperature, "top_k": 0, "top_p": 1.0}
    options |= {"max_new_tokens": stage.max_new_tokens, "eos_token_id": eos, "pad_token_id": pad}
    config = GenerationConfig(**options)
    entries: list[Entry] = []
    for start in range(0, len(prompts), stage.batch_size):
        batch = prompts[start : start + stage.batch_size]
        inputs = scoring.padded(batch, pad, PartialState().device, "left")
        output = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        completions = [row[: row.index(eos) + 1] if eos in row else row for row in output.tolist()]
        for ids, kl in zip(completions, _kl(ctx, model, baseline, batch, completions), strict=True):
            entries.append({"ids": ids, "kl": kl, "length": len(ids), "ended": eos in ids})
    del model
    clear_device_cache(garbage_collection=True)
    return entries


def _kl(ctx: StageContext, policy: Any, baseline: Any, prompts: Rows, completions: Rows) -> list[float]:
    """KL(policy || baseline) of each completion in nats: summed over its positions, exact over the vocabulary at each.

    The whole distribution at every visited position has far less variance than the log-ratio of the sampled tokens.
    """
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    inputs = scoring.padded(rows, ctx.tokenizer.pad_token_id, PartialState().device, "left")
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    p, q = (m(**inputs).logits.float().div(ctx.stage.temperature).log_softmax(-1) for m in (policy, baseline))
    per_token = (p.exp() * (p - q)).sum(-1)
    # The logits at position t - 1 are the distribution of token t; sequences end at the right edge.
    return [per_token[i, -len(c) - 1 : -1].sum().item() for i, c in enumerate(completions)]


def _add_scores(ctx: StageContext, rows: Any, table: dict[str, list[Entry]]) -> None:
    """Put into the entries of all policies: the completion's text, the reward model's score, the judge's."""
    stage, tokenizer, judge = ctx.stage, ctx.tokenizer, None
    if stage.judge:
        judge = scoring.function(stage.judge, ctx.config.folder, f"stages.{ctx.name}.judge")
    if stage.reward:
        model = _to_device(load_reward(ctx.loader, ctx.weights_of(stage.reward)))
    for entries in table.values():
        sequences = [rows[entry["row"]]["prompt_ids"] + entry.pop("ids") for entry in entries]
        scores = [None] * len(entries)
        if stage.reward:
            scores = scoring.score(model, sequences, tokenizer.pad_token_id, stage.batch_size)
        for i, entry in enumerate(entries):
            row = rows[entry["row"]]
            text = tokenizer.decode(sequences[i][len(row["prompt_ids"]) :], skip_special_tokens=True)
            judged = float(judge(row["prompt"][-1]["content"], text)) if judge else None
            entries[i] = {"completion": text, "score": scores[i], "judge": judged} | entry


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
