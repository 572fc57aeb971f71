"""How long a run takes: foretold by its smoke run, or estimated where there is none and a CPU would take days."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rich.console import Console

from pipeline.chain import basis, budget, forecast, smoke
from pipeline.chain.forecast import Measured
from pipeline.chain.foresight import FEWEST_PROMPTS, FEWEST_STEPS
from pipeline.chain.sizes import Size, largest
from pipeline.config.schema import Reinforced, RunConfig
from pipeline.show.facts import Known
from pipeline.show.screen import Table, say, show
from pipeline.show.tables import about
from pipeline.system.device import Device

DAY = 86400
SHORTER = (60, 20)  # minutes of a run that is offered for a try
WORTH_SAYING = 1.5  # times as large a batch makes a difference


def foretold(
    config: RunConfig,
    sizes: Mapping[str, Size],
    devices: Mapping[str, Device],
    processes: Mapping[str, int],
    launches: Mapping[str, str | None],
) -> dict[str, float]:
    """Return the seconds of those stages that a smoke run of this config has measured as they are now.

    `launches`: the digest of how each stage is launched.
    """
    measured = smoke.measured_of(config)
    changes = changed(config, devices, processes, launches)
    seconds: dict[str, float] = {}
    for name in devices:
        if name in measured and name in sizes and name not in changes:
            seconds[name] = forecast.seconds(measured[name], forecast.work(config, name, sizes[name], processes[name]))
    return seconds


def changed(
    config: RunConfig,
    devices: Mapping[str, Device],
    processes: Mapping[str, int],
    launches: Mapping[str, str | None],
) -> dict[str, str]:
    """Say of each stage that a smoke run has measured otherwise than it is now what has changed since."""
    measured = smoke.measured_of(config)
    words: dict[str, str] = {}
    for name, device in devices.items():
        if name not in measured:
            continue
        now = basis.of_stage(config, name, device, processes[name], launches[name])
        differences = basis.differences(measured[name].basis, now)
        if differences:
            words[name] = "; ".join(differences)
    return words


def say_changed(changes: Mapping[str, str], console: Console) -> None:
    """Say that a smoke run's times of some stages do not count, and why; stages with one reason share a line."""
    stages: dict[str, list[str]] = {}
    for name, words in changes.items():
        stages.setdefault(words, []).append(name)
    for words, names in stages.items():
        what = f"the smoke run's times of {', '.join(names)} do not count. They were measured otherwise: {words}"
        say(console, f"warning: {what}. Run `rlhf run CONFIG --smoke` for new ones", "yellow")


def say_times(
    config: RunConfig,
    known: Known,
    devices: Mapping[str, Device],
    processes: Mapping[str, int],
    seconds: Mapping[str, float],
    console: Console,
) -> None:
    """Say how long the stages to run take in all; without a smoke run warn where a CPU would take more than a day."""
    if seconds:
        lacking = [name for name in devices if name not in seconds]
        without = f" without {', '.join(lacking)}" if lacking else ""
        say(console, f"Time: {about(sum(seconds.values()))} in all{without}, as the smoke run foretells")
    elif known.speed is not None and devices and all(device.kind == "cpu" for device in devices.values()):
        warning = slow_cpu(config, known.sizes, processes, known.speed)
        if warning is not None:
            say(console, f"warning: {warning}", "yellow")


def slow_cpu(config: RunConfig, sizes: Mapping[str, Size], processes: Mapping[str, int], speed: float) -> str | None:
    """Say that a CPU of this speed, in operations a second, would take more than a day; None: it would not."""
    parameters = largest(sizes)
    seconds = {
        name: forecast.operations(config, name, size, parameters, processes.get(name, 1)) / speed
        for name, size in sizes.items()
    }
    total = sum(seconds.values())
    if total < DAY:
        return None
    longest = sorted(seconds, key=lambda name: -seconds[name])[:3]
    most = ", ".join(f"{name} {about(seconds[name])}" for name in longest)
    return (
        f"on this CPU the run would take about {about(total)} (most of it: {most}). This is an estimate from "
        f"parameters, tokens and {speed / 1e9:.0f} billion operations a second, and may be wrong by a factor of 3. "
        f"`rlhf run CONFIG --smoke` measures it. Take a GPU, a smaller model, or fewer rows, steps or episodes"
    )


