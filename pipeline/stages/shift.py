"""Measure what comparisons left open in a reward model: several completions of a policy for each held-out prompt."""

import json
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from pipeline.models import scoring
from pipeline.models.generation import Sampling
from pipeline.models.loading import load_reward, to_device
from pipeline.shift import advice, measure, plots
from pipeline.show import shift
from pipeline.show.screen import open_console
from pipeline.training import assertions
from pipeline.training.completions import completions
from pipeline.training.context import Result, StageContext, write_json


def run(ctx: StageContext) -> Result:
    stage, state = ctx.stage, PartialState()
    rows, _, datasets = ctx.rows()
    rows = rows.select(range(min(stage.num_prompts, len(rows))))
    sampling = Sampling(stage.temperature, stage.max_new_tokens, stage.batch_size, ctx.seed)
    prompt_ids = rows["prompt_ids"][:]
    drawn = completions(ctx, stage.policy, prompt_ids, sampling, stage.num_completions)
    model = to_device(load_reward(ctx.loader, ctx.weights_of(stage.reward)))
    mine = range(state.process_index, len(rows), state.num_processes)
    sequences = [prompt_ids[i] + ids for i in mine for ids in drawn[i]]
    scores = scoring.score(model, sequences, ctx.tokenizer.pad_token_id, stage.batch_size)
    k = stage.num_completions
    scored = [(i, scores[n * k : (n + 1) * k]) for n, i in enumerate(mine)]
    scores_of = dict(gather_object(scored))
    assertions.finite_scores(stage.reward, [score for found in scores_of.values() for score in found])
    prompts = [_prompt(rows[i], drawn[i], scores_of[i]) for i in range(len(rows))]
    margins_file = ctx.config.run_path / stage.reward / "output" / "margins.json"
    margins = json.loads(margins_file.read_text()) if margins_file.exists() else None
    report = measure.measure(prompts, margins)
    report["advice"] = advice.advice(report)
    if state.is_main_process:
        write_json(ctx.new_output / "report.json", report)
        plots.draw(report, prompts, margins, ctx.new_output)
        _write_samples(ctx, prompts, drawn)
        title = f"{stage.reward}: scores of {stage.policy}'s completions"
        shift.table(report, open_console(width=120), title)
    datasets["data"]["used"] = len(rows)
    return Result(report, datasets=datasets)


def _prompt(row: dict[str, Any], drawn: list[list[int]], scores: list[float]) -> dict[str, Any]:
    """What the report needs to know of a prompt."""
    text = row["prompt"][-1]["content"]
    return {"prompt": text, "tokens": len(row["prompt_ids"]), "scores": scores, "lengths": list(map(len, drawn))}


def _write_samples(ctx: StageContext, prompts: list[dict[str, Any]], drawn: list[list[list[int]]]) -> None:
    """Every prompt with its completions and their scores, one prompt a line."""
    with (ctx.new_output / "samples.jsonl").open("w", encoding="utf-8") as file:
        for prompt, of_prompt in zip(prompts, drawn, strict=True):
            texts = [ctx.tokenizer.decode(ids, skip_special_tokens=True) for ids in of_prompt]
            file.write(json.dumps(prompt | {"completions": texts}, ensure_ascii=False) + "\n")
