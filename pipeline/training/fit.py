"""The tail every training stage shares: resume, train, look at what trained, save, collect metrics."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, Trainer, TrainingArguments

from pipeline.config.lineage import place_of
from pipeline.config.schema import TrainingStage
from pipeline.config.stage_types import makes
from pipeline.config.type_row import POLICIES
from pipeline.models.loading import num_parameters
from pipeline.records.progress import FINISHING
from pipeline.records.stage_folder import CHECKPOINTS, HISTORY
from pipeline.system.json_object import JsonObject
from pipeline.training import assertions, checkpoints, kept_completions
from pipeline.training.context import Result, StageContext, write_json
from pipeline.training.curves import report
from pipeline.training.progress import LogOften, watch

# What of the trainer's log goes into the record.
METRICS = ("loss", "accuracy", "margin", "rewards/accuracies", "rewards/margins", "reward", "kl", "mean_token_accuracy")


def should_train(ctx: StageContext[TrainingStage], name: str) -> bool:
    """Tell whether a stage should train the parameter of this name: all, or those of its adapter."""
    return ctx.stage.lora is None or ".default." in name or name.endswith(".default")


def fit(
    ctx: StageContext[TrainingStage],
    trainer: Trainer,
    datasets: dict[str, JsonObject],
    measured: Mapping[str, Any] | None = None,
    after_training: Callable[[], JsonObject] | None = None,
) -> Result:
    """Train from the newest complete checkpoint, or from the start, and save the output.

    `measured` are metrics that the stage has measured before training. `after_training` returns metrics that can be
    measured only on the trained model; it is called before the model is saved. Both go into the record, with the
    trainer's metrics.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    assertions.trains_exactly([model], lambda name: should_train(ctx, name))
    counts = num_parameters(model)  # before FSDP or DeepSpeed takes it apart
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = assertions.fingerprint_of(trainable)
    checkpoint = newest_checkpoint(ctx)
    kept_completions.make_folder(ctx, trainer)
    report(trainer, ctx.trackers)
    trainer.add_callback(checkpoints.MarkComplete())
    watch(trainer, ctx.progress)
    if not ctx.stage.training.keys() & {"logging_steps", "logging_strategy"}:
        trainer.add_callback(LogOften())
    # Streamed rows have no length, so that the trainer cannot do without `max_steps`.
    if checkpoint is not None and checkpoints.is_last(checkpoint) and hasattr(trainer.train_dataset, "__len__"):
        load_only(trainer.args)
    # Before the first step, with the model as its launcher wraps it; a checkpoint's log has it already.
    measures_start = trainer.args.eval_on_start or makes(ctx.stage, *POLICIES)
    trainer.args.eval_on_start = measures_start and trainer.eval_dataset is not None and checkpoint is None
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if checkpoint is None and not _has_nothing_to_learn(ctx, trainer):
        assertions.has_trained(before, trainable, ctx.name)
    metrics = {**(measured or {}), **({} if after_training is None else after_training())}
    ctx.progress.begin(FINISHING)
    metrics |= first_and_last(trainer.state.log_history, {name: name for name in METRICS})
    metrics |= _held_out(ctx, trainer)
    metrics["steps"] = trainer.state.global_step
    assertions.finite_weights(ctx.name, trainable)
    _save(ctx, trainer)
    save_log(ctx, trainer)
    kept_completions.keep(ctx)
    return Result(metrics, counts, datasets, checkpoints.step_of(checkpoint) if checkpoint else None)


def _has_nothing_to_learn(ctx: StageContext[TrainingStage], trainer: Trainer) -> bool:
    """Tell of a smoke run whether its few steps may teach nothing; say so if all completions had equal rewards."""
    if ctx.config.smoke is None:
        return False
    if trainer.accelerator.scaler is not None:
        return True  # fp16 leaves out the first steps, until the loss is scaled as it should be
    shares = [entry["frac_reward_zero_std"] for entry in trainer.state.log_history if "frac_reward_zero_std" in entry]
    if not shares or min(shares) < 1:
        return False
    ctx.say(f"{ctx.name}: all completions of each prompt had equal rewards in these few steps, so nothing was learned")
    return True


