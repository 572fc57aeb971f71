"""Step 1: supervised fine-tuning on demonstrations, loss on completions only by default."""

from typing import Any

from trl import SFTTrainer

from pipeline import checks
from pipeline.context import Result, StageContext
from pipeline.fit import fit
from pipeline.models import continue_policy


def _sequences(rows: Any) -> Any:
    """`input_ids` and `completion_mask`, the tokenised form SFTTrainer takes."""
    return rows.map(
        lambda row: {
            "input_ids": row["prompt_ids"] + row["completion_ids"],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["completion_ids"]),
        },
        remove_columns=rows.column_names,
    )


def run(ctx: StageContext) -> Result:
    stage = ctx.stage
    rows, stats = ctx.rows(stage.data)
    eval_rows, eval_stats = ctx.rows(stage.eval_data) if stage.eval_data else (None, {})
    args = ctx.training_args()
    if args.max_length is not None:
        longer = sum(
            len(p) + len(c) > args.max_length for p, c in zip(rows["prompt_ids"], rows["completion_ids"], strict=True)
        )
        stats["truncated"] = longer
        if longer:
            ctx.say(
                f"{ctx.name}: {longer} of {len(rows)} rows are cut at max_length = {args.max_length} and lose their eos"
            )
    trainer = SFTTrainer(
        model=continue_policy(ctx.loader, ctx.start(), stage.lora, ctx.seed),
        args=args,
        train_dataset=_sequences(rows),
        eval_dataset=_sequences(eval_rows) if eval_rows is not None else None,
        processing_class=ctx.tokenizer,
    )
    checks.eos_in_labels(trainer.train_dataset, ctx.tokenizer.eos_token_id)
    return fit(ctx, trainer, {stage.data: stats} | ({stage.eval_data: eval_stats} if stage.eval_data else {}))
