"""Say in plain values what `data/` must know of a run: there the config ends.

A request is what one stage asks of one dataset. `RunData` is what all of them share: where the datasets are and how
they are split.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import graph
from pipeline.config.options import effective, length_limit
from pipeline.config.schema import Data, Ppo, RunConfig, Sampled, Stage, TrainingStage
from pipeline.config.stage_types import type_of


@dataclass(frozen=True)
class Packing:
    """How a trainer packs rows into sequences of `length` tokens: by TRL's `strategy`, in so many `processes`.

    `seed`: with which rows are shuffled before they are packed; None: they are not.
    """

    length: int
    strategy: str
    processes: int
    seed: int | None


@dataclass(frozen=True)
class Request:
    """What a stage asks of a dataset.

    `rows`: the kind of row, by its name in `data/rows.py`.
    `split`: the side of the split, `graph.TRAIN` or `graph.HELD_OUT`.
    `length_option`, `max_length`: the option that limits a row's length, and the limit in tokens; None: no limit.
    `truncates`: prompts that do not fit lose their start; otherwise rows that are too long are left out. None: the
    stage cannot cut any.
    `takes_tools`: the stage can read prompts with tools.
    `unique_prompts`: every prompt counts once.
    `piece_length`: texts are cut into pieces of so many tokens; None: they stay whole.
    `packing`: how the trainer packs the rows; None: every row is a sequence of its own.
    `num_rows`: the stage gets so many of the rows that are left; None: all. `longest`: the longest is among them.
    """

    dataset: str
    rows: str
    split: str
    length_option: str
    max_length: int | None
    truncates: bool | None
    takes_tools: bool
    unique_prompts: bool
    piece_length: int | None
    packing: Packing | None = None
    num_rows: int | None = None
    longest: bool = False


@dataclass(frozen=True)
class RunData:
    """The datasets of a run.

    `sections`: the config's section of each; `folder`: where their relative paths start.
    `shared`: those that are trained on and evaluated on, so that they are split by their prompts.
    `evaluated_beside`: for each dataset the others whose held-out prompts must not be trained on.
    `thresholds`: the config's `checks`, shares of rows above which a run stops; None: never.
    """

    sections: Mapping[str, Data]
    folder: Path
    shared: frozenset[str]
    evaluated_beside: Mapping[str, tuple[str, ...]]
    thresholds: Mapping[str, float | None]


def run_data(config: RunConfig) -> RunData:
    """Return what the datasets of a run are, and how they are split."""
    return RunData(
        sections=config.data,
        folder=config.folder,
        shared=frozenset(name for name in config.data if graph.is_shared(config, name)),
        evaluated_beside={name: tuple(graph.evaluated_beside(config, name)) for name in config.data},
        thresholds=config.checks.model_dump(),
    )


def request(config: RunConfig, stage_name: str, role: str) -> Request:
    """Return what a stage asks of its dataset in a role, `data` or `eval_data`."""
    stage = config.stages[stage_name]
    rows = _kind_of_rows(stage, role)
    length_option, max_length = length_limit(stage)
    # TRL renders the prompts of RLOO and GRPO itself, in full and without tools.
    renders = not type_of(stage).trl_tokenises
    piece_length = None
    if rows == "text":
        assert isinstance(stage, TrainingStage)
        piece_length = _piece_length(stage, role)
    return Request(
        dataset=graph.datasets(stage)[role],
        rows=rows,
        split=graph.role_split(role, isinstance(stage, TrainingStage)),
        length_option=length_option,
        max_length=max_length,
        truncates=config.too_long == "truncate" if renders else None,
        takes_tools=renders,
        unique_prompts=isinstance(stage, Sampled),  # intervals are over prompts
        piece_length=piece_length,
        packing=_packing(config, stage_name) if role == "data" else None,
        num_rows=None if config.smoke is None else config.smoke.rows.get(stage_name),
        longest=config.smoke is not None and config.smoke.longest,
    )


def _kind_of_rows(stage: Stage, role: str) -> str:
    """Return the kind of row that a stage reads. Rows whose own answer is PPO's baseline must have one."""
    needs_answers = isinstance(stage, Ppo) and stage.prompt_baseline == "reference" and role == "data"
    return "demonstrations" if needs_answers else type_of(stage).rows


def _piece_length(stage: TrainingStage, role: str) -> int | None:
    """Return the length of the pieces that texts are cut into, so that the trainer cuts nothing off.

    Wrapped packing cuts texts itself.
    """
    options = effective(stage.kind, stage.training)
    packing = options["packing"]
    if role == "eval_data" and options["eval_packing"] is not None:
        packing = options["eval_packing"]
    if packing and options["packing_strategy"] == "wrapped":
        return None
    return options["max_length"]


def _packing(config: RunConfig, name: str) -> Packing | None:
    """Return how the trainer of a stage packs the rows that it learns from; None: it does not."""
    stage = config.stages[name]
    options = effective(stage.kind, stage.training) if isinstance(stage, TrainingStage) else {}
    if not options.get("packing") or options["max_length"] is None:
        return None
    seed = config.seed_of(name) if options["shuffle_dataset"] else None
    return Packing(options["max_length"], options["packing_strategy"], options["dataset_num_proc"] or 1, seed)
