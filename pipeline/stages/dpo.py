"""DPO, straight from SFT on comparisons; the reference is a frozen copy of the parent."""

import math
from typing import Any

import torch
from trl.trainer.dpo_trainer import DPOTrainer

from pipeline.config.schema import Offline
from pipeline.models.loading import continue_policy, float32_logits, load_policy, precision_kept
from pipeline.system.errors import UserError
from pipeline.training import assertions
from pipeline.training.context import Result, StageContext
from pipeline.training.fit import fit
from pipeline.training.trainers import dpo_trainer_class

NUM_COMPARED = 4  # comparisons on which the policy is compared with its parent
# Margins that rounding may leave where the reference's log-probabilities were computed earlier, in other batches: in
# float32, and per token where activations are rounded to 8 bits or 11 bits.
EXACT = 1e-4
ROUNDED = 0.05


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
        trainer = dpo_trainer_class(ctx.identity)(
            model, reference, args, train_dataset=rows, eval_dataset=eval_rows, processing_class=ctx.tokenizer
        )
    assertions.policy_is_parent(model, texts, expected)

    def first_token() -> dict[str, Any]:
        prompts = rows.take(assertions.NUM_FIRST)["prompt_ids"][:]
        return {"first_token": assertions.first_token(trainer, prompts, ctx.tokenizer)}

    measured = {"initial_loss": _initial_loss(ctx, trainer)}
    return fit(ctx, trainer, datasets, measured, first_token)


def _initial_loss(ctx: StageContext[Offline], trainer: DPOTrainer) -> float:
    """Compute the loss of the first rows before any update: ln 2 for the sigmoid loss, as policy and reference agree.

    Raises:
        CheckFailed: if margins are not 0: the reference is not the parent.
        UserError: if the loss is no finite number.
    """
    size = min(len(trainer.train_dataset), trainer.args.per_device_train_batch_size)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(size)])
    batch = {k: v.to(trainer.args.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
    model = trainer.model
    assert model is not None
    model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():  # as in training
        loss = trainer.compute_loss(model, batch).item()
    model.train()
    # upstream: DPOTrainer keeps the margins of a batch only here, until it logs them. The log must not count these.
    logged = trainer._metrics
    margin = max(map(abs, logged["eval"].get("rewards/margins", [0.0])))
    for metrics in logged.values():
        metrics.clear()
    if margin > _tolerance(ctx, trainer, batch):
        fault = f"margins of {margin:.4g} before the first update, expected 0 (loss {loss:.4f}; ln 2 = 0.6931)"
        raise assertions.CheckFailed(f"the reference is not the parent: {fault}")
    if not math.isfinite(loss):
        raise UserError(
            f"{ctx.name}: the loss of the first rows is {loss}; look at the parent's weights and `model.dtype`"
        )
    return loss


def _tolerance(ctx: StageContext[Offline], trainer: DPOTrainer, batch: dict[str, torch.Tensor]) -> float:
    """Return how far margins may be from 0 before the first update."""
    rounds = ctx.loader.dtype != "float32" or trainer.accelerator.mixed_precision != "no" or ctx.loader.quantization
    if not trainer.precompute_ref_logps or not rounds:
        return EXACT
    # Errors of single tokens are independent, so that those of a completion grow with the root of its length.
    longest = batch["completion_mask"].sum(1).max().item()
    return trainer.beta * ROUNDED * math.sqrt(2 * longest)
