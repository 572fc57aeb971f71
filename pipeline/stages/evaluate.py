"""Compare policies on held-out prompts: samples, scores, win rate against the baseline, KL to it, lengths."""

import gc
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from scipy import stats
from transformers import GenerationConfig, set_seed

from pipeline import scoring
from pipeline.context import Result, StageContext, write_json
from pipeline.models import Weights, load_policy, load_reward

CONFIDENCE = 0.95
NUM_RESAMPLES = 9999


@dataclass
class Sample:
    """One completion: its token ids, eos included where it was sampled, and KL to the baseline in nats."""

    ids: list[int]
    kl: float = 0.0


def run(ctx: StageContext) -> Result:
    stage = ctx.stage
    rows, dataset = ctx.rows(stage.data, stage.max_prompt_length, "max_prompt_length")
    if stage.num_prompts:
        rows = rows.select(range(min(stage.num_prompts, len(rows))))
    state = PartialState()
    mine = range(state.process_index, len(rows), state.num_processes)
    prompt_ids = [rows[i]["prompt_ids"] for i in mine]
    policies = {"base": ctx.base_weights()}
    policies |= {name: ctx.weights_of(name) for name in dict.fromkeys([stage.baseline, *stage.policies])}
    sampled: dict[str, list[Sample]] = {}
    baseline = _to_device(load_policy(ctx.loader, policies[stage.baseline]))
    for name, weights in policies.items():
        ctx.say(f"{ctx.name}: sampling {len(rows)} completions from {name}")
        sampled[name] = _sample(ctx, weights, baseline, prompt_ids)
    del baseline
    _free()
    table = {name: gather_object(_judge(ctx, rows, mine, sampled[name], scores))
             for name, scores in _scores(ctx, prompt_ids, sampled).items()}  # fmt: skip
    for entries in table.values():
        entries.sort(key=lambda entry: entry["row"])
    if state.is_main_process:
        _write_samples(ctx, rows, table)
    metrics = {name: _summary(entries, table[stage.baseline]) for name, entries in table.items()}
    if state.is_main_process:
        write_json(ctx.new_output / "table.json", metrics)
    return Result(
        {"baseline": stage.baseline, "policies": metrics}, datasets={stage.data: dataset | {"used": len(rows)}}
    )


def _to_device(model: Any) -> Any:
    if not getattr(model, "is_loaded_in_4bit", False) and not getattr(model, "is_loaded_in_8bit", False):
        model = model.to(PartialState().device)
    return model.eval()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _left_padded(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad_token_id] * (longest - len(row)) + row for row in rows], device=device)
    lengths = torch.tensor([[longest - len(row)] for row in rows], device=device)
    return ids, (torch.arange(longest, device=device)[None] >= lengths).long()


