"""Step 2: a reward model from comparisons (Bradley-Terry); it starts from the SFT policy, with a new score head."""

from collections.abc import Mapping

import torch
from accelerate import PartialState
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from trl.trainer.reward_trainer import DataCollatorForPreference, RewardTrainer

from pipeline.config.schema import Offline
from pipeline.data.joints import pad_id
from pipeline.models import scoring
from pipeline.models.loading import Weights, load_reward, new_reward, precision_kept
from pipeline.records.progress import FINISHING, HELD_OUT
from pipeline.shift.calibration import calibration
from pipeline.system.processes import gather_in_order, share_of
from pipeline.training import assertions
from pipeline.training.context import Result, StageContext, write_json
from pipeline.training.fit import fit

SIDES = ("chosen_ids", "rejected_ids")
NUM_RELOADED = 8  # comparisons scored again after the reward model was read back from disk: the shortest of the first
NUM_LOOKED_AT = 64


def _whole(row: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """Return `chosen_ids` and `rejected_ids` with the prompt before each, the tokenised form RewardTrainer takes."""
    return {side: row["prompt_ids"] + row[side] for side in SIDES}


def run(ctx: StageContext[Offline]) -> Result:
    rows, eval_rows, datasets = ctx.rows()
    # Rows that are too long are left out already; the trainer would go through all of them once more.
    args = ctx.training_args(max_length=None, remove_unused_columns=False)
    model = new_reward(ctx.loader, ctx.start(), ctx.stage.lora, ctx.seed)
    pad = DataCollatorForPreference(pad_id(ctx.tokenizer), args.pad_to_multiple_of)
    with precision_kept(model):
        trainer = RewardTrainer(
            model,
            args,
            data_collator=lambda batch: pad(list(map(_whole, batch))),
            train_dataset=rows,
            eval_dataset=eval_rows,
            processing_class=ctx.tokenizer,
        )
    result = fit(ctx, trainer, datasets)
    if eval_rows is not None:
        margins = _margins(ctx, trainer, eval_rows)
        assertions.finite_scores(ctx.name, margins)
        if PartialState().is_main_process:
            write_json(ctx.new_output / "margins.json", margins)
        result.metrics["held_out"] = calibration(margins)
    result.metrics["reload_difference"] = _compare_reloaded(ctx, trainer, rows)
    return result


def _margins(ctx: StageContext[Offline], trainer: RewardTrainer, rows: Dataset) -> list[float]:
    """Return score(chosen) - score(rejected) of every held-out comparison, in order; the same in all processes."""
    # Without accelerate's autocast wrapper: the model read back from disk, and the one PPO scores with, have none.
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # then all processes must score the same rows
    everything = range(len(rows))
    mine = everything if sharded else share_of(everything)
    sequences = [_whole(rows[i])[side] for i in mine for side in SIDES]
    size = trainer.args.per_device_eval_batch_size
    batches = [sequences[start : start + size] for start in range(0, len(sequences), size)]
    scores: list[float] = []
    for batch in ctx.progress.each(batches, HELD_OUT):
        scores += scoring.score(model, batch, pad_id(ctx.tokenizer), size)
    ctx.progress.begin(FINISHING)
    margins = [chosen - rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
    return margins if sharded else gather_in_order(margins)


def _compare_reloaded(ctx: StageContext[Offline], trainer: RewardTrainer, rows: Dataset) -> float:
    """Return the largest difference between the scores of the trained model and of the saved one.

    All processes score (the weights may be sharded); the main one reads the saved model back. The trainer can train no
    more after that.
    """
    pairs = [_whole(row) for row in rows.take(NUM_LOOKED_AT).to_list()]
    pairs.sort(key=lambda pair: max(len(pair[side]) for side in SIDES))
    sequences = [pair[side] for pair in pairs[:NUM_RELOADED] for side in SIDES]
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    model.eval()
    pad_token_id = pad_id(ctx.tokenizer)
    in_memory = scoring.score(model, sequences, pad_token_id)
    assertions.finite_scores(ctx.name, in_memory)
    PartialState().wait_for_everyone()
    if not PartialState().is_main_process:
        return 0.0
    _make_room(trainer)
    saved = str(ctx.new_output)
    weights = Weights(saved) if ctx.stage.lora is None else Weights(ctx.weights_of(ctx.name).full, saved)
    reloaded = load_reward(ctx.loader, weights).to(trainer.accelerator.device)
    from_disk = scoring.score(reloaded, sequences, pad_token_id)
    return assertions.same_scores(in_memory, from_disk, 1e-5 * max(1.0, max(in_memory) - min(in_memory)))


def _make_room(trainer: RewardTrainer) -> None:
    """Free a GPU of what has trained: it may have no room for another model. Sharded weights stay where they are."""
    if not (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        trainer.accelerator.unwrap_model(trainer.model).to("cpu")
        if isinstance(trainer.optimizer, torch.optim.Optimizer):
            trainer.optimizer.state.clear()
    clear_device_cache(garbage_collection=True)
