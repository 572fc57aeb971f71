"""DPO, straight from SFT on comparisons; the reference is a frozen copy of the parent."""

from typing import Any

from trl.trainer.dpo_trainer import DPOTrainer

from pipeline.config.schema import Offline
from pipeline.models.loading import continue_policy, float32_logits, load_policy, precision_kept
from pipeline.training import assertions
from pipeline.training.context import Result, StageContext
from pipeline.training.fit import fit
from pipeline.training.trainers import TokenisedRows

NUM_COMPARED = 4  # comparisons on which the policy is compared with its parent


class TokenisedDPOTrainer(TokenisedRows, DPOTrainer):
    """DPOTrainer for rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""


def run(ctx: StageContext[Offline]) -> Result:
    rows, eval_rows, datasets = ctx.rows()
    args = ctx.training_args()
    parent = ctx.start()
    lora = ctx.stage.lora
    model = continue_policy(ctx.loader, parent, lora, ctx.seed)
    float32_logits(model)
    texts = [row["prompt_ids"] + row["chosen_ids"] for row in rows.take(NUM_COMPARED).to_list()]
    expected = assertions.parent_log_probs(model, texts)
    reference = None  # with adapters TRL copies the policy's into a second one, "ref"
    if lora is None:
        reference = load_policy(ctx.loader, parent)
        float32_logits(reference)
    with precision_kept(model):
        trainer = TokenisedDPOTrainer(
            model,
            reference,
            args,
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=ctx.tokenizer,
            identity=ctx.identity,
        )
    assertions.policy_is_parent(model, texts, expected)

    def first_token() -> dict[str, Any]:
        prompts = rows.take(assertions.NUM_FIRST)["prompt_ids"][:]
        return {"first_token": assertions.first_token(trainer, prompts, ctx.tokenizer)}

    is_rounded = ctx.loader.is_rounded or trainer.accelerator.mixed_precision != "no"
    loss = assertions.initial_loss(ctx.name, trainer, "margins", ["rewards/margins"], is_rounded)
    measured = {"initial_loss": loss}
    return fit(ctx, trainer, datasets, measured, first_token)
