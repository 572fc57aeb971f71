"""The first paragraph of a report: how the run stands, and which stage to mend first."""

from dataclasses import dataclass

from pipeline.html import aligned, rules
from pipeline.html.rules import Finding
from pipeline.html.values import Run, Stage
from pipeline.shift.estimate import Estimate


@dataclass(frozen=True)
class Summary:
    """Hold the first paragraph in parts, and what else was found, in the order in which it is to be mended."""

    state: str
    first: Finding | None
    result: str
    others: list[Finding]


def summarise(run: Run) -> Summary:
    """Say how a run stands, what to mend first, and what came out."""
    found = rules.findings(run)
    return Summary(_state(run), found[0] if found else None, _result(run), found[1:])


def _state(run: Run) -> str:
    """Say how far a run is. A stage that merely waits, or has not begun, is not named."""
    finished = sum(stage.state == "finished" for stage in run.stages.values())
    total = len(run.stages)
    parts = ["All stages are finished." if finished == total else f"{finished} of {total} stages are finished."]
    return " ".join([*parts, *filter(None, map(_standing, run.stages.values()))])


def _standing(stage: Stage) -> str:
    if stage.state == "running":
        return f"{stage.name} is running."
    if stage.state == "failed":
        return f"{stage.name} failed."
    if stage.state == "held":
        return f"The gate does not let {stage.name} start."
    if stage.state == "interrupted":
        return f"{stage.name} was interrupted; {stage.why}."
    if stage.state == "stale":
        return f"{stage.name} is out of date and must run again: {stage.why}."
    return ""


def _result(run: Run) -> str:
    """Name the policy that wins most often; empty without an evaluation that compares any."""
    best: tuple[bool, float, str] | None = None
    for stage, policy, figures in aligned.judged(run):
        for measure, by in (("judge", "the judge"), ("score", "the reward model")):
            rate = aligned.win_rate(figures, measure)
            if rate is None:
                continue
            if measure == "score" and aligned.by_chance(run, stage):
                break  # what it says of policies is chance too; a note below the table says so
            text = _best(stage, policy, rate, by, figures["prompts"])
            one = (rate.low is None or rate.low > 0.5, rate.value, text)  # what is certain comes first
            best = max(best or one, one)
            break  # the judge's opinion counts where there is one
    return "" if best is None else best[2]


def _best(stage: Stage, policy: str, rate: Estimate, by: str, prompts: int) -> str:
    """Say what the best policy's win rate is worth."""
    baseline = stage.metrics["baseline"]
    if rate.low is not None and rate.low <= 0.5:
        figures = f"the best is {policy} with {rate} of {prompts} prompts"
        return f"In {stage.name}, no policy is better than {baseline} for certain by {by}: {figures}."
    return f"In {stage.name}, {policy} wins most often by {by}: {rate} of {prompts} prompts against {baseline}."
