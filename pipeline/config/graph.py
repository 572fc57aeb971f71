"""Tell what each stage of a run takes from which other, and which datasets are trained on."""

from collections.abc import Callable, Iterable

from pipeline.config.schema import BASE, Ppo, RunConfig, Stage, TrainingStage
from pipeline.config.stage_types import type_of

TRAIN = "train"
HELD_OUT = "held-out"


def role_split(role: str, trains: bool) -> str:
    """Return the side of the split that a role gives: `data` of a stage that trains is trained on."""
    return TRAIN if trains and role == "data" else HELD_OUT


def uses(config: RunConfig, split: str) -> list[str]:
    """Return the datasets of a run that are read on one side of the split, in order."""
    names = [
        dataset
        for stage in config.stages.values()
        for role, dataset in datasets(stage).items()
        if role_split(role, isinstance(stage, TrainingStage)) == split
    ]
    return list(dict.fromkeys(names))


def is_shared(config: RunConfig, dataset: str) -> bool:
    """Tell whether a dataset is split: some stage trains on it and some stage evaluates on it."""
    return dataset in uses(config, TRAIN) and dataset in uses(config, HELD_OUT)


def evaluated_beside(config: RunConfig, dataset: str) -> list[str]:
    """Return the other datasets of the same kind, raw text or prompts, that some stage evaluates on.

    What they are evaluated on must not be trained on.
    """
    texts: set[str] = set()
    for stage in config.stages.values():
        if type_of(stage).reads_raw_text:
            texts |= set(datasets(stage).values())
    others = [other for other in uses(config, HELD_OUT) if other != dataset]
    return [other for other in others if (other in texts) == (dataset in texts)]


def parents(stage: Stage) -> dict[str, str]:
    """Return the stages that a stage takes its inputs from, by role."""
    roles = _named(stage, "init", "reward", "baseline", "policy")
    roles |= {f"policies.{policy}": policy for policy in getattr(stage, "policies", None) or ()}
    if isinstance(stage, Ppo) and stage.baseline_shrinkage:
        roles |= _named(stage, "shift")
    return {role: name for role, name in roles.items() if name != BASE}


def waits_for(stage: Stage) -> set[str]:
    """Return the stages that must be finished before this one: its parents, and the report that its gate reads."""
    return {*parents(stage).values(), *_named(stage, "shift").values()}


def datasets(stage: Stage) -> dict[str, str]:
    """Return the datasets that a stage reads, by role."""
    return _named(stage, "data", "eval_data")


def functions_of(stage: Stage) -> list[tuple[str, str]]:
    """Return the functions that a stage calls, as (field, `module:function`)."""
    rewards = [("reward_functions", reference) for reference in getattr(stage, "reward_functions", ())]
    return rewards + list(_named(stage, "judge").items())


def _named(stage: Stage, *fields: str) -> dict[str, str]:
    """Return those of the fields that a stage's class has and that are filled."""
    return {field: value for field in fields if (value := getattr(stage, field, None)) is not None}


def ancestors(config: RunConfig, name: str, needs: Callable[[Stage], Iterable[str]] | None = None) -> list[str]:
    """Return the stages that `name` takes something from (or those that it `needs`), at any distance, in order."""
    needed = {name}
    for other in reversed(config.stages):
        if other in needed:
            stage = config.stages[other]
            needed |= set(needs(stage) if needs else parents(stage).values())
    return [other for other in config.stages if other in needed and other != name]


def descendants(config: RunConfig, name: str) -> list[str]:
    """Return the stages that take something from `name`, at any distance."""
    return [other for other in config.stages if name in ancestors(config, other)]
