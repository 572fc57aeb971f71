"""What can be wrong with a chain's end: failures, the gate's verdicts, alarms, and what the evaluation says."""

from collections.abc import Iterator

from pipeline.config.schema import BASE
from pipeline.html.values import Found, Run, Stage
from pipeline.rl.healthy_ranges import HEALTHY
from pipeline.shift.estimate import Estimate
from pipeline.show import results
from pipeline.system.json_object import JsonObject

OVERRATED = 0.2  # win rate by the reward model above that by the judge
FEW_ENDED = 0.8  # share of completions that stop by themselves
FAR = 50.0  # nats per completion, as in the table of healthy ranges


def unfinished(run: Run) -> Iterator[Found]:
    """Yield the stages that ended with an error of their own; of those that the gate held, others are to mend."""
    for stage in run.stages.values():
        if stage.state == "failed":
            last = f" The last line of its log: {stage.log[-1].strip()}" if stage.log else ""
            yield stage.name, f"It failed: {stage.why}.{last}"


def gate(run: Run) -> Iterator[Found]:
    """Yield the stages that the gate found wanting, each figure once."""
    told: set[tuple[str, str]] = set()
    for stage in run.stages.values():
        for verdict in stage.gate:
            key = (verdict["stage"], verdict["what"])
            if verdict["passed"] is not False or key in told or verdict["stage"] not in run.stages:
                continue
            told.add(key)
            effect = f"the gate holds {stage.name}" if stage.state == "held" else f"{stage.name} ran all the same"
            yield (
                verdict["stage"],
                f"Its {verdict['what']} fails the gate ({effect}): {verdict['seen']}. {verdict['mend']}.",
            )


def alarms(run: Run) -> Iterator[Found]:
    """Yield the stages whose watchdog raised an alarm, with the remedy of the table of healthy ranges."""
    remedies = {healthy.measure: healthy.remedy for healthy in HEALTHY}
    for stage in run.finished("aligned policy"):
        for alarm in stage.metrics.get("alarms", []):
            value = "no number" if alarm["value"] is None else f"{alarm['value']:.3g}"
            text = f"The watchdog raised an alarm: {alarm['measure'].replace('_', ' ')} was {value} at update"
            remedy = remedies.get(alarm["measure"], "lower the learning rate")
            yield stage.name, f"{text} {alarm['update']}. Causes: {alarm['causes']}. Remedy: {remedy}."


def judged(run: Run) -> Iterator[tuple[Stage, str, JsonObject]]:
    """Yield the policies that an evaluation judges, with its stage and their figures: neither baseline nor base."""
    for stage in run.finished("evaluation"):
        for policy, figures in stage.metrics["policies"].items():
            if policy not in (BASE, stage.metrics["baseline"]):
                yield stage, policy, figures


def win_rate(figures: JsonObject, measure: str) -> Estimate | None:
    """Return the win rate of a policy by `judge` or `score`; None where it was not measured."""
    values = figures.get(f"{measure}_win_rate")
    return None if values is None or values[0] is None else Estimate(*values)


def by_chance(run: Run, stage: Stage) -> bool:
    """Tell whether the scores of an evaluation are those of a reward model that cannot be told from a coin."""
    return stage.record is not None and results.scale_of(run.recorded, stage.record).is_no_judge


def overrated(run: Run) -> Iterator[Found]:
    """Yield reward models by which a policy that was trained against them wins far more than by the judge."""
    for stage, policy, figures in judged(run):
        reward = run.stages[policy].parents.get("reward") if policy in run.stages else None
        if reward is None or reward != stage.parents.get("reward") or reward not in run.stages:
            continue  # it was trained against another one, or against none
        score = win_rate(figures, "score")
        judge = win_rate(figures, "judge")
        if score is not None and judge is not None and score.value - judge.value > OVERRATED and _apart(judge, score):
            text = f"It overrates {policy}, which was trained against it: a win rate of {score} by its scores and of"
            yield (
                reward,
                f"{text} {judge} by the judge. Read the completions where the two disagree, and add comparisons.",
            )


def _apart(lower: Estimate, higher: Estimate) -> bool:
    return lower.high is not None and higher.low is not None and lower.high < higher.low


def no_better(run: Run) -> Iterator[Found]:
    """Yield the policies that do not win against the baseline, by the judge or else by the reward model."""
    for stage, policy, figures in judged(run):
        measure = "judge" if win_rate(figures, "judge") is not None else "score"
        rate = win_rate(figures, measure)
        if policy not in run.stages or rate is None or rate.low is None or rate.high is None or rate.low > 0.5:
            continue
        if measure == "score" and by_chance(run, stage):
            continue
        by = "judge" if measure == "judge" else "reward model"
        against = stage.metrics["baseline"]
        if rate.high < 0.5:
            text = (
                f"It loses to {against} by the {by}: its win rate is {rate}. Lower its learning rate, or keep it nearer"
            )
            yield policy, f"{text} to its reference with a larger `kl_coef` or `beta`."
        else:
            text = (
                f"It cannot be told from {against} by the {by}: its win rate is {rate}. Train it longer, or evaluate on"
            )
            yield policy, f"{text} more prompts."


def unended(run: Run) -> Iterator[Found]:
    """Yield the policies, the baseline among them, whose completions are mostly cut off."""
    for stage in run.finished("evaluation"):
        for policy, figures in stage.metrics["policies"].items():
            ended = figures.get("ended")
            if policy in run.stages and ended is not None and ended < FEW_ENDED:
                text = f"Only {ended:.0%} of its completions end by themselves. Raise `max_new_tokens` in {stage.name};"
                yield policy, f"{text} if that does not help, look whether its rows end with eos."


def far(run: Run) -> Iterator[Found]:
    """Yield the policies that are far from the baseline."""
    for _, policy, figures in judged(run):
        kl = figures.get("kl")
        if policy in run.stages and kl is not None and kl > FAR:
            text = f"It is {kl:.0f} nats from its baseline. Raise `kl_coef` or `beta`, or lower the learning rate,"
            yield policy, f"{text} and read its completions."
