"""Make a policy that learns from rows beside a frozen copy of its parent, as DPO and KTO do."""

from typing import TypeVar

from datasets import Dataset
from transformers import TrainingArguments

from pipeline.config.schema import TrainingStage
from pipeline.models.loading import continue_policy, float32_logits, load_policy, precision_kept
from pipeline.records.progress import FIRST_TOKENS, NUM_FIRST
from pipeline.system.json_object import JsonObject
from pipeline.training import assertions
from pipeline.training.context import StageContext
from pipeline.training.trainers import TokenisedRows

T = TypeVar("T", bound=TokenisedRows)


def trainer_beside_parent(
    ctx: StageContext[TrainingStage],
    trainer_class: type[T],
    args: TrainingArguments,
    rows: Dataset,
    eval_rows: Dataset | None,
    answer: str,
) -> T:
    """Make a trainer whose policy starts as the stage's parent, and whose reference is that parent.

    `rows` are tokenised: `prompt_ids`, the column `answer`, and what else the trainer reads.

    Raises:
        CheckFailed: if the policy does not give the parent's log-probabilities to the first rows.
    """
    parent = ctx.start()
    lora = ctx.stage.lora
    model = continue_policy(ctx.loader, parent, lora, ctx.seed)
    float32_logits(model)
    texts = [row["prompt_ids"] + row[answer] for row in rows.take(assertions.NUM_COMPARED).to_list()]
    expected = assertions.parent_log_probs(model, texts)
    reference = None  # with adapters TRL copies the policy's into a second one, "ref"
    if lora is None:
        reference = load_policy(ctx.loader, parent)
        float32_logits(reference)
    with precision_kept(model):
        trainer = trainer_class(
            model,
            reference,
            args,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=ctx.tokenizer,
            identity=ctx.identity,
        )
    assertions.policy_is_parent(model, texts, expected)
    return trainer


def is_rounded(ctx: StageContext[TrainingStage], trainer: TokenisedRows) -> bool:
    """Tell whether the trainer computes anything in less than float32."""
    has_tf32 = bool(trainer.args.tf32 or trainer.args.torch_compile)  # upstream: the second turns the first on
    return ctx.loader.is_rounded or trainer.accelerator.mixed_precision != "no" or has_tf32


def first_tokens(ctx: StageContext[TrainingStage], trainer: TokenisedRows, rows: Dataset) -> JsonObject:
    """Look at the likeliest first token of a completion, as metrics of the trained model."""
    prompts = rows.take(NUM_FIRST)["prompt_ids"][:]
    ctx.progress.begin(FIRST_TOKENS)
    return {"first_token": assertions.first_token(trainer, prompts, ctx.tokenizer)}
