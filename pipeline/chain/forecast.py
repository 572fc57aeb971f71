"""Foretell how long a run takes: what its smoke run measured, scaled by the tokens that each stage works on.

A stage does several kinds of work, and each is measured and scaled by itself: `training`, `held_out` (the loss on
`eval_data`), `sampling` and `scoring` of completions, `first_batch` and `first_tokens` (what is looked at before and
after training). The unit of all is a token that goes through a model together with many others. What remains is fixed:
to load models and to save them.
"""

import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.chain.basis import Basis
from pipeline.chain.sizes import Size
from pipeline.config.batch_sizes import cycle
from pipeline.config.options import effective
from pipeline.config.schema import Evaluate, Offline, Online, Options, Ppo, RunConfig, Sampled, Shift, TrainingStage
from pipeline.config.stage_types import makes
from pipeline.config.type_row import POLICIES, REWARD_MODELS
from pipeline.records.manifest import Record
from pipeline.records.progress import (
    FINISHING,
    FIRST_BATCH,
    FIRST_TOKENS,
    HELD_OUT,
    LOADING,
    NUM_FIRST,
    SAMPLING,
    TRAINING,
    Entry,
)
from pipeline.records.stage_folder import SMOKE

Work = dict[str, float]  # kind of work -> tokens
# What a sampled token costs, in tokens of a prompt: measured on a CPU, with 135M parameters and 2 to 16 rows. On a GPU
# they make a difference only for batches that are not full, since a smoke run samples there as the run does.
_SAMPLED = 5  # in a batch that goes through the model token by token
_STEP = 40  # each of these steps reads all weights, however few rows the batch has
_KINDS = {
    LOADING: None,
    FINISHING: None,
    TRAINING: "training",
    HELD_OUT: "held_out",
    FIRST_BATCH: "first_batch",
    FIRST_TOKENS: "first_tokens",
}
NUM_TOKENS = "num_tokens"  # what TRL's trainers log as the tokens since the start


