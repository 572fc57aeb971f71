"""Fill in what the stages of a config refer to, and put them in an order in which they can run."""

import graphlib
from collections.abc import Iterable

from pipeline.config import options, rules
from pipeline.config.document import Problems
from pipeline.config.graph import datasets, waits_for
from pipeline.config.schema import (
    BASE,
    REPORT,
    Evaluate,
    Options,
    Ppo,
    Reinforced,
    RunConfig,
    Sampled,
    Shift,
    Stage,
    Taken,
    TrainingStage,
)
from pipeline.config.stage_types import STAGE_TYPES, makes, stages_that_make, type_of
from pipeline.config.type_row import POLICIES, Reference
from pipeline.system.errors import unknown

Stages = dict[str, Stage]  # by name
Changes = dict[str, object]  # field -> value, of a stage
# What a report copies from the first evaluate stage, so that both use the same stored completions.
_COPIED = ("data", "seed", "temperature", "max_new_tokens", "max_prompt_length", "batch_size")


def wire(config: RunConfig, problems: Problems) -> RunConfig:
    """Fill in every reference and shared option, and put the stages in an order in which they can run."""
    rules.check_sources(config, problems)
    stages: Stages = {}
    for name, stage in config.stages.items():
        _check_datasets(config, name, problems)
        changes = _references(config, name, problems)
        if isinstance(stage, TrainingStage):
            changes["training"] = _training(config, stage)
            rules.check_training(config, name, changes["training"], problems)
        stages[name] = stage.model_copy(update=changes)
    for name, stage in stages.items():
        if isinstance(stage, Shift):  # what it follows is filled in by now
            stages[name] = _filled_in_report(name, stage, stages, problems)
    if config.gate != "off":
        stages = _with_reports(stages)
    for name, stage in stages.items():
        if isinstance(stage, Reinforced):
            stages[name] = _with_report(name, stage, stages, problems)
    _fit_temperatures(config, stages, problems)
    if problems:
        return config
    try:
        order = _order(stages)
    except graphlib.CycleError as error:
        circle = " -> ".join(reversed(error.args[1]))
        mend = "let one of them start from another stage"
        problems.add(f"these stages start from one another in a circle: {circle}; {mend}", "stages")
        return config
    config = config.model_copy(update={"stages": {name: stages[name] for name in order}})
    rules.check_weights(config, problems)
    return config


def _training(config: RunConfig, stage: TrainingStage) -> Options:
    """Lay a stage's `training:` over what all stages share, as far as its type may set that (PPO takes no bf16)."""
    owned = options.owned_by(stage.kind)
    words = type_of(stage).words
    shared = {
        key: value
        for key, value in config.training.items()
        if key not in owned and (key not in words or value in words[key].split())
    }
    return shared | stage.training


def _check_datasets(config: RunConfig, name: str, problems: Problems) -> None:
    """Check that every dataset of a stage is there, and that only pretraining reads a stream."""
    stage = config.stages[name]
    for role, dataset in datasets(stage).items():
        if dataset not in config.data:
            problems.add(unknown("dataset", dataset, config.data), "stages", name, role)
        elif config.data[dataset].streaming and (type_of(stage).rows, role) != ("text", "data"):
            wrong = f"dataset {dataset!r} has `streaming: true`, which only pretraining can read, and not evaluate on"
            problems.add(wrong, "stages", name, role)


def _references(config: RunConfig, name: str, problems: Problems) -> Changes:
    """Return updates of a stage's fields: the stages it refers to, checked, and found where a field is empty."""
    stage = config.stages[name]
    changes: Changes = {}
    for reference in type_of(stage).references:
        needless = reference.unless is not None and bool(getattr(stage, reference.unless))
        if getattr(stage, reference.field) is not None:
            _check_reference(config, name, reference, problems)
        elif not needless:
            _fill_in(config, name, reference, changes, problems)
    if isinstance(stage, Evaluate):
        policies = [other for other in stages_that_make(config, *POLICIES) if other != name]
        aligned = [other for other in stages_that_make(config, "aligned policy") if other != name]
        changes["policies"] = aligned if stage.policies is None else stage.policies
        for policy in set(changes["policies"]) - set(policies):
            problems.add(unknown("policy", policy, policies), "stages", name, "policies")
    return changes


