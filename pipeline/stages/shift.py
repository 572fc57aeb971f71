"""Measure what comparisons left open in a reward model: several completions of a policy for each held-out prompt."""

from typing import cast

from accelerate import PartialState
from datasets import Dataset

from pipeline.config.schema import Shift
from pipeline.data.joints import pad_id
from pipeline.models import scoring
from pipeline.models.generation import Ids, Sampling
from pipeline.models.loading import load_reward, to_device
from pipeline.records.figures import figures_of
from pipeline.shift import advice, measure, plots
from pipeline.shift.report import Comparisons, Scored
from pipeline.show import shift
from pipeline.show.screen import open_console
from pipeline.system.processes import gather_in_order, share_of
from pipeline.training import assertions
from pipeline.training.completions import completions
from pipeline.training.context import Result, StageContext, write_json
from pipeline.training.samples import write_samples


def run(ctx: StageContext[Shift]) -> Result:
    stage = ctx.stage
    assert stage.policy is not None and stage.reward is not None, "the config's references are filled in"
    rows, _, datasets = ctx.rows()
    rows = rows.take(stage.num_prompts)
    sampling = Sampling(stage.temperature, stage.max_new_tokens, stage.batch_size, ctx.seed)
    drawn = completions(ctx, stage.policy, rows["prompt_ids"][:], sampling, stage.num_completions)
    scores = _scores(ctx, stage.reward, rows["prompt_ids"][:], drawn)
    prompts = _prompts(rows, drawn, scores)
    # The reward stage has measured its margins of held-out comparisons; without any it has recorded nothing.
    comparisons = cast("Comparisons | None", ctx.record_of(stage.reward).metrics.get("held_out"))
    report = measure.measure(prompts, comparisons)
    report["advice"] = advice.advice(report)
    if PartialState().is_main_process:
        write_json(ctx.new_output / "report.json", report)
        for picture in plots.draw(report, prompts, ctx.new_output):
            ctx.trackers.image(picture.stem, picture)
        figures = figures_of(report)
        ctx.trackers.table("report", ["figure", "value"], [[name, value] for name, value in figures.items()])
        ctx.trackers.table("advice", ["advice"], [[report["advice"]]])
        texts = ([ctx.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers] for answers in drawn)
        write_samples(ctx.new_output, ({**p, "completions": t} for p, t in zip(prompts, texts, strict=True)))
        title = f"{stage.reward}: scores of {stage.policy}'s completions"
        shift.table(report, open_console(width=120), title)
        if ctx.config.smoke is None:  # a few rows say nothing about a model
            ctx.progress.note(f"{ctx.name}: {report['advice']}")
    datasets["data"] |= {"used": len(rows), "tokens": sum(map(len, rows["prompt_ids"]))}
    return Result(dict(report), datasets=datasets)


def _scores(ctx: StageContext[Shift], reward: str, prompts: list[Ids], drawn: list[list[Ids]]) -> list[list[float]]:
    """Score the completions of each prompt; the result is the same in all processes."""
    model = to_device(load_reward(ctx.loader, ctx.weights_of(reward)))
    ctx.progress.begin(f"scoring with {reward}")
    mine = share_of(range(len(prompts)))
    sequences = [prompts[i] + ids for i in mine for ids in drawn[i]]
    scores = scoring.score(model, sequences, pad_id(ctx.tokenizer), ctx.stage.batch_size)
    k = ctx.stage.num_completions
    by_prompt = gather_in_order([scores[n * k : (n + 1) * k] for n in range(len(mine))])
    assertions.finite_scores(reward, [score for of_prompt in by_prompt for score in of_prompt])
    return by_prompt


def _prompts(rows: Dataset, drawn: list[list[Ids]], scores: list[list[float]]) -> list[Scored]:
    """Describe each prompt as the report needs it; its text is the last message."""
    prompts: list[Scored] = []
    for messages, ids, answers, of_prompt in zip(rows["prompt"], rows["prompt_ids"], drawn, scores, strict=True):
        prompts.append(
            {
                "prompt": messages[-1]["content"],
                "tokens": len(ids),
                "scores": of_prompt,
                "lengths": [len(answer) for answer in answers],
            }
        )
    return prompts
