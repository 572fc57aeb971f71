"""The plan: what each stage starts from, its reference, its data, and what happens to it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console

from pipeline.base import dtype
from pipeline.chain import forecast
from pipeline.chain.sizes import Size, size_of
from pipeline.chain.staleness import Decision
from pipeline.config.lineage import start_of
from pipeline.config.options import effective
from pipeline.config.precision import Autocast, autocast
from pipeline.config.schema import (
    BASE,
    Evaluate,
    Online,
    Ppo,
    RunConfig,
    Sampled,
    Shift,
    Taken,
    TrainingStage,
)
from pipeline.config.stage_types import type_of
from pipeline.records.manifest import NOT_FINISHED
from pipeline.show.screen import Cell, Table, say, show
from pipeline.show.tables import about, count
from pipeline.system.device import Device

if TYPE_CHECKING:
    from pipeline.chain.preflight import Facts
    from pipeline.data.audit import Audit

# What the plan shows of a stage's facts: data, steps and trains; and the parts of its parameters: base, adapter, head.
Figures = dict[str, str]


def describe_start(config: RunConfig, name: str) -> str:
    """Say what a stage starts from."""
    stage = config.stages[name]
    if isinstance(stage, Shift):
        return f"{stage.policy}, {stage.reward}"
    if isinstance(stage, Evaluate):
        return ", ".join([f"base, {stage.baseline}", *(stage.policies or [])])
    if isinstance(stage, Taken):
        return f"{stage.stage} of {stage.run}, copied"
    assert isinstance(stage, TrainingStage), "of the other stages each has its own words"
    if stage.init == BASE and config.model.scratch:
        return "new weights"
    start = start_of(config, name)
    source = "base model" if start.parent == BASE else start.parent
    merged = f"{source} (adapter merged)" if start.merge else source
    if stage.lora is None:
        return f"{merged}, all weights"
    continues = start.place.adapter is not None and not start.merge
    return f"adapter of {source}, continued" if continues else f"{merged} + new adapter"


def describe_reference(config: RunConfig, name: str) -> str:
    """Say what a stage's reference policy is."""
    stage = config.stages[name]
    if isinstance(stage, Evaluate):
        return f"{stage.baseline} (win rate, KL)"
    if not type_of(stage).has_reference:
        return "-"
    if isinstance(stage, Online) and not effective(stage.kind, stage.training)["beta"]:
        return "none (beta: 0)"
    parent = start_of(config, name).parent
    return "frozen copy of " + ("base model" if parent == BASE else parent)


def figures(config: RunConfig, name: str, facts: "Facts") -> Figures:
    """Return what the plan shows of a stage's facts."""
    if not facts.audits:
        return {"data": "", "steps": "copied", "trains": ""}
    amount = _amount(config, name, size_of(facts))
    steps = f"{facts.steps}\n{amount}" if facts.steps else amount
    known = {"data": "\n".join(map(_rows, facts.audits.values())), "steps": steps, "trains": ""}
    if facts.parameters is None:
        return known
    trainable = facts.parameters["trainable"]
    total = facts.parameters["total"]
    known["trains"] = f"{count(trainable)} of {count(total)}"
    known["base"] = count(total if trainable == total else total - trainable)
    if trainable < total:
        known["adapter"] = count(trainable)
    if facts.head is not None:
        known["head"] = count(facts.head)
    return known


def _amount(config: RunConfig, name: str, size: Size) -> str:
    """Say what a stage works on: tokens, its own completions, or prompts."""
    stage = config.stages[name]
    if isinstance(stage, Sampled):
        return f"{count(min(size.rows, stage.num_prompts or size.rows))} prompts"
    assert isinstance(stage, TrainingStage), "a stage samples or trains"
    options = effective(stage.kind, stage.training)
    if isinstance(stage, Ppo):
        return f"{count(options['total_episodes'] or int(options['num_train_epochs'] * size.rows))} episodes"
    if isinstance(stage, Online):
        rows = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
        return f"{count(size.steps * rows // options['num_iterations'])} completions"
    return f"{count(round(forecast.work(config, name, size)['training']))} tokens"


