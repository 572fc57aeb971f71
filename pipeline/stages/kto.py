"""KTO, straight from SFT on answers labelled good or bad; the reference is a frozen copy of the parent."""

from accelerate import PartialState
from datasets import Dataset
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from pipeline.config.schema import Offline
from pipeline.records.progress import FIRST_BATCH, LOADING
from pipeline.training import assertions
from pipeline.training.beside_parent import first_tokens, is_rounded, trainer_beside_parent
from pipeline.training.context import Result, StageContext
from pipeline.training.fit import fit
from pipeline.training.trainers import TokenisedRows

REWARDS = ("rewards/chosen", "rewards/rejected")  # 0 before the first update, each by itself
# The total weight of desirable rows over that of undesirable ones: Eq. 8 of the KTO paper (arXiv 2402.01306).
BALANCED = (1.0, 4 / 3)


class TokenisedKTOTrainer(TokenisedRows, KTOTrainer):
    """KTOTrainer for rows of `prompt_ids`, `completion_ids`, `label` and, except for APO, `KL_completion_ids`."""


def run(ctx: StageContext[Offline]) -> Result:
    rows, eval_rows, datasets = ctx.rows()
    args = ctx.training_args()
    # KTOTrainer goes through the rows in their order; a file may have all rows of one label first.
    rows = rows.shuffle(seed=ctx.seed, keep_in_memory=True)
    _say_balance(ctx, args, rows["label"][:])
    if args.loss_type == "kto":
        size = args.per_device_train_batch_size
        with PartialState().main_process_first():
            rows = with_kl_completions(rows, size)
            eval_rows = None if eval_rows is None else with_kl_completions(eval_rows, size)
    trainer = trainer_beside_parent(ctx, TokenisedKTOTrainer, args, rows, eval_rows, "completion_ids")
    ctx.progress.begin(FIRST_BATCH)
    loss = assertions.initial_loss(ctx.name, trainer, "rewards", REWARDS, is_rounded(ctx, trainer))
    ctx.progress.begin(LOADING)
    return fit(ctx, trainer, datasets, {"initial_loss": loss}, lambda: first_tokens(ctx, trainer, rows))


def with_kl_completions(rows: Dataset, size: int) -> Dataset:
    """Give rows `KL_completion_ids`: the completion of the row before, in blocks of `size` rows, as TRL makes them.

    The KL of policy and reference is estimated on prompts with these completions. The first row of a block gets the
    completion of the last one.
    """

    def rotate(block: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        *others, last = block["completion_ids"]
        return {"KL_completion_ids": [last, *others]}

    return rows.map(rotate, batched=True, batch_size=size, desc="Pairing rows for the KL")


def _say_balance(ctx: StageContext[Offline], args: KTOConfig, labels: list[bool]) -> None:
    """Say which weight would balance the labels, as TRL does where it prepares rows itself."""
    desirable = sum(labels) * args.desirable_weight
    undesirable = (len(labels) - sum(labels)) * args.undesirable_weight
    low, high = BALANCED
    if undesirable and low <= desirable / undesirable <= high:
        return
    ctx.say(
        f"{ctx.name}: {sum(labels)} of {len(labels)} rows are labelled true. Weighted, those are {desirable:g} against "
        f"{undesirable:g}; the paper asks for {low:g} to {high:.2f} times as much: set `desirable_weight` or "
        "`undesirable_weight`"
    )
