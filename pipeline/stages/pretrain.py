"""Step 0: next-token prediction on raw text, packed; from scratch or continued from a pretrained model."""

from trl import SFTTrainer

from pipeline.context import Result, StageContext
from pipeline.fit import fit
from pipeline.models import continue_policy, from_scratch
from pipeline.schema import BASE


def run(ctx: StageContext) -> Result:
    stage, scratch = ctx.stage, ctx.config.model.scratch
    rows, eval_rows, datasets = ctx.train_and_eval_rows()
    if scratch and stage.init == BASE:
        tokenizer = ctx.tokenizer
        model = from_scratch(
            scratch.architecture,
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            dtype=ctx.config.model.dtype,
            seed=ctx.seed,
        )
    else:
        model = continue_policy(ctx.loader, ctx.start(), stage.lora, ctx.seed)
    trainer = SFTTrainer(
        model=model,
        args=ctx.training_args(),
        train_dataset=rows,
        eval_dataset=eval_rows,
        processing_class=ctx.tokenizer,
    )
    return fit(ctx, trainer, datasets)