def _check_reference(config: RunConfig, name: str, reference: Reference, problems: Problems) -> None:
    """Check that a field names a stage of the run, and one that makes what the field needs."""
    target = getattr(config.stages[name], reference.field)
    if target not in config.stages:
        if (target, reference.field) != (BASE, "init"):
            wrong = unknown("stage", target, [*config.stages, BASE])
            problems.add(wrong, "stages", name, reference.field)
    elif not makes(config.stages[target], *reference.makes):
        expected = [kind for kind, row in STAGE_TYPES.items() if row.makes in reference.makes]
        wrong = f"is of type {config.stages[target].type}; expected one of {', '.join(expected)}"
        problems.add(f"stage {target!r} {wrong}", "stages", name, reference.field)


def _fill_in(config: RunConfig, name: str, reference: Reference, changes: Changes, problems: Problems) -> None:
    """Let an empty field name the only stage of its default type, or else the only one of another run that fits."""
    others = {other: stage for other, stage in config.stages.items() if other != name}
    candidates = [other for other, stage in others.items() if stage.type == reference.default]
    if not candidates and reference.missing is not None:
        taken = {other: stage for other, stage in others.items() if isinstance(stage, Taken)}
        candidates = [other for other, stage in taken.items() if makes(stage, *reference.makes)]
    if len(candidates) == 1:
        changes[reference.field] = candidates[0]
    elif candidates:
        wrong = f"is required: choose one of {', '.join(candidates)}"
        problems.add(wrong, "stages", name, reference.field)
    elif reference.missing is not None:
        problems.add(reference.missing, "stages", name, reference.field)
    elif reference.fallback is not None:
        changes[reference.field] = reference.fallback


def _filled_in_report(name: str, report: Shift, stages: Stages, problems: Problems) -> Shift:
    """Let a shift stage measure the policy that its reward model started from, sampled as the evaluation does."""
    policies = [other for other, stage in stages.items() if makes(stage, *POLICIES)]
    if report.policy not in (None, BASE, *policies):
        problems.add(unknown("policy", report.policy, policies), "stages", name, "policy")
    reward = stages.get(str(report.reward))
    if not isinstance(reward, TrainingStage | Taken):  # that is a problem already
        return report
    changes = _sampling_settings(report, reward, stages)
    if report.policy is None:
        changes["policy"] = _policy_to_sample(str(report.reward), stages)
    if changes.get("data", report.data) is None:
        missing = "is required where there is no evaluate stage and the reward model has no `eval_data`"
        problems.add(missing, "stages", name, "data")
    return report.model_copy(update=changes)


def _policy_to_sample(reward: str, stages: Stages) -> str:
    """Return the policy whose completions a report on this reward model scores, where the report names none.

    It is the one that the reward model started from. If that is in another run: the one from which RL against the
    reward model starts, or the only policy that was taken from another run, or the base.
    """
    policy = _policy_below(reward, stages)
    if policy is not None:
        return policy
    for stage in stages.values():
        if isinstance(stage, Reinforced) and stage.reward == reward and stage.init is not None:
            return stage.init
    taken = [name for name, stage in stages.items() if isinstance(stage, Taken) and makes(stage, *POLICIES)]
    return taken[0] if len(taken) == 1 else BASE


def _policy_below(reward: str, stages: Stages) -> str | None:
    """Return the policy that a reward model started from, at any distance; None: it is in another run."""
    name = reward
    for _ in stages:  # no longer than that, since references may still make a circle
        stage = stages.get(name)
        if stage is None or not makes(stage, "reward model"):
            break
        if not isinstance(stage, TrainingStage):
            return None
        name = stage.init or BASE
    return name


def _with_reports(stages: Stages) -> Stages:
    """Return all stages, each reward stage followed by a shift stage unless it has one or nothing is held out.

    One that has a section under its usual name follows too, wherever that stands: an override's stands last.
    """
    reports = [stage for name, stage in stages.items() if _comes_before_rl(name, stages)]
    measured = {report.reward for report in reports if isinstance(report, Shift)}
    extended: Stages = {}
    for name, stage in stages.items():
        extended.setdefault(name, stage)
        if not isinstance(stage, TrainingStage) or not makes(stage, "reward model"):
            continue
        own = stages.get(name + REPORT)
        if own is not None and [key for key, one in stages.items() if _reports_on(one, name)] == [name + REPORT]:
            extended.setdefault(name + REPORT, own)
        if name in measured or own is not None:
            continue
        report = Shift(type="shift", reward=name, policy=_policy_to_sample(name, stages))
        report = report.model_copy(update=_sampling_settings(report, stage, stages))
        if report.data is not None:
            extended[name + REPORT] = report
    return extended


