"""Step 1: supervised fine-tuning on demonstrations, loss on what the assistant says only by default."""

from trl import SFTTrainer

from pipeline import checks
from pipeline.context import Result, StageContext
from pipeline.fit import fit
from pipeline.models import continue_policy


def run(ctx: StageContext) -> Result:
    rows, eval_rows, datasets = ctx.rows()
    args = ctx.training_args()
    model = continue_policy(ctx.loader, ctx.start(), ctx.stage.lora, ctx.seed)
    trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=ctx.tokenizer)
    checks.eos_in_labels(trainer.train_dataset, ctx.tokenizer.eos_token_id)
    return fit(ctx, trainer, datasets)
