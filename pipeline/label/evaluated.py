"""Compare what the config holds out today with what the finished stages of the run were evaluated on.

Labels are trained on. If the config or a file is another one now, prompts of a finished evaluation could be labelled.
"""

from collections.abc import Sequence
from typing import NamedTuple

from pipeline.config import graph
from pipeline.config.schema import RunConfig, TrainingStage
from pipeline.config.stage_types import STAGE_TYPES, type_of
from pipeline.data import fingerprints
from pipeline.records.manifest import Manifest
from pipeline.system.errors import UserError


class Use(NamedTuple):
    """A dataset that a stage is evaluated on, its fingerprint, and the share of its prompts that is held out for that.

    None: all prompts are held out.
    """

    stage: str
    dataset: str
    fingerprint: str
    share: float | None

    def holds_out(self, other: "Use") -> bool:
        """Tell whether all prompts are held out that another use needs."""
        if self.fingerprint != other.fingerprint:
            return False
        return self.share is None or (other.share is not None and self.share >= other.share)


def check(config: RunConfig, recorded: Manifest, is_file: bool) -> list[str]:
    """Return what cannot be told of a file of prompts; of the run's own datasets everything must be known.

    Raises:
        UserError: naming what the config does not hold out any more.
    """
    changed = differences(config, recorded)
    if changed and not is_file:
        fault = f"{config.source} does not hold out what the run was evaluated on: {changed[0]}"
        mend = "Labels are trained on. Put it back as it was, or give a file of other prompts with --prompts"
        raise UserError(f"{fault}. {mend}")
    return changed


def differences(config: RunConfig, recorded: Manifest) -> list[str]:
    """Say for each dataset that finished stages were evaluated on why the config does not hold it out, if so.

    Raises:
        UserError: if a dataset that the config evaluates on cannot be read.
    """
    now = _of_config(config)
    lost = [use for use in _on_record(recorded) if not any(one.holds_out(use) for one in now)]
    return list(dict.fromkeys(_difference(use, now) for use in lost))


def _on_record(recorded: Manifest) -> list[Use]:
    """Return what the finished stages were evaluated on. A stage of another run was not evaluated in this one."""
    uses = []
    for name, record in recorded.stages.items():
        kind = STAGE_TYPES[record.type]
        for role in ("data", "eval_data"):
            trains = kind.trl_config is not None
            if kind.reads_raw_text or role not in record.inputs or graph.role_split(role, trains) == graph.TRAIN:
                continue
            dataset = record.datasets.get(role, {}).get("dataset", role)
            share = record.inputs.get(f"{role}: held-out share")
            uses.append(Use(name, dataset, record.inputs[role], None if share is None else float(share)))
    return uses


def _of_config(config: RunConfig) -> list[Use]:
    """Return what the stages of the config are evaluated on."""
    uses = []
    for name, stage in config.stages.items():
        for role, dataset in graph.datasets(stage).items():
            trains = isinstance(stage, TrainingStage)
            if type_of(stage).reads_raw_text or graph.role_split(role, trains) == graph.TRAIN:
                continue
            section = config.data[dataset]
            share = section.heldout if graph.is_shared(config, dataset) else None
            uses.append(Use(name, dataset, fingerprints.of_dataset(dataset, section, config.folder), share))
    return uses


def _difference(use: Use, now: Sequence[Use]) -> str:
    same = [one for one in now if one.fingerprint == use.fingerprint]
    if same:
        why = "since a stage trains on the others" if use.share is None else "by `heldout`"
        return f"{use.stage} held out {_share(use)} of {use.dataset}, now it is {_share(same[0])}, {why}"
    if any(one.dataset == use.dataset for one in now):
        return f"{use.dataset} has changed since {use.stage} read it (its files, or how the config reads them)"
    return f"{use.stage} was evaluated on {use.dataset}, and now no stage is"


def _share(use: Use) -> str:
    return "all prompts" if use.share is None else f"{use.share:g} of the prompts"
