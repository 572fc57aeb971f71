"""Warn where a run evaluates on rows that its stages of other runs have trained on.

A dataset is known again by its fingerprint: what its files hold, and how they are read. The split of a run keeps what
is evaluated on out of its own training only. What another run has trained on, that run has decided.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.chain import other_run, staleness
from pipeline.config import graph
from pipeline.config.schema import RunConfig, Taken, TrainingStage
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.data import fingerprints
from pipeline.records.manifest import Manifest, Origin, Record
from pipeline.system.errors import UserError


@dataclass(frozen=True)
class Training:
    """A stage of another run that has trained: the run's folder, its name, and the fingerprint of its data.

    `share`: of the prompts that were held out there; None: it has trained on all of them.
    """

    run: str
    stage: str
    fingerprint: str
    share: float | None


def warnings(config: RunConfig, recorded: Manifest) -> Iterator[str]:
    """Say of each dataset that is evaluated on here, and not held out in all other runs that have trained on it."""
    trainings = [one for name in config.stages for one in _trainings(config, name, recorded)]
    if not trainings:
        return
    for dataset in graph.uses(config, graph.HELD_OUT):
        section = config.data[dataset]
        fingerprint = fingerprints.of_dataset(dataset, section, config.folder)
        here = section.heldout if graph.is_shared(config, dataset) else None
        seen = [one for one in trainings if one.fingerprint == fingerprint and not _is_held_out(here, one.share)]
        if seen:
            yield _words(config, dataset, here, seen)


def _is_held_out(here: float | None, there: float | None) -> bool:
    """Tell whether all prompts that are held out here were held out there: the smaller share is part of the larger."""
    return here is not None and there is not None and here <= there


def _trainings(config: RunConfig, name: str, recorded: Manifest) -> Iterator[Training]:
    """Yield the stages of other runs that a stage was made from, as they are there, or as they are on record here."""
    if not isinstance(config.stages[name], Taken):
        return
    record = recorded.stages.get(name)
    origin = None if record is None else record.origin
    with contextlib.suppress(UserError):  # the other run is gone
        origin = other_run.origin_of(config, name, other_run.find(config, name))
    if origin is not None:
        yield from _of_run(origin)


def _of_run(origin: Origin) -> Iterator[Training]:
    for stage, record in origin.stages.items():
        if record.origin is not None:
            yield from _of_run(record.origin)
        elif issubclass(STAGE_TYPES[record.type].section, TrainingStage) and "data" in record.inputs:
            yield Training(origin.path, stage, record.inputs["data"], _share_of(record))


def _share_of(record: Record) -> float | None:
    share = record.inputs.get(staleness.HELD_OUT_SHARE.format(role="data"))
    return None if share is None else float(share)


def _words(config: RunConfig, dataset: str, here: float | None, seen: Sequence[Training]) -> str:
    """Say who evaluates on the dataset, who has trained on it, and what to do."""
    uses = [
        f"stages.{name}.{role}"
        for name, stage in config.stages.items()
        for role, used in graph.datasets(stage).items()
        if used == dataset and graph.role_split(role, isinstance(stage, TrainingStage)) == graph.HELD_OUT
    ]
    runs: dict[str, list[str]] = {}
    for one in seen:
        stages = runs.setdefault(one.run, [])
        if one.stage not in stages:
            stages.append(one.stage)
    who = "; ".join(f"{', '.join(stages)} of {run}" for run, stages in runs.items())
    shares = [one.share for one in seen if one.share is not None]
    mend = "name a dataset there that no run has trained on"
    if here is not None and len(shares) == len(seen):
        mend = f"lower `data.{dataset}.heldout` to {min(shares):g}, the share that was held out there"
    fault = f"{dataset} has prompts that were trained on in another run, by {who}"
    return f"{', '.join(uses)}: {fault}. They are evaluated on here, so figures look too good; {mend}"