def say_changes(
    config: RunConfig, full: RunConfig, changes: Iterable[list[str]], on_gpu: bool, console: Console
) -> None:
    """Say what a smoke run changes, before it begins; `changes` are rows of a table."""
    table = Table("what is changed", ("stage", "rows", "steps", "batch", "longest completion"), right=True)
    for cells in changes:
        table.add(*cells)
    say(console, f"Smoke run of {full.name}: every stage on a few rows, in {config.run_path}", "bold")
    show(table, console)
    why = "batches and lengths decide about memory, so they stay, and the longest rows are among the few"
    if not on_gpu:
        why = "rows are of the shorter half; batches and completions are cut where a CPU would take long"
    say(console, f"On this device {why}. Trackers are off. All else is as in the config.")
    if config.gate == "warn":
        say(console, "The gate lets every model pass: after so few steps none is good. Its models are of no use.")


def say_values(
    config: RunConfig,
    minutes: float,
    changes: Mapping[str, Sequence[str]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    console: Console,
) -> None:
    """Say what is changed of each stage so that a run takes so many minutes, and how long it takes then."""
    table = Table(f"{config.name}: a run of {about(60 * minutes)}", ("stage", "change", "time", "then"))
    for name, words in changes.items():
        table.add(name, ", ".join(words) or "-", about(before[name]), about(after[name]))
    show(table, console)
    total = sum(after.values())
    say(console, f"In all {about(total)}, as the smoke run foretells. It may take half as long again.")
    if total > budget.NOTABLY * 60 * minutes:
        say(console, "It cannot be shorter: what is left is to load, save and look at held-out rows.")
    if not any(changes.values()):
        return
    if config.gate == "stop" and config.gate_limits.accuracy is not None and any(_learns(config, *changes)):
        why = "after so few steps a reward model is often no better than chance"
        say(console, f"The gate may stop it: {why}. With `gate=warn` it goes on all the same.")
    again = "Give the same values each time, or write them into the config"
    if config.run_path.name.endswith(smoke.TRY):
        say(console, f"It runs in {config.run_path}. {again}.")
        return
    beside = f"run_dir={config.run_path}{smoke.TRY}" if config.run_dir else f"name={config.name}{smoke.TRY}"
    say(console, f"It runs in {config.run_path}; `{shlex.quote(beside)}` keeps it beside the long run. {again}.")


def _learns(config: RunConfig, *names: str) -> Iterator[bool]:
    """Tell of the stages `names` whether they learn from a reward model that is among them."""
    for name in names:
        stage = config.stages[name]
        yield isinstance(stage, Reinforced) and stage.reward in names


def say_least(seconds: float, command: Sequence[str], console: Console) -> None:
    """Say that a run is too short to say something, and how long one takes that does; `command`: for its values."""
    few = f"fewer than {FEWEST_STEPS} steps or {FEWEST_PROMPTS} prompts say next to nothing"
    say(console, f"This shows that the chain works, and no more: {few}.")
    say(console, f"The least that says something takes about {about(seconds)}:\n{shlex.join(command)}")


def say_short(overrides: Sequence[str], whole: Sequence[str], console: Console) -> None:
    """Say of a run that its length was set on the command line, and how the `whole` run begins.

    `overrides`: those of the command that set it.
    """
    what = f"The command line set how long this run was ({', '.join(overrides)})"
    plan_command = shlex.join([*whole[:1], "plan", *whole[2:]])
    say(console, f"{what}. `{plan_command}` says how long the run takes that the config describes. It begins with:")
    say(console, shlex.join(whole))


def say_result(
    full: RunConfig,
    measured: Mapping[str, Measured],
    seconds: Mapping[str, float],
    command: Sequence[str],
    is_whole: bool,
    console: Console,
) -> None:
    """Say that a smoke run went well, what the run will take, and the command that starts the run.

    `is_whole`: all stages of the run were measured.
    """
    table = Table(f"{full.name}: what the run will take", ("stage", "smoke run", "run"), right=True)
    for name, one in measured.items():
        table.add(name, about(one.duration), about(seconds[name]))
    show(table, console)
    say(console, f"In all {about(sum(seconds.values()))}, by what was measured, scaled by tokens.")
    smaller = [
        f"{name} ({one.batch} of {one.full_batch} rows)"
        for name, one in measured.items()
        if one.batch and one.full_batch and one.full_batch >= WORTH_SAYING * one.batch
    ]
    if smaller:
        what = f"Smaller batches than the run's were measured: {', '.join(smaller)}"
        say(console, f"{what}. Their times may be wrong by a third.")
    for minutes in SHORTER if is_whole else ():
        if sum(seconds.values()) > WORTH_SAYING * 60 * minutes:
            values = shlex.join([*command[:1], "plan", *command[2:], "--minutes", str(minutes)])
            say(console, f"Values with which it takes about {minutes} minutes, for a try:\n{values}")
            break
    say(
        console,
        f"Every stage works. `rlhf plan` shows these times, from {smoke.folder_of(full)}; nothing else uses it.",
    )
    say(console, f"The run:\n{shlex.join(command)}")
