"""Cut what a stage of a smoke run works on: its rows, steps, batches and lengths.

On a GPU the batches and lengths stay, since they decide about memory. On a CPU what would take too long is cut.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from pipeline.chain.sizes import Size, largest
from pipeline.config.batch_sizes import batches_per_sampling, cycle, fault_of_ppo
from pipeline.config.options import effective
from pipeline.config.references import follows_evaluation
from pipeline.config.schema import Offline, Online, Options, Ppo, RunConfig, Sampled, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.system.device import Device

STEPS = 2  # of a stage that trains; the first one warms up
OPERATIONS = 5e11  # of a step on a CPU, about: a few seconds
READ = 4e9  # parameters that a CPU reads to sample a completion: as many seconds, about
FEWEST = 2  # completions of an update, and prompts that are sampled
SHORTEST = 16  # tokens of a completion, and of a packed sequence


@dataclass
class Cut:
    """Say how a stage is made short: options of `training:`, keys of its own, and the rows that it gets.

    `rows`: of each of its datasets; a stream is read as far as it is needed. `batch`: the rows of a batch on one
    device. `new_tokens`: the longest completion; None: it samples none. `steps`: of a training, or None.
    """

    options: Options = field(default_factory=dict)
    keys: Options = field(default_factory=dict)
    rows: int = 1
    batch: int = 1
    new_tokens: int | None = None
    steps: int | None = None


def of_stages(
    config: RunConfig, sizes: Mapping[str, Size], devices: Mapping[str, Device], processes: Mapping[str, int]
) -> dict[str, Cut]:
    """Say for each stage of `sizes` how it is made short."""
    parameters = largest(sizes)
    cuts: dict[str, Cut] = {}
    for name, size in sizes.items():
        stage = config.stages[name]
        limits = _Limits(parameters, devices[name].kind != "cpu")
        if isinstance(stage, Sampled):
            cuts[name] = _cut_sampled(config, name, size, limits, processes[name])
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


def _cut_sampled(config: RunConfig, name: str, size: Size, limits: _Limits, processes: int) -> Cut:
    stage = config.section(name, Sampled)
    new = limits.new_tokens(stage.max_new_tokens)
    rows = limits.rows(stage.batch_size, size.per_row + new, passes=4)
    is_cut = new == stage.max_new_tokens or follows_evaluation(config, name, "max_new_tokens")
    keys = {} if is_cut else {"max_new_tokens": new}
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
    return Cut(changed, rows=rows, batch=batch, steps=STEPS)


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
    return Cut(changed, rows=STEPS * batch * processes, batch=batch, new_tokens=new, steps=STEPS)


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
    changed: Options = {"max_completion_length": new}
    batch = options["per_device_train_batch_size"]
    rows = batch * options["gradient_accumulation_steps"]
    is_free = options.get("steps_per_generation") is None and options.get("generation_batch_size") is None
    affordable = limits.rows(rows, size.per_row + new, passes=6)
    if is_free and affordable < rows and processes == 1:
        group = max(FEWEST, min(affordable, options["num_generations"]))
        changed |= {"num_generations": group, "per_device_train_batch_size": group, "gradient_accumulation_steps": 1}
        batch = rows = group
    after = options | changed
    # Completions may serve several steps: all steps after the first one are a whole cycle, which samples as often.
    steps = min(1 + cycle(after, processes), max(STEPS, size.steps))
    changed["max_steps"] = steps
    rows = max(rows, batch * batches_per_sampling(after, processes))
    return Cut(changed, rows=2 * rows * processes, batch=batch, new_tokens=new, steps=steps)


def full_batch(stage: object, options: Options) -> int:
    """Return the rows of a batch in the run: on one device, of a whole update for PPO, of prompts for what samples."""
    if isinstance(stage, Sampled):
        return stage.batch_size
    accumulated = options["gradient_accumulation_steps"] if isinstance(stage, Ppo) else 1
    return options["per_device_train_batch_size"] * accumulated
