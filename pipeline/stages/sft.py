"""Step 1: supervised fine-tuning on demonstrations, loss on what the assistant says only by default."""

from trl import SFTTrainer

from pipeline import checks
from pipeline.context import Result, StageContext
from pipeline.fit import fit
from pipeline.models import continue_policy


def run(ctx: StageContext) -> Result:
    rows, eval_rows, datasets = ctx.rows()
    args = ctx.training_args()
    truncated = sum(len(ids) > args.max_length for ids in rows["input_ids"]) if args.max_length else 0
    datasets[ctx.stage.data]["truncated"] = truncated
    if truncated:
        cut = f"{truncated} of {len(rows)} rows are cut"
        ctx.say(f"{ctx.name}: {cut} at max_length = {args.max_length}, losing their eos")
    model = continue_policy(ctx.loader, ctx.start(), ctx.stage.lora, ctx.seed)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=ctx.tokenizer)
    checks.eos_in_labels(trainer.train_dataset, ctx.tokenizer.eos_token_id)
    return fit(ctx, trainer, datasets)