class Measured(BaseModel):
    """Hold what a smoke run measured of a stage: seconds and units by kind of work, and the seconds of all else.

    `basis`: what must be the same for the figures to count. `duration`: the seconds of the whole stage.
    `batch` and `full_batch`: the rows of a batch on one device, in the smoke run and in the run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    basis: Basis
    duration: float
    fixed: float
    seconds: dict[str, float]
    units: dict[str, float]
    batch: int | None = None
    full_batch: int | None = None


def work(config: RunConfig, name: str, size: Size, processes: int = 1, evaluations: int | None = None) -> Work:
    """Return the tokens that a stage works on, in all its processes.

    `evaluations`: how often it measures its loss on `eval_data`; None: as its options say.
    """
    stage = config.stages[name]
    if isinstance(stage, Sampled):
        return _of_sampled(stage, size, processes)
    assert isinstance(stage, TrainingStage), "a stage samples or trains"
    options = effective(stage.kind, stage.training)
    done: Work = {}
    rows = size.steps * options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] * processes
    if isinstance(stage, Ppo):
        episode = size.per_row + options["response_length"]
        done["training"] = (options["total_episodes"] or options["num_train_epochs"] * size.rows) * episode
        if stage.prompt_baseline in ("sft_mean", "greedy"):
            number = stage.baseline_completions if stage.prompt_baseline == "sft_mean" else 1
            done["sampling"] = size.rows * number * episode
            done["scoring"] = done["sampling"]
    elif isinstance(stage, Online):
        if options["max_steps"] <= 0:
            rows //= processes  # the steps are those of one process, which would make all completions
        done["training"] = rows * (size.per_row + options["max_completion_length"])
    elif size.sequences == 0:  # a stream: full sequences, and nobody knows how many there are
        done["training"] = rows * options["max_length"]
    elif options["max_steps"] > 0:
        done["training"] = rows * size.tokens / size.sequences
    else:
        done["training"] = size.tokens * options["num_train_epochs"]
    if isinstance(stage, Offline):
        done["first_batch"] = min(options["per_device_train_batch_size"], size.rows) * size.per_row
        done["first_tokens"] = min(NUM_FIRST, size.rows) * size.per_row
    if isinstance(stage, Offline) and stage.eval_data is not None:
        if options["max_steps"] > 0 and size.sequences:  # it may end before its epochs do
            per_epoch = math.ceil(size.sequences / (rows / size.steps))
            options = options | {"num_train_epochs": options["max_steps"] / per_epoch}
        number = _evaluations(stage, options, size.steps, processes) if evaluations is None else evaluations
        done["held_out"] = number * size.eval_tokens
    return done


def at_least(config: RunConfig, name: str, size: Size, processes: int) -> Work:
    """Return the tokens that a stage works on however short it is, of the kinds of work that can be less."""
    stage = config.stages[name]
    if isinstance(stage, Sampled):
        return {"sampling": float(_steps(stage, 1, processes) * _STEP), "scoring": 0.0}
    done: Work = {"training": 0.0}
    if isinstance(stage, Offline) and stage.eval_data is not None:
        options = effective(stage.kind, stage.training) | {"num_train_epochs": 1, "max_steps": -1}
        done["held_out"] = _evaluations(stage, options, 0, 1) * size.eval_tokens
    return done


def _of_sampled(stage: Sampled, size: Size, processes: int) -> Work:
    """Return the work of a stage that only samples; its prompts are padded to the longest of their batch."""
    prompts = min(size.rows, stage.num_prompts or size.rows)
    together = prompts * _draws(stage)
    padded = size.longest_of(max(min(prompts, stage.batch_size), 1))
    return {
        "sampling": _steps(stage, prompts, processes) * _STEP + together * (padded + _SAMPLED * stage.max_new_tokens),
        "scoring": together * (size.per_row + stage.max_new_tokens),
    }


def _steps(stage: Sampled, prompts: int, processes: int) -> int:
    """Return the steps that batches go through, in all processes: those without a batch wait for the others."""
    batches = math.ceil(prompts / stage.batch_size)
    if isinstance(stage, Shift):  # all draws are dealt out to the processes together
        rounds = math.ceil(batches * _draws(stage) / processes)
    else:
        rounds = math.ceil(batches / processes) * _draws(stage)
    return rounds * processes * stage.max_new_tokens


def _draws(stage: Sampled) -> int:
    """Return the completions that a stage samples for each prompt."""
    if isinstance(stage, Shift):
        return stage.num_completions
    assert isinstance(stage, Evaluate), "the two stages that sample"
    return len({"base", stage.baseline, *(stage.policies or ())})


def _evaluations(stage: Offline, options: Options, steps: int, processes: int) -> int:
    """Return how often a stage looks at `eval_data`: at the end, and in between.

    A policy does so at the start too. A reward model scores every comparison once more for its record.

    `steps`: those of one process, unless `max_steps` says how many there are.
    """
    if options["max_steps"] <= 0:
        steps = math.ceil(steps / processes)
    number = 2 if makes(stage, *POLICIES, *REWARD_MODELS) else 1
    if options["eval_strategy"] == "epoch":
        number += math.ceil(options["num_train_epochs"])
    elif options["eval_strategy"] == "steps":
        every = options.get("eval_steps") or options["logging_steps"]
        number += int(steps // (every if every >= 1 else max(math.ceil(steps * every), 1)))
    return number


def of_stage(
    config: RunConfig, name: str, size: Size, record: Record, entries: Iterable[Entry], processes: int
) -> tuple[float, dict[str, float], Work]:
    """Return what a stage of a smoke run took: the fixed seconds, and by kind of work its seconds and units.

    The first step of a training warms up. It does not count if a whole cycle follows: as many steps as those in which
    RLOO and GRPO sample once and learn.
    """
    placed = [entry for entry in entries if entry.phase is not None]
    seconds: dict[str, float] = {}
    evaluations = 0
    steps = [entry.step or 0 for entry in placed if entry.phase == TRAINING]
    per_cycle = _cycle_of(config, name, processes)
    first = 1 if steps and max(steps) > per_cycle else 0
    for before, after in itertools.pairwise(placed):
        evaluations += after.phase == HELD_OUT and before.phase != HELD_OUT
        kind = _kind(before.phase)
        if before.phase == TRAINING and not (
            after.phase == TRAINING and first <= (before.step or 0) < (after.step or 0)
        ):
            continue
        if kind is not None:
            seconds[kind] = seconds.get(kind, 0.0) + after.time - before.time
    units = work(config, name, size, processes, evaluations)
    share = _share(placed, first, are_logged=per_cycle == 1)
    known = {kind: value for kind, value in seconds.items() if units.get(kind)}
    whole = sum(value / (share if kind == "training" else 1) for kind, value in known.items())
    if "held_out" not in known:  # of RL: how often it comes is not foretold
        whole += seconds.get("held_out", 0.0)
    if "training" in units:
        units["training"] *= share
    return max(record.duration - whole, 0.0), known, {kind: units[kind] for kind in known}


def _kind(phase: str | None) -> str | None:
    """Return the kind of work that a phase is; None: what does not grow with the rows."""
    name = str(phase)
    return _KINDS[name] if name in _KINDS else "sampling" if name.startswith(SAMPLING) else "scoring"


def _cycle_of(config: RunConfig, name: str, processes: int) -> int:
    """Return after how many steps all kinds of steps of a training have come."""
    stage = config.stages[name]
    return cycle(effective(stage.kind, stage.training), processes) if isinstance(stage, Online) else 1


def _share(placed: Iterable[Entry], first: int, are_logged: bool) -> float:
    """Return the share of a training's tokens that come after its step `first`; of its steps, where none are logged.

    TRL logs tokens once, when they are sampled, and not again where later steps learn from them.
    """
    steps = [entry for entry in placed if entry.phase == TRAINING and entry.step]
    if not steps or not first:
        return 1.0
    seen = {entry.step: entry.logs[NUM_TOKENS] for entry in steps if entry.logs.get(NUM_TOKENS)}
    last = max(entry.step or 0 for entry in steps)
    before = seen.get(first)
    after = seen.get(last)
    if are_logged and before is not None and after:
        return 1 - before / after
    return 1 - first / last


def seconds(measured: Measured, wanted: Work) -> float:
    """Return how long a stage takes, in seconds: each kind of work at its measured speed, and what is fixed."""
    total = measured.fixed
    for kind, taken in measured.seconds.items():
        total += taken / measured.units[kind] * wanted.get(kind, 0.0)
    return total


def operations(config: RunConfig, name: str, size: Size, parameters: int, processes: int) -> float:
    """Estimate the floating-point operations of a stage: 6 for each token and parameter, 2 where nothing trains.

    Reading weights is not among them: a token that is sampled counts as any other.
    In PPO policy and value model train on every token in each of its epochs.
    """
    stage = config.stages[name]
    done = work(config, name, size, processes)
    passes = 1
    if isinstance(stage, Ppo):
        passes = 2 * effective(stage.kind, stage.training)["num_ppo_epochs"]
    forward = done.get("scoring", 0.0) + done.get("held_out", 0.0)
    return parameters * (6 * passes * done.get("training", 0.0) + 2 * forward)


def speed() -> float:
    """Measure how many floating-point operations this process computes in a second, by products of matrices."""
    import torch  # takes seconds

    size = 1024
    left = torch.ones(size, size)
    taken: list[float] = []
    for _ in range(4):
        begun = time.perf_counter()
        torch.matmul(left, left)
        taken.append(time.perf_counter() - begun)
    return 2 * size**3 / min(taken)


def write(folder: Path, measured: Mapping[str, Measured]) -> None:
    """Write what a smoke run measured of its stages to its run folder."""
    value = {name: one.model_dump(mode="json") for name, one in measured.items()}
    (folder / SMOKE).write_text(json.dumps(value, indent=1) + "\n", encoding="ascii")


def read(folder: Path) -> dict[str, Measured]:
    """Read what a smoke run measured; what is not there or cannot be read is not known."""
    try:
        value = json.loads((folder / SMOKE).read_bytes())
        return {name: Measured.model_validate(one) for name, one in value.items()}
    except (OSError, ValueError, AttributeError, ValidationError):
        return {}
