"""Decide before an aligned policy is trained whether the stages that it builds on are good enough, by their records."""

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.config import graph
from pipeline.config.schema import BASE, Evaluate, GateLimits, Reinforced, RunConfig, TrainingStage
from pipeline.config.stage_types import makes
from pipeline.records import manifest
from pipeline.records.manifest import Manifest, Record
from pipeline.records.stage_folder import GATE
from pipeline.shift.estimate import Estimate, estimate
from pipeline.system.errors import StageFailed, UserError
from pipeline.system.json_object import JsonObject

MORE_DATA = "more comparisons, cleaner labels, other training options, or DPO, which needs no reward model"
NEEDS_PROMPTS = "The report needs two prompts at least; an interval is over prompts"

_STOPPED = "does not start, the gate failed"


@dataclass(frozen=True)
class Verdict:
    """Say what was looked at, whether it is good enough (None: not measured), the figure, and what helps if not."""

    stage: str
    what: str
    passed: bool | None
    seen: str
    mend: str

    def __str__(self) -> str:
        verdict = {True: "passed", False: "FAILED", None: "not measured"}[self.passed]
        return f"{self.stage}: {self.what}: {verdict}: {self.seen}" + ("" if self.passed else f". {self.mend}")


def verdicts(config: RunConfig, name: str, recorded: Manifest) -> list[Verdict]:
    """Judge the finished stages that stage `name` builds on."""
    stage = config.stages[name]
    limits = config.gate_limits
    judged: list[Verdict] = []
    if not isinstance(stage, TrainingStage) or not makes(stage, "aligned policy"):
        return judged
    if stage.init in recorded.stages:
        judged += _policy(stage.init, recorded.stages[stage.init], limits)
    if isinstance(stage, Reinforced) and stage.reward in recorded.stages:
        report = None if stage.shift is None else recorded.stages.get(stage.shift)
        reward = recorded.stages[stage.reward]
        if limits.accuracy is not None:
            judged.append(_accuracy(stage.reward, reward, limits.accuracy))
        judged += _report(stage.reward, report, limits)
    return judged


def check(config: RunConfig, name: str, recorded: Manifest) -> list[Verdict]:
    """Return the verdicts on what stage `name` builds on, and keep them in its folder if it has one.

    Raises:
        UserError: if one failed and the config's `gate` is `stop`.
    """
    judged = [] if config.gate == "off" else verdicts(config, name, recorded)
    failed = [str(verdict) for verdict in judged if verdict.passed is False]
    stops = bool(failed) and config.gate == "stop"
    _keep(config.run_path / name, judged, stops)
    if stops:
        how = "Limits are in `gate_limits`; `gate: warn` goes on all the same"
        raise UserError("\n  ".join([f"{name} {_STOPPED}:", *failed, how]))
    return judged


@contextlib.contextmanager
def explained(config: RunConfig, name: str, command: Sequence[str]) -> Iterator[None]:
    """Let the message of a stage that the gate has stopped also say how to evaluate what does not build on it.

    `command`: the one that started the run.
    """
    try:
        yield
    except StageFailed as error:
        tables = list(_tables_without(config, name, command)) if _STOPPED in str(error) else []
        raise StageFailed("\n  ".join([str(error), *tables]), error.exit_code) from None


def _tables_without(config: RunConfig, name: str, command: Sequence[str]) -> Iterator[str]:
    """Say of each evaluation how to get its table without stage `name`, what else the gate stops, and their heirs."""
    recorded = manifest.read(config.run_path)
    stopped = [name]
    if recorded is not None:
        waiting = [other for other in config.stages if other not in recorded.stages]
        stopped += [other for other in waiting if any(v.passed is False for v in verdicts(config, other, recorded))]
    lost = {*stopped, *(below for one in stopped for below in graph.descendants(config, one))}
    for other, stage in config.stages.items():
        if not isinstance(stage, Evaluate):
            continue
        fixed = {role: parent for role, parent in graph.parents(stage).items() if not role.startswith("policies.")}
        if not lost.isdisjoint(fixed.values()):
            continue
        policies = [policy for policy in stage.policies or () if policy not in lost]
        key = f"stages.{other}.policies="
        start = [word for word in command if not word.startswith(key)]
        words = shlex.join([*start, f"{key}[{','.join(policies)}]", "--until", other])
        compared = ", ".join(dict.fromkeys([BASE, str(stage.baseline), *policies]))
        yield f"The table of {other} without {name} ({compared}) comes from:\n    {words}"