@torch.no_grad()
def _sample(ctx: StageContext, weights: Weights, baseline: Any, prompts: list[list[int]]) -> list[Sample]:
    """One completion per prompt, with its KL to the baseline."""
    stage, tokenizer = ctx.stage, ctx.tokenizer
    model = _to_device(load_policy(ctx.loader, weights))
    device = PartialState().device
    # Every policy samples with the same random numbers, so equal policies give equal completions.
    set_seed(ctx.seed + PartialState().process_index)
    config = GenerationConfig(
        do_sample=True,
        temperature=stage.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=stage.max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    samples: list[Sample] = []
    for start in range(0, len(prompts), stage.batch_size):
        batch = prompts[start : start + stage.batch_size]
        ids, mask = _left_padded(batch, tokenizer.pad_token_id, device)
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[:, ids.shape[1] :]
        completions = [_until_eos(row, tokenizer.eos_token_id, tokenizer.pad_token_id) for row in output.tolist()]
        samples += [
            Sample(c, kl) for c, kl in zip(completions, _kl(model, baseline, batch, completions, ctx), strict=True)
        ]
    del model
    _free()
    return samples


def _until_eos(ids: list[int], eos: int, pad: int) -> list[int]:
    if eos in ids:
        return ids[: ids.index(eos) + 1]
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ids


def _kl(
    policy: Any, baseline: Any, prompts: list[list[int]], completions: list[list[int]], ctx: StageContext
) -> list[float]:
    """KL(policy || baseline) of each completion in nats: summed over its positions, exact over the vocabulary at each.

    The whole distribution at every visited position has far less variance than the log-ratio of the sampled tokens.
    """
    device = PartialState().device
    rows = [p + c for p, c in zip(prompts, completions, strict=True)]
    ids, mask = _left_padded(rows, ctx.tokenizer.pad_token_id, device)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    p = policy(**inputs).logits.float().div(ctx.stage.temperature).log_softmax(-1)
    q = baseline(**inputs).logits.float().div(ctx.stage.temperature).log_softmax(-1)
    per_token = (p.exp() * (p - q)).sum(-1)
    # The logits at position t - 1 are the distribution of token t; sequences end at the right edge.
    return [per_token[i, -len(c) - 1 : -1].sum().item() for i, c in enumerate(completions)]


def _scores(
    ctx: StageContext, prompts: list[list[int]], sampled: dict[str, list[Sample]]
) -> dict[str, list[float | None]]:
    if not ctx.stage.reward:
        return {name: [None] * len(samples) for name, samples in sampled.items()}
    model = _to_device(load_reward(ctx.loader, ctx.weights_of(ctx.stage.reward)))
    return {
        name: scoring.score(
            model,
            [p + s.ids for p, s in zip(prompts, samples, strict=True)],
            ctx.tokenizer.pad_token_id,
            ctx.stage.batch_size,
        )
        for name, samples in sampled.items()
    }


def _judge(
    ctx: StageContext, rows: Any, mine: range, samples: list[Sample], scores: list[float | None]
) -> list[dict[str, Any]]:
    judge = None
    if ctx.stage.judge:
        judge = scoring.function(ctx.stage.judge, ctx.config.source.parent, f"stages.{ctx.name}.judge")
    entries = []
    for i, sample, score in zip(mine, samples, scores, strict=True):
        completion = ctx.tokenizer.decode(sample.ids, skip_special_tokens=True)
        entries.append(
            {
                "row": i,
                "completion": completion,
                "score": score,
                "judge": float(judge(rows[i]["prompt"][-1]["content"], completion)) if judge else None,
                "kl": sample.kl,
                "length": len(sample.ids),
                "ended": ctx.tokenizer.eos_token_id in sample.ids,
            }
        )
    return entries


def win_rate(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Share of prompts on which we score higher, a tie counting half, with its bootstrap interval over prompts."""
    wins = np.array([(a > b) + 0.5 * (a == b) for a, b in zip(ours, theirs, strict=True)])
    if wins.std() == 0:  # nothing to resample: all wins, all losses or all ties
        return wins.mean(), wins.mean(), wins.mean()
    interval = stats.bootstrap(
        (wins,), np.mean, confidence_level=CONFIDENCE, n_resamples=NUM_RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    return wins.mean(), interval.low, interval.high


def _summary(entries: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "prompts": len(entries),
        "kl": float(np.mean([entry["kl"] for entry in entries])),
        "length": float(np.mean([entry["length"] for entry in entries])),
        "ended": float(np.mean([entry["ended"] for entry in entries])),
    }
    for measure in ("score", "judge"):
        if entries[0][measure] is None:
            continue
        ours, theirs = ([entry[measure] for entry in side] for side in (entries, baseline))
        rate, low, high = win_rate(ours, theirs)
        summary |= {measure: float(np.mean(ours)), f"{measure}_win_rate": [float(rate), float(low), float(high)]}
    return summary


def _write_samples(ctx: StageContext, rows: Any, table: dict[str, list[dict[str, Any]]]) -> None:
    """All completions side by side, one prompt a line."""
    with (ctx.new_output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            line = {"prompt": row["prompt"]}
            for name, entries in table.items():
                line[name] = {key: value for key, value in entries[i].items() if key != "row"}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