def _reports_on(stage: Stage, reward: str) -> bool:
    return isinstance(stage, Shift) and stage.reward == reward


def _comes_before_rl(name: str, stages: Stages) -> bool:
    """Tell whether a stage is a shift stage that samples a policy from before RL.

    Only such a report may feed the gate. A report on a policy of PPO would make a circle.
    """
    report = stages[name]
    if not isinstance(report, Shift):
        return False
    policy = stages.get(str(report.policy))
    return policy is None or isinstance(policy, Taken) or not makes(policy, "aligned policy")


def _sampling_settings(report: Shift, reward: TrainingStage | Taken, stages: Stages) -> Changes:
    """Return the settings that a shift stage copies from the first evaluate stage where the user gave none."""
    evaluation = _first_evaluation(stages)
    if evaluation is not None:
        return {key: getattr(evaluation, key) for key in _COPIED if key not in report.model_fields_set}
    if report.data is not None:
        return {}
    return {"data": datasets(reward).get("eval_data")}


def _first_evaluation(stages: Stages) -> Evaluate | None:
    return next((stage for stage in stages.values() if isinstance(stage, Evaluate)), None)


def follows_evaluation(config: RunConfig, name: str, key: str) -> bool:
    """Tell whether a stage of a finished config is a report whose setting is that of the evaluation that it copies."""
    stage = config.stages[name]
    evaluation = _first_evaluation(config.stages)
    if not isinstance(stage, Shift) or evaluation is None or key not in _COPIED:
        return False
    return getattr(stage, key) == getattr(evaluation, key)


def _with_report(name: str, stage: Reinforced, stages: Stages, problems: Problems) -> Reinforced:
    """Return the RL stage with `shift` filled in; add a problem where it lacks a report or held-out prompts."""
    reports = [key for key, other in stages.items() if isinstance(other, Shift) and other.reward == stage.reward]
    earlier = [key for key in reports if _comes_before_rl(key, stages)]
    if stage.shift is None and earlier and stage.reward is not None:
        stage = stage.model_copy(update={"shift": earlier[0]})
    elif stage.shift is not None and stage.shift not in reports:
        problems.add(unknown("report on its reward model", stage.shift, reports), "stages", name, "shift")
    rules.check_reinforced(name, stage, problems)
    return stage


def _fit_temperatures(config: RunConfig, stages: Stages, problems: Problems) -> None:
    """Let a report measure the ICC that shrinkage uses on completions as PPO draws them, unless it says otherwise."""
    settled = {name for name, stage in config.stages.items() if "temperature" in stage.model_fields_set}
    for name, stage in stages.items():
        if not isinstance(stage, Ppo) or not stage.baseline_shrinkage or stage.shift is None:
            continue
        report = stages.get(stage.shift)
        if not isinstance(report, Sampled):  # that is a problem already
            continue
        temperature = options.value_at(stage, "training.temperature")
        if stage.shift not in settled:
            stages[stage.shift] = report.model_copy(update={"temperature": temperature})
            settled.add(stage.shift)  # another PPO stage must agree
        elif report.temperature != temperature:
            measured = f"{stage.shift!r} measures the ICC at temperature {report.temperature:g}"
            mend = f"give stages.{stage.shift} `temperature: {temperature:g}`, or PPO's training that of the report"
            wrong = f"{measured}, PPO samples at {temperature:g}; {mend}"
            problems.add(wrong, "stages", name, "baseline_shrinkage")


def _order(stages: Stages) -> Iterable[str]:
    """Return the stages in an order in which they can run, as near to the file's as that allows.

    Raises:
        graphlib.CycleError: if some of them wait for one another.
    """
    needs: dict[str, set[str]] = {name: waits_for(stage) for name, stage in stages.items()}
    graphlib.TopologicalSorter(needs).prepare()
    order: list[str] = []
    while len(order) < len(stages):
        order.append(next(name for name in stages if name not in order and needs[name] <= set(order)))
    return order
