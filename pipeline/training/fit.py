"""The tail every training stage shares: resume, train, look at what trained, save, collect metrics."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import PeftConfig

from pipeline.config.lineage import place_of
from pipeline.config.stage_types import makes
from pipeline.config.type_row import POLICIES
from pipeline.models.loading import num_parameters
from pipeline.training import assertions, checkpoints
from pipeline.training.context import Result, StageContext, write_json

# What of the trainer's log goes into the record.
METRICS = ("loss", "accuracy", "margin", "rewards/accuracies", "rewards/margins", "reward", "kl", "mean_token_accuracy")


def should_train(ctx: StageContext, name: str) -> bool:
    """Whether a stage should train a parameter: those of its adapter, or all."""
    return ctx.stage.lora is None or ".default." in name or name.endswith(".default")


def fit(
    ctx: StageContext,
    trainer: Any,
    datasets: dict[str, dict[str, Any]],
    finish: Callable[[], dict[str, Any]] = dict,
    **metrics: Any,
) -> Result:
    """Train from the newest complete checkpoint, or from the start, and save the output.

    `finish` is called between the two, and returns more metrics; `metrics` are what the stage's own checks
    measured before; they go into the record with the trainer's.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    assertions.trains_exactly([model], lambda name: should_train(ctx, name))
    counts = num_parameters(model)  # before FSDP or DeepSpeed takes it apart
    trainable = [p for p in model.parameters() if p.requires_grad]
    before = assertions.fingerprint_of(trainable)
    checkpoint = _newest(ctx)
    trainer.add_callback(checkpoints.MarkComplete())
    if checkpoint is not None and checkpoints.is_last(checkpoint) and hasattr(trainer.train_dataset, "__len__"):
        trainer.args.max_steps, trainer.args.num_train_epochs = -1, 0  # or it would make one step more
    # Before the first step, with the model as its launcher wraps it; a checkpoint's log has it already.
    trainer.args.eval_on_start |= trainer.eval_dataset is not None and makes(ctx.stage, *POLICIES)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if checkpoint is None:
        assertions.has_trained(before, trainable, ctx.name)
    metrics |= finish()
    metrics |= first_and_last(trainer.state.log_history, {name: name for name in METRICS})
    if trainer.eval_dataset is not None:
        held_out = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        if held_out and makes(ctx.stage, *POLICIES):
            metrics["initial_eval_loss"] = held_out[0]
        metrics |= {k: v for k, v in trainer.evaluate().items() if not k.endswith(("_runtime", "_per_second", "epoch"))}
    metrics["steps"] = trainer.state.global_step
    assertions.finite_weights(ctx.name, trainable)
    _save(ctx, trainer)
    if PartialState().is_main_process:
        write_json(ctx.folder / "log_history.json", trainer.state.log_history)
    return Result(metrics, counts, datasets, checkpoints.step_of(checkpoint) if checkpoint else None)


def _newest(ctx: StageContext) -> Path | None:
    folder, state = ctx.folder / "checkpoints", PartialState()
    if state.is_main_process and checkpoints.open_folder(folder, ctx.identity, state.num_processes):
        ctx.say(f"{ctx.name}: config or inputs changed since its checkpoints were made; starting from the beginning")
    PartialState().wait_for_everyone()
    checkpoint, messages = checkpoints.newest_complete(folder)
    for message in messages:
        ctx.say(f"{ctx.name}: {message}")
    PartialState().wait_for_everyone()
    if checkpoint is not None:
        ctx.say(f"{ctx.name}: resuming at step {checkpoints.step_of(checkpoint)} from {checkpoint}")
    elif messages:
        ctx.say(f"{ctx.name}: no complete checkpoint is left, starting from the beginning")
    return checkpoint


def first_and_last(history: list[dict[str, Any]], names: dict[str, str]) -> dict[str, Any]:
    """First and last value of what a trainer logged; `names` maps the trainer's names to the record's."""
    summary: dict[str, Any] = {}
    for theirs, ours in names.items():
        values = [entry[theirs] for entry in history if theirs in entry]
        summary |= {f"first_{ours}": values[0], ours: values[-1]} if values else {}
    return summary


def _save(ctx: StageContext, trainer: Any) -> None:
    """Save what a stage hands on: one adapter (never the reference's copy), or the full weights."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    if ctx.stage.lora is None:
        trainer.save_model(str(ctx.new_output))
        (ctx.new_output / "training_args.bin").unlink(missing_ok=True)
        return
    # Sharded weights must be gathered by all processes before one of them writes.
    sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    state = trainer.accelerator.get_state_dict(trainer.model) if sharded else None
    if PartialState().is_main_process:
        save_adapter(ctx, model, state)


def save_adapter(ctx: StageContext, model: Any, state: dict[str, Any] | None = None) -> None:
    """Save the adapter alone; its config names its base: a hub id or a folder, one of the run relative to it."""
    full = place_of(ctx.config, ctx.name).full
    model.peft_config["default"].base_model_name_or_path = f"../../{full}" if full else ctx.loader.base
    model.peft_config["default"].revision = None if full else ctx.loader.revision
    _sort(model.peft_config["default"])
    model.save_pretrained(ctx.new_output, selected_adapters=["default"], state_dict=state, save_embedding_layers=False)
    (ctx.new_output / "README.md").unlink(missing_ok=True)  # PEFT's model card template, to be filled in by hand


def _sort(config: PeftConfig) -> None:
    """Put an order to what PEFT keeps as sets, or equal runs would write other files, and their children differ."""
    for field, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, field, sorted(value))
