"""Step 0: next-token prediction on raw text, packed; from scratch or continued from a pretrained model."""

from transformers import TrainerCallback
from trl.trainer.sft_trainer import SFTTrainer

from pipeline.config.schema import BASE, Offline
from pipeline.data.bookmark import Bookmark
from pipeline.data.stream import TextStream
from pipeline.models.loading import continue_policy, from_scratch, precision_kept
from pipeline.training.context import Result, StageContext
from pipeline.training.fit import fit


def run(ctx: StageContext[Offline]) -> Result:
    scratch = ctx.config.model.scratch
    args = ctx.training_args()
    rows, eval_rows, datasets = ctx.rows()
    bookmark: Bookmark | None = None
    callbacks: list[TrainerCallback] = []
    if rows is None:
        stream = TextStream(ctx.data, ctx.stage.data, args.max_length, ctx.seed)
        bookmark = Bookmark(stream)
        rows = bookmark.dataset()
        callbacks.append(bookmark)
        # Its pieces are packed already, and it goes on by itself where a checkpoint was made.
        args.eval_packing = args.packing if args.eval_packing is None else args.eval_packing
        args.packing = False
        args.ignore_data_skip = True
    if scratch and ctx.stage.init == BASE:
        model = from_scratch(scratch.architecture, ctx.tokenizer, ctx.loader.dtype, ctx.seed)
    else:
        model = continue_policy(ctx.loader, ctx.start(), ctx.stage.lora, ctx.seed)
    with precision_kept(model):
        trainer = SFTTrainer(
            model,
            args,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=ctx.tokenizer,
            callbacks=callbacks,
        )
    result = fit(ctx, trainer, datasets)
    if bookmark is not None:
        result.datasets["data"] |= bookmark.record()
    return result