def _keep(folder: Path, judged: list[Verdict], stops: bool) -> None:
    """Write the verdicts for the report: a stage that is stopped has no record that could hold them."""
    if not folder.is_dir():
        return
    if not judged:
        (folder / GATE).unlink(missing_ok=True)
        return
    value = {"stops": stops, "verdicts": [dataclasses.asdict(verdict) for verdict in judged]}
    (folder / GATE).write_text(json.dumps(value, indent=1) + "\n", encoding="ascii")


def _policy(name: str, record: Record, limits: GateLimits) -> list[Verdict]:
    """Judge the policy that a stage starts from: it learned something, and its completions are not empty."""
    judged: list[Verdict] = []
    metrics = record.metrics
    before = metrics.get("initial_eval_loss")
    if "eval_loss" in metrics and before is not None:
        loss = metrics["eval_loss"]  # the manifest holds NaN as null
        figure = f"{float('nan') if loss is None else loss:.3f} after training, {before:.3f} before"
        mend = "It learned nothing that holds beyond its rows: look at its learning rate, epochs and data"
        judged.append(Verdict(name, "held-out loss", loss is not None and loss < before, figure, mend))
    if limits.first_token is not None and "first_token" in metrics:
        first = metrics["first_token"]
        figure = f"{first['special']:.0%} of {first['prompts']} prompts have a special token as likeliest first token"
        mend = f"Completions would be empty: look at the chat template and tokenizer.eos_token ({first['likeliest']!r})"
        judged.append(Verdict(name, "first token", first["special"] <= limits.first_token, figure, mend))
    return judged


def _accuracy(name: str, record: Record, limit: float) -> Verdict:
    """Judge a reward model by its accuracy on held-out comparisons: all of the interval must be above the limit."""
    what = "held-out accuracy"
    held_out: JsonObject | None = record.metrics.get("held_out")
    if held_out is None:
        mend = "Give it `eval_data`; of a dataset that is trained on too, the share `heldout` is then kept apart"
        return Verdict(name, what, None, "it has no held-out comparisons", mend)
    accuracy = held_out["accuracy"]
    accuracy_text = f"{estimate(accuracy)} on {held_out['count']} comparisons"
    figure = f"{accuracy_text}; all of the interval must be above {limit:g}"
    return Verdict(name, what, accuracy["low"] > limit, figure, f"RL would climb noise: {MORE_DATA}")


def _report(name: str, report: Record | None, limits: GateLimits) -> list[Verdict]:
    """Judge a reward model by its shift report, as far as there are limits."""
    if limits.within_sd is None and limits.length_correlation is None:
        return []
    if report is None:
        mend = "Add a stage of type shift, or a stage of type evaluate whose prompts it can use"
        return [Verdict(name, "shift report", None, "there is none", mend)]
    judged: list[Verdict] = []
    spread = estimate(report.metrics["within_sd"])
    if limits.within_sd is not None and spread is not None:
        judged.append(_spread(name, spread, limits.within_sd))
    length = estimate(report.metrics["length_correlation"])
    if limits.length_correlation is not None and length is not None:
        judged.append(_length(name, length, limits.length_correlation))
    return judged


def _spread(name: str, spread: Estimate, limit: float) -> Verdict:
    """Judge the SD of the scores of one prompt's completions: the interval must reach the limit."""
    what = "within-prompt SD"
    if spread.high is None:
        return Verdict(name, what, None, f"{spread} has no interval", NEEDS_PROMPTS)
    figure = f"{spread} log-odds; its interval must reach {limit:g}"
    mend = f"Completions of one prompt all score alike, so RL has no signal: {MORE_DATA}"
    return Verdict(name, what, spread.high >= limit, figure, mend)


def _length(name: str, length: Estimate, limit: float) -> Verdict:
    """Judge the correlation of score and length within prompts: the interval must reach below the limit, either way."""
    what = "score and length"
    if length.low is None or length.high is None:  # two completions of one prompt always correlate by 1
        return Verdict(name, what, None, f"{length} has no interval", NEEDS_PROMPTS)
    includes_zero = length.low < 0 < length.high
    nearest = 0.0 if includes_zero else min(abs(length.low), abs(length.high))
    figure = f"{length} within prompts; its interval must reach below {limit:g}"
    mend = "The score tracks length, and RL would too: balance the lengths of chosen and rejected (`rlhf check-data`)"
    return Verdict(name, what, nearest < limit, figure, mend)