def load_only(args: TrainingArguments) -> None:
    """Let `train` load the checkpoint of a training that is complete, and make no step.

    `train` must still be called, since only it loads a checkpoint. With its number of steps it would make one more.
    """
    args.max_steps = -1
    args.num_train_epochs = 0


def _held_out(ctx: StageContext[TrainingStage], trainer: Trainer) -> JsonObject:
    """Measure the trained model on `eval_data`; a policy's loss before training is in the log."""
    if trainer.eval_dataset is None:
        return {}
    metrics = {}
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    if losses and makes(ctx.stage, *POLICIES):
        metrics["initial_eval_loss"] = losses[0]
    for name, value in trainer.evaluate().items():
        if not name.endswith(("_runtime", "_per_second", "epoch")):
            metrics[name] = value
    return metrics


def newest_checkpoint(ctx: StageContext[TrainingStage]) -> Path | None:
    """Find the checkpoint to go on from, and say which one it is, or why there is none."""
    folder = ctx.folder / CHECKPOINTS
    state = PartialState()
    if state.is_main_process and checkpoints.open_folder(folder, ctx.identity, state.num_processes):
        ctx.say(f"{ctx.name}: config or inputs changed since its checkpoints were made; starting from the beginning")
    state.wait_for_everyone()
    checkpoint, messages = checkpoints.newest_complete(folder)
    for message in messages:
        ctx.say(f"{ctx.name}: {message}")
    state.wait_for_everyone()
    if checkpoint is not None:
        ctx.say(f"{ctx.name}: resuming at step {checkpoints.step_of(checkpoint)} from {checkpoint}")
    elif messages:
        ctx.say(f"{ctx.name}: no complete checkpoint is left, starting from the beginning")
    return checkpoint


def first_and_last(history: list[dict[str, float]], names: Mapping[str, str]) -> dict[str, float]:
    """Return the first and last value of what a trainer logged; `names` maps the trainer's names to the record's."""
    summary: dict[str, float] = {}
    for theirs, ours in names.items():
        values = [entry[theirs] for entry in history if theirs in entry]
        if values:
            summary[f"first_{ours}"] = values[0]
            summary[ours] = values[-1]
    return summary


def _save(ctx: StageContext[TrainingStage], trainer: Trainer) -> None:
    """Save what a stage hands on: one adapter (never the reference's copy), or the full weights.

    All processes must call it: sharded weights must be gathered by all before one of them writes.
    """
    if ctx.stage.lora is None:
        trainer.save_model(str(ctx.new_output))
        (ctx.new_output / "training_args.bin").unlink(missing_ok=True)
        return
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
    if PartialState().is_main_process:
        save_adapter(ctx, trainer.accelerator.unwrap_model(trainer.model), state)


def save_policy(ctx: StageContext[TrainingStage], model: PeftModel | PreTrainedModel) -> None:
    """Save a policy that is whole in every process: its adapter, or the full weights."""
    if not PartialState().is_main_process:
        return
    if isinstance(model, PeftModel):
        save_adapter(ctx, model)
    else:
        model.save_pretrained(ctx.new_output)


def save_log(ctx: StageContext[TrainingStage], trainer: Trainer) -> None:
    """Keep all that the trainer has logged."""
    if PartialState().is_main_process:
        write_json(ctx.folder / HISTORY, trainer.state.log_history)


def save_adapter(ctx: StageContext[TrainingStage], model: PeftModel, state: JsonObject | None = None) -> None:
    """Save the adapter alone; its config names its base: a hub id or a folder, one of the run relative to it.

    `state` are the model's weights where the processes hold only parts of them.
    """
    full = place_of(ctx.config, ctx.name).full
    config = model.peft_config["default"]
    config.base_model_name_or_path = f"../../{full}" if full else ctx.loader.base
    config.revision = None if full else ctx.loader.revision
    _sort(config)
    folder = str(ctx.new_output)
    model.save_pretrained(folder, selected_adapters=["default"], state_dict=state, save_embedding_layers=False)
    (ctx.new_output / "README.md").unlink(missing_ok=True)  # PEFT's model card template, to be filled in by hand


def _sort(config: PeftConfig) -> None:
    """Put an order to what PEFT keeps as sets, or equal runs would write other files, and their children differ."""
    for field, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, field, sorted(value))
