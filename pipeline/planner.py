"""`rlhf plan`: decide what happens to each stage, show it, and find values with which a run fits into a time."""

import math
import shlex
from collections.abc import Mapping

from rich.console import Console

from pipeline.chain import budget, other_run, run_folder, smoke, staleness
from pipeline.chain.staleness import Decision
from pipeline.config.load import load
from pipeline.config.schema import RunConfig, Taken
from pipeline.launch import devices, files
from pipeline.records import manifest
from pipeline.records.manifest import Manifest
from pipeline.show import plan, times
from pipeline.show.facts import Known, look
from pipeline.show.screen import say, show
from pipeline.system.device import Device
from pipeline.system.errors import UserError


def show_plan(config: RunConfig, console: Console, accelerate_config: str | None = None) -> None:
    """Check and print what a run would do, without writing to the run folder."""
    recorded, decisions = decide(config)
    launch_files = files.of_stages(config, list(config.stages), accelerate_config)
    pending = {one.stage: launch_files[one.stage] for one in decisions if one.run}
    chosen = devices.of_stages(config, pending)
    known = look(config, recorded, list(config.stages))
    show_decisions(config, decisions, known, chosen, launch_files, console)
    for table in known.tables:
        show(table, console)


def show_values(
    config: RunConfig,
    console: Console,
    minutes: float,
    overrides: tuple[str, ...] = (),
    accelerate_config: str | None = None,
) -> None:
    """Print values with which the stages that are to run take about so many minutes, and the command with them.

    Raises:
        UserError: if anything is wrong with config or data, or a stage's times are not known from a smoke run.
    """
    recorded, decisions = decide(config)
    pending = [one.stage for one in decisions if one.run]
    if not pending:
        say(console, "Every stage is finished: nothing can be made shorter.")
        return
    launch_files = files.of_stages(config, pending, accelerate_config)
    chosen = devices.of_stages(config, launch_files)
    processes = files.processes(launch_files)
    launches = files.digests(launch_files)
    sizes = look(config, recorded, pending).sizes
    before = times.foretold(config, sizes, chosen, processes, launches)
    if lacking := [name for name in sizes if name not in before]:
        times.say_changed(times.changed(config, chosen, processes, launches), console)
        start = shlex.join([*command(config, overrides, accelerate_config), "--smoke"])
        raise UserError(f"--minutes needs the times of {', '.join(lacking)} from a smoke run; run it first:\n  {start}")
    measured = smoke.measured_of(config)
    by_stage = {name: processes[name] for name in before}
    changes, least = budget.changes(config, sizes, measured, by_stage, 60 * minutes)
    added = [f"stages.{name}.{key}={value}" for name, one in changes.items() for key, value in one.keys.items()]
    shorter = load(config.source, (*overrides, *added))
    known = look(shorter, recorded, pending)
    after = times.foretold(shorter, known.sizes, chosen, processes, launches)
    words = {name: one.words for name, one in changes.items()}
    plan.say_warnings(known.warnings, console)
    times.say_values(config, minutes, words, before, after, console)
    if least is not None:
        again = command(config, overrides, accelerate_config)
        longer = ["rlhf", "plan", *again[2:], "--minutes", str(math.ceil(least / 60))]
        times.say_least(least, longer, console)
    say(console, f"The run:\n{shlex.join(command(config, (*overrides, *added), accelerate_config))}")


def command(config: RunConfig, overrides: tuple[str, ...], accelerate_config: str | None) -> list[str]:
    """Return the command that starts a run."""
    options = [] if accelerate_config is None else ["--accelerate-config", accelerate_config]
    return ["rlhf", "run", str(config.source), *overrides, *options]


def show_decisions(
    config: RunConfig,
    decisions: list[Decision],
    known: Known,
    chosen: dict[str, Device],
    launch_files: Mapping[str, str | None],
    console: Console,
) -> None:
    """Print what happens to each stage, how long that takes, and what is likely to be a mistake."""
    processes = files.processes({name: launch_files[name] for name in chosen})
    launches = files.digests(launch_files)
    seconds = times.foretold(config, known.sizes, chosen, processes, launches)
    plan.plan_table(config, decisions, known.stages, chosen, seconds, console)
    times.say_times(config, known, chosen, processes, seconds, console)
    times.say_changed(times.changed(config, chosen, processes, launches), console)
    plan.say_warnings(known.warnings, console)


def decide(config: RunConfig, redo: tuple[str, ...] = ()) -> tuple[Manifest, list[Decision]]:
    """Read the run's manifest and decide what happens to each stage.

    Raises:
        UserError: if a file of a stage that is skipped is not as recorded: then it is not true that nothing changed;
            or if a stage cannot be taken from another run.
    """
    recorded = run_folder.open_run(config)
    decisions = staleness.decide(config, recorded, redo)
    for decision in decisions:
        if not decision.run:
            manifest.verify(config.run_path, decision.stage, recorded.stages[decision.stage])
    taken = [one.stage for one in decisions if one.run and isinstance(config.stages[one.stage], Taken)]
    if taken:
        others = recorded.without([one.stage for one in decisions if one.run])
        _, tokenizer = run_folder.tokenizer_of(config, others)
        for name in taken:
            other_run.check(config, name, recorded, tokenizer)
    return recorded, decisions
