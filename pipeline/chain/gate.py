"""The gate: whether a reward model can carry RL, and a policy what is built on it; judged by what is on record."""

from dataclasses import dataclass
from typing import Any

from pipeline.config.schema import GateLimits, Reinforced, RunConfig
from pipeline.config.stage_types import makes
from pipeline.records.manifest import Manifest, Record
from pipeline.shift.estimate import estimate
from pipeline.system.errors import UserError

MORE_DATA = "more comparisons, cleaner labels, other training options, or DPO, which needs no reward model"


@dataclass(frozen=True)
class Verdict:
    """What was looked at, whether it is good enough (None: not measured), the figure, and what helps if not."""

    stage: str
    what: str
    passed: bool | None
    seen: str
    mend: str

    def __str__(self) -> str:
        verdict = {True: "passed", False: "FAILED", None: "not measured"}[self.passed]
        return f"{self.stage}: {self.what}: {verdict}: {self.seen}" + ("" if self.passed else f". {self.mend}")


def verdicts(config: RunConfig, name: str, recorded: Manifest) -> list[Verdict]:
    """What the gate says of the stages that stage `name` builds on."""
    stage, limits, found = config.stages[name], config.gate_limits, []
    if not makes(stage, "aligned policy"):
        return []
    if (parent := recorded.stages.get(stage.init)) is not None:
        found += _policy(stage.init, parent, limits)
    if isinstance(stage, Reinforced) and stage.reward in recorded.stages:
        report = recorded.stages.get(stage.shift)
        found += _reward(stage.reward, recorded.stages[stage.reward], report, limits)
    return found


def check(config: RunConfig, name: str, recorded: Manifest) -> list[Verdict]:
    """The verdicts on what stage `name` builds on.

    Raises:
        UserError: if one failed and the config's `gate` is `stop`.
    """
    found = [] if config.gate == "off" else verdicts(config, name, recorded)
    failed = [str(verdict) for verdict in found if verdict.passed is False]
    if failed and config.gate == "stop":
        how = "Limits are in `gate_limits`; `gate: warn` goes on all the same"
        raise UserError("\n  ".join([f"{name} does not start, the gate failed:", *failed, how]))
    return found


def _policy(name: str, record: Record, limits: GateLimits) -> list[Verdict]:
    found, metrics = [], record.metrics
    before = metrics.get("initial_eval_loss")
    if "eval_loss" in metrics and before is not None:
        loss = metrics["eval_loss"]  # the manifest holds NaN as null
        seen = f"{float('nan') if loss is None else loss:.3f} after training, {before:.3f} before"
        mend = "It learned nothing that holds beyond its rows: look at its learning rate, epochs and data"
        found.append(Verdict(name, "held-out loss", loss is not None and loss < before, seen, mend))
    if limits.first_token is not None and "first_token" in metrics:
        first = metrics["first_token"]
        seen = f"{first['special']:.0%} of {first['prompts']} prompts have a special token as likeliest first token"
        mend = f"Completions would be empty: look at the chat template and tokenizer.eos_token ({first['likeliest']!r})"
        found.append(Verdict(name, "first token", first["special"] <= limits.first_token, seen, mend))
    return found


def _reward(name: str, record: Record, report: Record | None, limits: GateLimits) -> list[Verdict]:
    found: list[Verdict] = []
    unmeasured = "Give it `eval_data`; of a dataset that is trained on too, the share `heldout` is then kept apart"
    held_out: dict[str, Any] | None = record.metrics.get("held_out")
    if limits.accuracy is not None and held_out is None:
        found.append(Verdict(name, "held-out accuracy", None, "it has no held-out comparisons", unmeasured))
    elif limits.accuracy is not None:
        accuracy = held_out["accuracy"]
        seen = f"{estimate(accuracy)} on {held_out['count']} comparisons; all of the interval must be above "
        passed = accuracy["low"] > limits.accuracy
        mend = f"RL would climb noise: {MORE_DATA}"
        found.append(Verdict(name, "held-out accuracy", passed, seen + f"{limits.accuracy:g}", mend))
    if limits.within_sd is None and limits.length_correlation is None:
        return found
    if report is None:
        unmeasured = "Add a stage of type shift, or a stage of type evaluate whose prompts it can use"
        return [*found, Verdict(name, "shift report", None, "there is none", unmeasured)]
    spread, length = report.metrics["within_sd"], report.metrics["length_correlation"]
    more = "The report needs two prompts at least; an interval is over prompts"
    if limits.within_sd is not None and spread is not None:
        if spread["high"] is None:
            found.append(Verdict(name, "within-prompt SD", None, f"{estimate(spread)} has no interval", more))
        else:
            seen = f"{estimate(spread)} log-odds; its interval must reach {limits.within_sd:g}"
            mend = f"Completions of one prompt all score alike, so RL has no signal: {MORE_DATA}"
            found.append(Verdict(name, "within-prompt SD", spread["high"] >= limits.within_sd, seen, mend))
    if limits.length_correlation is not None and length is not None:
        if length["low"] is None:  # two completions of one prompt always correlate by 1
            found.append(Verdict(name, "score and length", None, f"{estimate(length)} has no interval", more))
        else:
            crosses = length["low"] < 0 < length["high"]
            nearest = 0.0 if crosses else min(abs(length["low"]), abs(length["high"]))
            seen = f"{estimate(length)} within prompts; its interval must reach below {limits.length_correlation:g}"
            mend = (
                "The score tracks length, and RL would too: balance the lengths of chosen and rejected "
                "(`rlhf check-data`)"
            )
            found.append(Verdict(name, "score and length", nearest < limits.length_correlation, seen, mend))
    return found
