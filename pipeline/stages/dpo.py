"""DPO, straight from SFT on comparisons; the reference is a frozen copy of the parent."""

from trl.trainer.dpo_trainer import DPOTrainer

from pipeline.config.schema import Offline
from pipeline.records.progress import FIRST_BATCH, LOADING
from pipeline.training import assertions
from pipeline.training.beside_parent import first_tokens, is_rounded, trainer_beside_parent
from pipeline.training.context import Result, StageContext
from pipeline.training.fit import fit
from pipeline.training.trainers import TokenisedRows

MARGINS = ("rewards/margins",)  # 0 before the first update


class TokenisedDPOTrainer(TokenisedRows, DPOTrainer):
    """DPOTrainer for rows of `prompt_ids`, `chosen_ids` and `rejected_ids`."""


def run(ctx: StageContext[Offline]) -> Result:
    rows, eval_rows, datasets = ctx.rows()
    args = ctx.training_args()
    trainer = trainer_beside_parent(ctx, TokenisedDPOTrainer, args, rows, eval_rows, "chosen_ids")
    ctx.progress.begin(FIRST_BATCH)
    loss = assertions.initial_loss(ctx.name, trainer, "margins", MARGINS, is_rounded(ctx, trainer))
    ctx.progress.begin(LOADING)
    return fit(ctx, trainer, datasets, {"initial_loss": loss}, lambda: first_tokens(ctx, trainer, rows))
