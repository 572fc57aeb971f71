"""Make a run short: every stage of the config on a few rows and for a few steps, in a run folder of its own.

Everything else stays as the config says. On a GPU the batches and lengths stay too, and the longest rows are among the
few, since they decide about memory. On a CPU what would take too long is cut.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from filelock import FileLock, Timeout

from pipeline.chain import forecast, run_folder
from pipeline.chain.forecast import Measured
from pipeline.chain.sizes import Size
from pipeline.config.batch_sizes import fault_of_ppo
from pipeline.config.options import effective, value_at
from pipeline.config.schema import Evaluate, Offline, Online, Options, Ppo, RunConfig, Sampled, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.records import manifest
from pipeline.records.manifest import Manifest
from pipeline.records.progress import Reader
from pipeline.records.stage_folder import LOCK, PROGRESS, SMOKE
from pipeline.system.device import Device
from pipeline.system.errors import UserError

SUFFIX = "-smoke"
STEPS = 2  # of each stage that trains; the first one warms up
OPERATIONS = 5e11  # of a step on a CPU, about: a few seconds
READ = 4e9  # parameters that a CPU reads to sample a completion: as many seconds, about
FEWEST = 2  # completions of an update, and prompts that are sampled
SHORTEST = 16  # tokens of a completion, and of a packed sequence
FILES = ("cache", "tokenizer", "manifest.json", "chain.json", "last_run.json", "report.html", SMOKE)  # of a run folder


@dataclass
class Cut:
    """Say how a stage is made short: options of `training:`, keys of its own, and the rows that it gets.

    `rows`: of each of its datasets; a stream is read as far as it is needed. `batch`: the rows of a batch on one
    device. `new_tokens`: the longest completion; None: it samples none.
    """

    options: Options = field(default_factory=dict)
    keys: Options = field(default_factory=dict)
    rows: int = 1
    batch: int = 1
    new_tokens: int | None = None


def cut(
    config: RunConfig, sizes: Mapping[str, Size], devices: Mapping[str, Device], processes: Mapping[str, int]
) -> dict[str, Cut]:
    """Say for each stage of `sizes` how it is made short."""
    parameters = max((size.parameters for size in sizes.values()), default=0)
    cuts: dict[str, Cut] = {}
    for name, size in sizes.items():
        stage = config.stages[name]
        limits = _Limits(parameters, devices[name].kind != "cpu")
        if isinstance(stage, Sampled):
            cuts[name] = _cut_sampled(config, stage, size, limits, processes[name])
            continue
        assert isinstance(stage, TrainingStage), "a stage samples or trains"
        options = effective(stage.kind, stage.training)
        if isinstance(stage, Ppo):
            cuts[name] = _cut_ppo(stage, options, size, limits, processes[name])
        elif isinstance(stage, Online):
            cuts[name] = _cut_online(options, size, limits, processes[name])
        else:
            cuts[name] = _cut_offline(stage, options, size, limits, processes[name])
        cuts[name].options |= {"report_to": "none", "logging_strategy": "steps", "logging_steps": 1}
        if isinstance(stage, Ppo):
            del cuts[name].options["logging_strategy"]
    return cuts


@dataclass(frozen=True)
class _Limits:
    """Hold what a step may cost: nothing is limited on a GPU."""

    parameters: int
    on_gpu: bool

    def rows(self, wanted: int, per_row: float, passes: float = 3, fewest: int = FEWEST) -> int:
        """Return how many rows of so many tokens a step may have; `passes`: forward passes, or as much work."""
        if self.on_gpu:
            return wanted
        affordable = int(OPERATIONS / max(2 * self.parameters * passes * per_row, 1))
        return min(wanted, max(fewest, affordable))

    def new_tokens(self, wanted: int) -> int:
        """Return how long a completion may be."""
        return wanted if self.on_gpu else min(wanted, max(SHORTEST, int(READ / max(self.parameters, 1))))


def _cut_sampled(config: RunConfig, stage: Sampled, size: Size, limits: _Limits, processes: int) -> Cut:
    new = limits.new_tokens(stage.max_new_tokens)
    rows = limits.rows(stage.batch_size, size.per_row + new, passes=4)
    own = stage.max_new_tokens
    # A report copies the length of the first evaluation, unless it has one of its own.
    copied = [other.max_new_tokens for other in config.stages.values() if isinstance(other, Evaluate)][:1] == [own]
    keys = {} if new == own or (copied and not isinstance(stage, Evaluate)) else {"max_new_tokens": new}
    return Cut(keys=keys, rows=rows * processes, batch=rows, new_tokens=new)  # a batch for each process


def _cut_offline(stage: TrainingStage, options: Options, size: Size, limits: _Limits, processes: int) -> Cut:
    changed: Options = {"max_steps": STEPS, "gradient_accumulation_steps": 1}
    is_streamed = size.rows == 0
    length: int | None = options["max_length"] if options.get("packing") or is_streamed else None
    if length is not None and not limits.on_gpu:  # of a sequence that rows are packed into
        affordable = int(OPERATIONS / max(6 * limits.parameters, 1))
        length = min(length, max(SHORTEST, affordable))
        changed["max_length"] = length
    full = options["per_device_train_batch_size"]
    batch = limits.rows(full, length or size.per_row, fewest=type_of(stage).fewest_rows)
    changed["per_device_train_batch_size"] = batch
    rows = STEPS * batch * processes
    if length is not None and not is_streamed:
        rows = -(-rows * length // max(int(size.per_row / 2), 1))  # texts of the shorter half
    if limits.on_gpu and isinstance(stage, Offline) and stage.eval_data is not None:
        rows = max(rows, options["per_device_eval_batch_size"] * processes)  # a whole batch, which decides about memory
    return Cut(changed, rows=rows, batch=batch)


def _cut_ppo(stage: Ppo, options: Options, size: Size, limits: _Limits, processes: int) -> Cut:
    new = limits.new_tokens(options["response_length"])
    passes = 5 + 6 * options["num_ppo_epochs"]  # policy and value model train; the first five sample and score
    group = stage.baseline_completions if stage.prompt_baseline == "leave_one_out" else 1
    full = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    affordable = limits.rows(full, size.per_row + new, passes)
    batch, micro = min(
        _batches_of_ppo(options, group), key=lambda sizes: (sizes[0] > affordable, abs(affordable - sizes[0]))
    )
    changed = {
        "total_episodes": STEPS * batch * processes,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": batch // micro,
        "response_length": new,
    }
    return Cut(changed, rows=STEPS * batch * processes, batch=batch, new_tokens=new)


def _batches_of_ppo(options: Options, group: int) -> Iterator[tuple[int, int]]:
    """Go through the batches of an update that PPO could have instead: its rows, and those of a micro-batch."""
    full = options["per_device_train_batch_size"]
    accumulated = options["gradient_accumulation_steps"]
    for micro in (n for n in range(1, full + 1) if full % n == 0):
        for steps in (n for n in range(1, accumulated + 1) if accumulated % n == 0):
            sizes: Any = SimpleNamespace(
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=steps,
                num_mini_batches=options["num_mini_batches"],
                whiten_rewards=options["whiten_rewards"],
            )
            batch = micro * steps
            if (fault_of_ppo(sizes) is None and batch % group == 0 and batch >= FEWEST) or batch == full * accumulated:
                yield batch, micro


def _cut_online(options: Options, size: Size, limits: _Limits, processes: int) -> Cut:
    new = limits.new_tokens(options["max_completion_length"])
    changed: Options = {"max_steps": STEPS, "max_completion_length": new}
    batch = options["per_device_train_batch_size"]
    rows = batch * options["gradient_accumulation_steps"]
    is_free = options.get("steps_per_generation") is None and options.get("generation_batch_size") is None
    affordable = limits.rows(rows, size.per_row + new, passes=6)
    if is_free and affordable < rows and processes == 1:
        group = max(FEWEST, min(affordable, options["num_generations"]))
        changed |= {"num_generations": group, "per_device_train_batch_size": group, "gradient_accumulation_steps": 1}
        batch = rows = group
    return Cut(changed, rows=STEPS * rows * processes, batch=batch, new_tokens=new)


def overrides(config: RunConfig, cuts: Mapping[str, Cut], on_gpu: bool) -> tuple[str, ...]:
    """Return what makes a run short, as the command line takes it."""
    rows = {name: one.rows for name, one in cuts.items()}
    values: dict[str, object] = {
        "name": config.name + SUFFIX,
        "run_dir": f"{config.run_path}{SUFFIX}",
        "smoke": {"rows": rows, "longest": on_gpu},
        "training.report_to": "none",
    }
    if config.gate == "stop":
        values["gate"] = "warn"
    for name, one in cuts.items():
        stage = config.stages[name]
        before = effective(stage.kind, stage.training) if isinstance(stage, TrainingStage) else {}
        for key, value in one.options.items():
            if before.get(key) != value:
                values[f"stages.{name}.training.{key}"] = value
        for key, value in one.keys.items():
            values[f"stages.{name}.{key}"] = value
    return tuple(f"{key}={json.dumps(value)}" for key, value in values.items())


def words(config: RunConfig, sizes: Mapping[str, Size], cuts: Mapping[str, Cut]) -> Iterator[list[str]]:
    """Say of each stage what is changed: its name, rows, steps, batch on a device, and the longest completion."""
    for name, one in cuts.items():
        stage = config.stages[name]
        size = sizes[name]
        options = effective(stage.kind, stage.training) if isinstance(stage, TrainingStage) else {}
        rows = "streamed" if size.rows == 0 else _of(min(one.rows, size.rows), size.rows)
        steps = _of(STEPS, size.steps) if options else ""
        batch = _of(one.batch, full_batch(stage, options))
        key = type_of(stage).new_tokens
        length = ""
        if key is not None and one.new_tokens is not None:
            length = _of(one.new_tokens, value_at(stage, key))
        yield [name, rows, steps, batch, length]


def full_batch(stage: object, options: Options) -> int:
    """Return the rows of a batch in the run: on one device, of a whole update for PPO, of prompts for what samples."""
    if isinstance(stage, Sampled):
        return stage.batch_size
    accumulated = options["gradient_accumulation_steps"] if isinstance(stage, Ppo) else 1
    return options["per_device_train_batch_size"] * accumulated


def _of(part: int, whole: int) -> str:
    return f"{part:,}" if part == whole else f"{part:,} of {whole:,}"


def clear(config: RunConfig) -> None:
    """Remove what an earlier smoke run has left in its run folder, so that this one begins anew.

    It leaves an empty file of measurements there, which tells the next one that the folder is a smoke run's.

    Raises:
        UserError: if the folder is another run's, or no smoke run's, or a process is at work in it.
    """
    recorded = run_folder.open_run(config)
    folder = config.run_path
    if manifest.read(folder) is not None:
        _remove(config, recorded)
    folder.mkdir(parents=True, exist_ok=True)
    forecast.write(folder, {})


def _remove(config: RunConfig, recorded: Manifest) -> None:
    """Remove a smoke run's stages and its own files."""
    folder = config.run_path
    if not (folder / SMOKE).is_file():
        mend = "move it away, or give this config another `run_dir`"
        raise UserError(f"{folder} holds a run that is no smoke run, and a smoke run would remove it; {mend}")
    names = [name for name in {*config.stages, *recorded.stages} if (folder / name / LOCK).is_file()]
    for name in names:
        try:
            with FileLock(folder / name / LOCK).acquire(timeout=0):
                pass
        except Timeout:
            raise UserError(f"another process works in {folder} (stage {name!r}); wait for it or stop it") from None
    for path in (folder / name for name in (*names, *FILES)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def measure(
    config: RunConfig,
    full: RunConfig,
    sizes: Mapping[str, Size],
    cuts: Mapping[str, Cut],
    devices: Mapping[str, Device],
    processes: Mapping[str, int],
) -> dict[str, Measured]:
    """Return what a finished smoke run measured of its stages; `full` is the config of the run."""
    recorded = run_folder.open_run(config)
    measured: dict[str, Measured] = {}
    for name, size in sizes.items():
        entries = Reader(config.run_path / name / PROGRESS).read()
        record = recorded.stages[name]
        fixed, seconds, tokens = forecast.of_stage(config, name, size, record, entries, processes[name])
        stage = full.stages[name]
        options = effective(stage.kind, stage.training) if isinstance(stage, TrainingStage) else {}
        measured[name] = Measured(
            basis=forecast.basis(full, name, devices[name], processes[name]),
            duration=record.duration,
            fixed=fixed,
            seconds=seconds,
            tokens=tokens,
            batch=cuts[name].batch,
            full_batch=full_batch(stage, options),
        )
    return measured
