"""`rlhf run`: decide, check everything, then one process per stage that is not current.

A smoke run is a run of the same stages, made short.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.rule import Rule

from pipeline import planner
from pipeline.chain import budget, cuts, forecast, gate, run_folder, smoke
from pipeline.chain.staleness import Decision
from pipeline.config import graph
from pipeline.config.graph import parents, waits_for
from pipeline.config.load import load
from pipeline.config.schema import Reinforced, RunConfig
from pipeline.html import place
from pipeline.launch import devices, files, process
from pipeline.launch.stage_server import StageServer
from pipeline.records import last_run, manifest
from pipeline.records.last_run import LastRun, Planned
from pipeline.records.stage_folder import CHECKPOINTS, LOCK
from pipeline.records.states import Chain, State, this_process
from pipeline.show import plan, results, times
from pipeline.show.facts import NOTHING, look
from pipeline.show.screen import say
from pipeline.show.watch import Screen
from pipeline.system.errors import StageFailed, UserError, unknown


def select(config: RunConfig, until: str | None, only: str | None, redo: tuple[str, ...]) -> list[str]:
    """Return the stages a command is about, in order.

    Raises:
        UserError: if an option names a stage that is not there, or `redo` one that the command is not about.
    """
    for option, name in [("--until", until), ("--only", only), *(("--redo", name) for name in redo)]:
        if name is not None and name not in config.stages:
            raise UserError(f"{option}: {unknown('stage', name, config.stages)}")
    selected = list(config.stages)
    if only:
        selected = [only]
    elif until:
        selected = [*graph.ancestors(config, until, waits_for), until]
    for name in redo:
        if name not in selected:
            option = f"--only {only}" if only else f"--until {until}"
            wrong = f"{name!r} would lose its record and not run, since {option} is about {', '.join(selected)} alone"
            raise UserError(f"--redo {name}: {wrong}; leave out one of the two")
    return selected


def run(
    config: RunConfig,
    console: Console,
    overrides: tuple[str, ...] = (),
    until: str | None = None,
    only: str | None = None,
    redo: tuple[str, ...] = (),
    accelerate_config: str | None = None,
    server: StageServer | None = None,
) -> None:
    """Run what is not current. `server`: what starts stages without their imports.

    Raises:
        UserError: if anything is wrong with config, data or run folder; nothing was trained then.
        StageFailed: if a stage's process failed.
    """
    selected = select(config, until, only, redo)
    recorded, decisions = planner.decide(config, redo)
    pending = {one.stage: one.reason for one in decisions if one.run and one.stage in selected}
    _check_parents(config, decisions, selected)
    launch_files = files.of_stages(config, list(pending), accelerate_config)
    forgotten = {name for stage in redo for name in (stage, *graph.descendants(config, stage))}
    if server is not None and None in launch_files.values():
        server.warm_up()  # meanwhile this process looks at the data
    chosen = devices.of_stages(config, launch_files)
    # Forgotten before the tokenizer is looked at: if no finished stage is left, it may change.
    known = look(config, recorded.without(forgotten), list(pending)) if pending else NOTHING
    if config.smoke is None:
        about = [one for one in decisions if one.stage in selected]
        planner.show_decisions(config, about, known, chosen, launch_files, console)
    _tidy(config, [one.stage for one in decisions if not one.run], forgotten)
    planned = _planned(config, decisions, overrides, accelerate_config)
    if pending:
        with _reported_if_failed(config, console), _screen(config, decisions, selected, console) as screen:
            for number, (name, reason) in enumerate(pending.items(), 1):
                console.print(Rule(_title(config, name, number, len(pending)), align="left", style="bold cyan"))
                run_folder.open_run(config)  # before anything is written: other files may have come since
                attempt = last_run.attempt(config.run_path, planned, name)
                with gate.explained(config, name, planned.command), attempt, screen.at_work(name) as watch:
                    file = launch_files[name]
                    process.run_stage(config, name, overrides, file, reason, name in redo, console, server, watch)
    if config.smoke is None:  # after a few steps there is no result
        _report(config, console, only_if_outdated=not (pending or _settle(config, decisions, planned)))
        _show_results(config, overrides, accelerate_config, console)


def _show_results(
    config: RunConfig, overrides: tuple[str, ...], accelerate_config: str | None, console: Console
) -> None:
    recorded = run_folder.open_run(config)
    results.shift_table(recorded, console)
    results.result_table(recorded, console)
    keys = {one: one.partition("=")[0].rpartition(".")[2] for one in overrides}
    lengths = [one for one, key in keys.items() if key in budget.LENGTHS]
    if lengths:
        others = tuple(one for one, key in keys.items() if key not in (*budget.LENGTHS, *budget.BESIDE))
        times.say_short(lengths, planner.command(config, others, accelerate_config), console)
    say(console, f"Everything is in {config.run_path}; `rlhf status {config.run_path}` shows how to load it.")


def smoke_run(
    config: RunConfig,
    console: Console,
    overrides: tuple[str, ...],
    until: str | None,
    accelerate_config: str | None,
    server: StageServer,
) -> None:
    """Run every stage on a few rows in a run folder of its own, and say what the run itself will take.

    Raises:
        UserError: if anything is wrong with config or data, as in `run`.
        StageFailed: if a stage's process failed.
    """
    selected = select(config, until, None, ())
    launch_files = files.of_stages(config, selected, accelerate_config)
    if None in launch_files.values():
        server.warm_up()
    chosen = devices.of_stages(config, launch_files)
    processes = files.processes(launch_files)
    launches = files.digests(launch_files)
    known = look(config, run_folder.open_run(config), selected)
    plan.say_warnings(known.warnings, console)
    cut = cuts.of_stages(config, known.sizes, chosen, processes)
    on_gpu = any(device.kind != "cpu" for device in chosen.values())
    of_run = overrides
    overrides = (*of_run, *smoke.overrides(config, cut, on_gpu))
    short = load(config.source, overrides)
    with smoke.cleared(short):
        sizes = look(short, run_folder.open_run(short), selected).sizes
        times.say_changes(short, config, smoke.words(config, known.sizes, cut), on_gpu, console)
        run(short, console, overrides, until, accelerate_config=accelerate_config, server=server)
        measured = smoke.measure(short, config, sizes, cut, chosen, processes, launches)
        forecast.write(short.run_path, measured)
        seconds = times.foretold(config, known.sizes, chosen, processes, launches)
    start = planner.command(config, of_run, accelerate_config)
    times.say_result(config, measured, seconds, start, selected == list(config.stages), console)


@contextlib.contextmanager
def _reported_if_failed(config: RunConfig, console: Console) -> Iterator[None]:
    """Make the report of a run that a stage ends; of one that ends well it comes later."""
    try:
        yield
    except StageFailed:
        _report(config, console)
        raise


def _report(config: RunConfig, console: Console, only_if_outdated: bool = False) -> None:
    """Make the report of a run that ends."""
    if only_if_outdated and place.is_current(config.run_path):
        return
    from pipeline.html import page  # takes time, which an unchanged run does not need

    page.at_end(config.run_path, console)


def _planned(
    config: RunConfig, decisions: list[Decision], overrides: tuple[str, ...], accelerate_config: str | None
) -> LastRun:
    """Say what this command sets out to do, for the report."""
    stages: dict[str, Planned] = {}
    for decision in decisions:
        stage = config.stages[decision.stage]
        roles = parents(stage)
        if isinstance(stage, Reinforced) and stage.shift is not None:
            roles["shift"] = stage.shift  # its gate reads it
        reason = decision.reason if decision.run else None
        stages[decision.stage] = Planned(type=stage.type, parents=roles, reason=reason)
    return LastRun(
        started=last_run.now(),
        command=planner.command(config, overrides, accelerate_config),
        folder=str(Path.cwd()),
        config=config.source.read_text(encoding="utf-8", errors="replace"),
        stages=stages,
    )


def _screen(config: RunConfig, decisions: list[Decision], selected: list[str], console: Console) -> Screen:
    return Screen(console, _chain(config, decisions), config.run_path, selected)


def _settle(config: RunConfig, decisions: list[Decision], planned: LastRun) -> bool:
    """Put right what commands that were taken back have left of stages that are current; tell whether there was any."""
    has_changed = last_run.settle(config.run_path, planned)
    if has_changed:
        _chain(config, decisions).write(config.run_path)
    return has_changed


def _chain(config: RunConfig, decisions: list[Decision]) -> Chain:
    """Return the states of all stages, also of those that the command is not about."""
    found: dict[str, State] = {one.stage: "waiting" if one.run else "finished" for one in decisions}
    types = {name: stage.type for name, stage in config.stages.items()}
    return Chain(name=config.name, types=types, states=found, launcher=this_process())


def _title(config: RunConfig, name: str, number: int, total: int) -> str:
    stage_type = config.stages[name].type
    words = "" if stage_type == name else f" ({stage_type})"
    return f"{number}/{total}  {name}{words}"


def _tidy(config: RunConfig, finished: list[str], forgotten: set[str]) -> None:
    """Forget stages that run again. Remove what processes left that were killed as they wrote a record, or after it.

    Under the locks, since another process may be at work; what cannot be removed does no harm.
    """
    with contextlib.suppress(OSError):
        manifest.remove_partial(config.run_path)
    for name in finished:
        folder = config.run_path / name
        if not (folder / CHECKPOINTS).is_dir():
            continue
        with contextlib.suppress(OSError, Timeout), FileLock(folder / LOCK).acquire(timeout=0):
            if name in run_folder.open_run(config).stages:
                shutil.rmtree(folder / CHECKPOINTS)
    if forgotten:
        manifest.drop(config.run_path, forgotten)


def _check_parents(config: RunConfig, decisions: list[Decision], selected: list[str]) -> None:
    """Compare what the selected stages need with what they find.

    Raises:
        UserError: if one of them needs a stage that would have to run first and is not selected.
    """
    waiting = {decision.stage: decision.reason for decision in decisions if decision.run}
    for name in selected:
        for parent in parents(config.stages[name]).values():
            if name in waiting and parent in waiting and parent not in selected:
                raise UserError(f"--only {name}: needs {parent!r} first ({waiting[parent]}); use --until {name}")
