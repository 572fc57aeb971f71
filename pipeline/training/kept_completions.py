"""The completions that GRPOTrainer writes to files while it trains (`log_completions`): kept with the stage."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from accelerate import PartialState
from transformers import Trainer

from pipeline.config.schema import TrainingStage
from pipeline.records.stage_folder import CHECKPOINTS, COMPLETIONS
from pipeline.training.context import StageContext


def make_folder(ctx: StageContext[TrainingStage], trainer: Trainer) -> None:
    """Make the folder again that GRPOTrainer writes to.

    GRPOTrainer makes it when it is made itself. That is before the stage opens its checkpoints, and then what does not
    belong to them is removed.
    """
    if getattr(trainer, "log_completions", False) and PartialState().is_main_process:
        _written(ctx).mkdir(exist_ok=True)


def keep(ctx: StageContext[TrainingStage]) -> None:
    """Copy the files to the stage's folder, since its checkpoints go; trackers get those of the last log."""
    if not PartialState().is_main_process:
        return
    kept = ctx.folder / COMPLETIONS
    shutil.rmtree(kept, ignore_errors=True)  # of an earlier run of the stage
    if not _written(ctx).is_dir():
        return
    shutil.copytree(_written(ctx), kept)
    files = sorted(kept.glob("*.parquet"))
    if files:
        table: Any = pd.read_parquet(files[-1])  # its values are of any type
        ctx.trackers.table("completions", list(table.columns), table.to_numpy(object).tolist())


def _written(ctx: StageContext[TrainingStage]) -> Path:
    return ctx.folder / CHECKPOINTS / COMPLETIONS