def plan_table(
    config: RunConfig,
    decisions: list[Decision],
    facts: Mapping[str, Figures],
    devices: Mapping[str, Device],
    seconds: Mapping[str, float],
    console: Console,
) -> None:
    """Show the stages in order: start, reference, rows, tokens, steps, parameters, time, and what happens to each.

    Of a stage that is not among the `facts` nothing is known but its config. `devices` are those of the stages to run,
    `seconds` what those take of which a smoke run has measured it.
    """
    columns = ["stage", "type", "starts from", "reference", "data (rows, tokens)", "steps", "trains", "will"]
    if seconds:
        columns.insert(-1, "time")
    table = Table(f"{config.name}: plan", columns)
    for decision in decisions:
        stage = config.stages[decision.stage]
        known = facts.get(decision.stage, {"data": stage.data or "", "steps": "", "trains": ""})
        start = describe_start(config, decision.stage)
        reference = describe_reference(config, decision.stage)
        cells = [known[column] for column in ("data", "steps", "trains")]
        if seconds:
            cells.append(about(seconds[decision.stage]) if decision.stage in seconds else "")
        table.add(decision.stage, stage.type, start, reference, *cells, _will(decision))
    show(table, console)
    parameters = _parameters(config, facts)
    if parameters:
        say(console, f"Parameters: {parameters}")
    if devices:
        say(console, f"Device: {_devices(devices)}")
    say(console, f"Weights: {_weights(config)}")
    autocasts = _autocasts(config, devices)
    if autocasts:
        say(console, f"Autocast: {autocasts}")
    checkpointed = [one.stage for one in decisions if one.run and _recomputes(config, one.stage)]
    if checkpointed:
        cost = "about a quarter more time, for less memory"
        cost += "; `gradient_checkpointing: false` turns it off, and wants a new smoke run"
        say(console, f"Gradient checkpointing, on in {', '.join(checkpointed)}: {cost}")


def say_warnings(warnings: Sequence[str], console: Console) -> None:
    """Say what of the config and the data is likely to be a mistake."""
    for warning in warnings:
        say(console, f"warning: {warning}", "yellow")


def _parameters(config: RunConfig, facts: Mapping[str, Figures]) -> str:
    """Say what the parameters of the stages are made of; empty if none of them trains."""
    trained = {name: known for name, known in facts.items() if known["trains"]}
    words: list[str] = []
    for part, what in (
        ("base", "{} in the base model"),
        ("adapter", "{} in an adapter"),
        ("head", "{} in a score head"),
    ):
        stages: dict[str, list[str]] = {}
        for name, known in trained.items():
            if part in known:
                stages.setdefault(known[part], []).append(name)
        for number, names in stages.items():
            words.append(what.format(number) + ("" if len(names) == len(trained) else f" ({', '.join(names)})"))
    online = [name for name in trained if isinstance(config.stages[name], Ppo)]
    if online:
        words.append(f"not counted: the value model and the reward model of {', '.join(online)}")
    return "; ".join(words)


def _devices(devices: Mapping[str, Device]) -> str:
    """Name the device of the stages to run; where they have several, with the stages of each."""
    stages: dict[str, list[str]] = {}
    for name, device in devices.items():
        stages.setdefault(str(device), []).append(name)
    if len(stages) == 1:
        return "".join(stages)
    return "; ".join(f"{device} in {', '.join(names)}" for device, names in stages.items())


def _autocasts(config: RunConfig, devices: Mapping[str, Device]) -> str:
    """Say in which type the training stages to run compute, and why; empty if there are none."""
    stages: dict[Autocast, list[str]] = {}
    for name, device in devices.items():
        stage = config.stages[name]
        if isinstance(stage, TrainingStage):
            stages.setdefault(autocast(stage, device), []).append(name)
    words = []
    for choice, names in stages.items():
        words.append(f"{'off' if choice.type == 'no' else choice.type} in {', '.join(names)} ({choice.why})")
    return "; ".join(words)


def _weights(config: RunConfig) -> str:
    """Say which type the weights of the run have, and why."""
    choice = dtype.choose(config)
    return f"{choice.dtype} ({choice.why})"


def _recomputes(config: RunConfig, name: str) -> bool:
    """Tell whether a stage computes each layer a second time for the gradients, which saves memory."""
    stage = config.stages[name]
    return isinstance(stage, TrainingStage) and bool(effective(stage.kind, stage.training)["gradient_checkpointing"])


def _will(decision: Decision) -> Cell:
    verb = ("run", "yellow") if decision.run else ("skip", "green")
    if decision.reason == NOT_FINISHED:  # of a new run it is the reason of every stage
        return [verb]
    return [verb, (f": {decision.reason}", "")]


def _rows(audit: "Audit") -> str:
    dropped = f" ({count(audit.num_dropped)} left out)" if audit.num_dropped else ""
    counts = "streamed" if audit.streamed else f"{count(audit.rows)}, {count(audit.tokens)}"
    return f"{audit.dataset}: {counts}{dropped}"
