"""Find values with which a run takes about as long as somebody has: fewer steps, episodes and prompts.

Stages that take longest are made shorter first, down to what still says something: 10 optimizer steps, 20 prompts. Only
where that is too long they become shorter still. Datasets stay as they are, so that the same prompts stay held out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from pipeline.chain import forecast
from pipeline.chain.forecast import Measured
from pipeline.chain.foresight import FEWEST_PROMPTS, FEWEST_STEPS
from pipeline.chain.sizes import Size
from pipeline.config.batch_sizes import batch_of, cycle
from pipeline.config.options import effective
from pipeline.config.schema import Offline, Options, Ppo, RunConfig, Sampled, TrainingStage

LENGTHS = ("max_steps", "total_episodes", "num_prompts")  # keys that it sets
BESIDE = ("gradient_accumulation_steps", "warmup_steps")  # and what it sets beside them
NOTABLY = 1.1  # times as long as somebody wants
_HALVINGS = 60  # of an interval of seconds: beyond what a float can tell apart
_ROUNDED = 1 + 1e-9  # for what is equal but for rounding


@dataclass(frozen=True)
class Lever:
    """Hold what makes a stage shorter: rows that it works on, the fewest that say something, and the seconds of a row.

    `fixed`: the seconds that do not grow with the rows. Rows are prompts where a stage samples, episodes in PPO.
    """

    rows: int
    fewest: int
    per_row: float
    fixed: float

    def at(self, limit: float) -> int:
        """Return the rows that take at most `limit` seconds, but not fewer than say something."""
        if self.per_row * self.rows <= limit * _ROUNDED:
            return self.rows
        return max(self.fewest, int(limit / self.per_row))

    def seconds(self, rows: int) -> float:
        """Return the seconds of the stage with so many rows."""
        return self.fixed + self.per_row * rows


@dataclass(frozen=True)
class Change:
    """Say what is changed of a stage, in words and as overrides of its section: key -> value."""

    words: list[str] = field(default_factory=list)
    keys: dict[str, int] = field(default_factory=dict)


def changes(
    config: RunConfig,
    sizes: Mapping[str, Size],
    measured: Mapping[str, Measured],
    processes: Mapping[str, int],
    wanted: float,
) -> tuple[dict[str, Change], float | None]:
    """Say how each stage of `processes` is changed so that all take about `wanted` seconds.

    `measured`: by a smoke run. Returns also the seconds of the least that says something, if that is longer.
    """
    found = {name: _lever(config, name, sizes[name], measured[name], number) for name, number in processes.items()}
    rows = fit(found, wanted)
    total = sum(lever.seconds(rows[name]) for name, lever in found.items())
    least = total if total > NOTABLY * wanted else None
    if least is not None:
        lower = {name: _fewest(config, name, number, steps=1, prompts=2) for name, number in processes.items()}
        shorter = {name: replace(one, fewest=min(one.fewest, lower[name])) for name, one in found.items()}
        rows = fit(shorter, wanted)
    by_stage = {name: change(config, name, lever.rows, rows[name], processes[name]) for name, lever in found.items()}
    return by_stage, least


def _lever(config: RunConfig, name: str, size: Size, measured: Measured, processes: int) -> Lever:
    """Return what makes a stage shorter."""
    work = forecast.work(config, name, size, processes)
    whole = forecast.seconds(measured, work)
    grows = whole - forecast.seconds(measured, work | forecast.at_least(config, name, size, processes))
    rows = _rows(config, name, size, processes)
    return Lever(rows, min(rows, _fewest(config, name, processes)), grows / max(rows, 1), whole - grows)


def fit(found: Mapping[str, Lever], wanted: float) -> dict[str, int]:
    """Return the rows of each stage with which all take at most `wanted` seconds, as far as its fewest rows allow.

    No stage that is made shorter has more seconds for its rows than another that is.
    """
    if sum(lever.seconds(lever.rows) for lever in found.values()) <= wanted:
        return {name: lever.rows for name, lever in found.items()}
    low = 0.0
    high = max((lever.per_row * lever.rows for lever in found.values()), default=0.0)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        total = sum(lever.seconds(lever.at(middle)) for lever in found.values())
        low, high = (low, middle) if total > wanted else (middle, high)
    return {name: lever.at(low) for name, lever in found.items()}


def change(config: RunConfig, name: str, now: int, then: int, processes: int) -> Change:
    """Say how a stage gets `then` rows instead of `now`."""
    if then >= now:
        return Change()
    stage = config.stages[name]
    if isinstance(stage, Sampled):
        full = then // stage.batch_size * stage.batch_size  # the rest of a batch takes about as long as all of it
        prompts = full if full >= FEWEST_PROMPTS else then
        return Change([f"{prompts} of {now} prompts"], {"num_prompts": prompts})
    assert isinstance(stage, TrainingStage), "a stage samples or trains"
    options = effective(stage.kind, stage.training)
    batch = batch_of(options, processes)
    if isinstance(stage, Ppo):
        episodes = max(then // batch, 1) * batch
        keys = {"training.total_episodes": episodes} | _shorter_warmup(options, episodes / now)
        return Change([f"{episodes:,} of {now:,} episodes"], keys)
    if not isinstance(stage, Offline):  # what is sampled at once is bound to the batch
        together = cycle(options, processes)  # steps that learn from the same completions
        steps = max(then // (batch * together), 1) * together
        if steps * batch >= now:
            return Change()
        keys = {"training.max_steps": steps} | _shorter_warmup(options, steps * batch / now)
        return Change([f"{steps:,} of {now // batch:,} steps"], keys)
    return _fewer_rows(options, now, then, processes)


def _fewer_rows(options: Options, now: int, then: int, processes: int) -> Change:
    """Train on fewer rows: by fewer steps, and where these would be too few, by smaller ones."""
    before = options["gradient_accumulation_steps"]
    at_once = options["per_device_train_batch_size"] * processes
    whole = math.ceil(now / (before * at_once))
    accumulated = min(before, max(then // (min(FEWEST_STEPS, whole) * at_once), 1))
    batch = accumulated * at_once
    steps = max(then // batch, 1)
    keys = {"training.max_steps": steps} | _shorter_warmup(options, steps / whole)
    if accumulated == before:
        return Change([f"{steps:,} of {whole:,} steps"], keys)
    keys["training.gradient_accumulation_steps"] = accumulated
    words = f"{steps:,} step{'s' if steps > 1 else ''} of {batch} rows instead of {whole:,} of {before * at_once}"
    return Change([words], keys)


def _shorter_warmup(options: Options, share: float) -> dict[str, int]:
    """Return the key of a warm-up of so many steps, as the share of all steps that it was; a share stays one."""
    steps = options["warmup_steps"]
    return {"training.warmup_steps": max(int(steps * min(share, 1.0)), 1)} if steps >= 1 else {}


def _rows(config: RunConfig, name: str, size: Size, processes: int) -> int:
    """Return the rows that a stage works on."""
    stage = config.stages[name]
    if isinstance(stage, Sampled):
        return min(size.rows, stage.num_prompts or size.rows)
    assert isinstance(stage, TrainingStage), "a stage samples or trains"
    options = effective(stage.kind, stage.training)
    batch = batch_of(options, processes)
    if isinstance(stage, Ppo):
        return int(options["total_episodes"] or math.ceil(options["num_train_epochs"] * size.rows / batch) * batch)
    steps = size.steps if options["max_steps"] > 0 else math.ceil(size.steps / processes)
    return steps * batch


def _fewest(
    config: RunConfig, name: str, processes: int, steps: int = FEWEST_STEPS, prompts: int = FEWEST_PROMPTS
) -> int:
    """Return the rows of so many steps of a stage, as small as they can be, or of so many prompts where it samples."""
    stage = config.stages[name]
    if isinstance(stage, Sampled):
        return prompts
    assert isinstance(stage, TrainingStage), "a stage samples or trains"
    options = effective(stage.kind, stage.training)
    if isinstance(stage, Offline):
        return steps * int(options["per_device_train_batch_size"]) * processes
    if not isinstance(stage, Ppo):
        together = cycle(options, processes)
        steps = math.ceil(steps / together) * together
    return steps * batch_of(options, processes)
