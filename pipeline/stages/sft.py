"""Step 1: supervised fine-tuning on demonstrations, loss on what the assistant says only by default."""

from datasets import Dataset
from trl.trainer.sft_trainer import SFTTrainer

from pipeline.config.schema import Offline
from pipeline.data.joints import eos_id
from pipeline.models.loading import continue_policy, precision_kept
from pipeline.records.progress import FIRST_TOKENS, NUM_FIRST
from pipeline.system.json_object import JsonObject
from pipeline.training import assertions
from pipeline.training.context import Result, StageContext
from pipeline.training.fit import fit


def run(ctx: StageContext[Offline]) -> Result:
    rows, eval_rows, datasets = ctx.rows()
    args = ctx.training_args()
    model = continue_policy(ctx.loader, ctx.start(), ctx.stage.lora, ctx.seed)
    with precision_kept(model):
        trainer = SFTTrainer(model, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=ctx.tokenizer)
    assert isinstance(trainer.train_dataset, Dataset), "demonstrations are never streamed"
    assertions.eos_in_labels(trainer.train_dataset, eos_id(ctx.tokenizer))

    def first_token() -> JsonObject:
        sample = rows.take(NUM_FIRST).to_list()
        prompts = [row["input_ids"][: row["completion_mask"].index(1)] for row in sample]
        ctx.progress.begin(FIRST_TOKENS)
        return {"first_token": assertions.first_token(trainer, prompts, ctx.tokenizer)}

    return fit(ctx, trainer, datasets, after_training=first_token)
