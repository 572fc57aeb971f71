"""Which stages are current, which must run, and why.

A stage is current when it has a record, its config and inputs are those of the record, and its parents are current:
the three questions of every build tool. Inputs are compared by content, so a moved run folder stays current.
"""

from dataclasses import asdict, dataclass
from typing import Any

from pipeline.base import base_model
from pipeline.config import functions, graph
from pipeline.config.graph import datasets, functions_of, parents
from pipeline.config.requests import run_data
from pipeline.config.schema import RunConfig, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.data import sources
from pipeline.data.prepare import Datasets
from pipeline.records import manifest
from pipeline.records.manifest import Manifest
from pipeline.system import digests
from pipeline.system.digests import digest
from pipeline.system.errors import UserError

# Options of `training:` that change what is shown or kept, not what is learned.
_LOADING = ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers")
NEUTRAL = ("logging_", "log_", "save_", "report_to", "run_name", "disable_tqdm", *_LOADING)
_WIRING = {"init", "reward", "shift", "policy", "baseline", "policies", "data", "eval_data", "accelerate_config"}


@dataclass(frozen=True)
class Identity:
    """What a stage's result depends on: its config, and its inputs by content."""

    config: dict[str, Any]
    inputs: dict[str, str]

    def digest(self) -> str:
        return digest(asdict(self))


@dataclass(frozen=True)
class Decision:
    """Whether a stage runs, and why, or why not."""

    stage: str
    run: bool
    reason: str


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}


def _config_of(config: RunConfig, name: str) -> dict[str, Any]:
    """The part of the config that decides a stage's result, flat: {"training.learning_rate": 1e-4, ...}."""
    stage = config.stages[name]
    own = {key: value for key, value in stage.model_dump(mode="json").items() if key not in _WIRING}
    if isinstance(stage, TrainingStage):
        own["training"] = {key: value for key, value in stage.training.items() if not key.startswith(NEUTRAL)}
    own["seed"] = config.seed_of(name)
    model = config.model.model_dump(mode="json", exclude={"path"})
    if model["scratch"]:
        model["scratch"] = model["scratch"]["architecture"]
    shared = {"model": model, "quantization": config.quantization}
    return _flat(own | shared | ({} if type_of(stage).rows == "text" else {"too_long": config.too_long}))


def _data_inputs(config: RunConfig, name: str, read: Datasets) -> dict[str, str]:
    stage, inputs = config.stages[name], {}
    for role, dataset in datasets(stage).items():
        inputs[role] = sources.fingerprint_of(dataset, config.data[dataset], config.folder)
        if graph.is_shared(config, dataset):
            inputs[f"{role}: held-out share"] = str(config.data[dataset].heldout)
        trained_on = graph.role_split(role, isinstance(stage, TrainingStage)) == graph.TRAIN
        if trained_on and (removed := read.removed(dataset)):
            inputs[f"{role}: held-out prompts in it"] = removed
    for field, reference in functions_of(stage):
        files = functions.sources_of(reference, config.folder, f"stages.{name}.{field}")
        if len(files) == 1:
            inputs[f"function {reference}"] = digests.file_digest(files[0])
        elif files:
            inputs[f"function {reference}"] = digest(sorted([file.name, digests.file_digest(file)] for file in files))
    return inputs


def identify(config: RunConfig, name: str, recorded: Manifest, read: Datasets | None = None) -> Identity:
    """The identity of a stage whose parents are finished; a parent that is not has an empty digest."""
    inputs = _data_inputs(config, name, read or Datasets(run_data(config)))
    if config.model.path:
        inputs["base model"] = base_model.digest_of(config)
    for role, parent in parents(config.stages[name]).items():
        record = recorded.stages.get(parent)
        inputs[role] = digest(record.output.files) if record else ""
    return Identity(_config_of(config, name), inputs)


def _identity_now(config: RunConfig, name: str, recorded: Manifest, read: Datasets) -> Identity:
    """The identity of a stage, with an unknown input where its data or functions cannot be read.

    That is for the checks before the first stage to tell, with all other problems.
    """
    try:
        return identify(config, name, recorded, read)
    except UserError as error:
        return Identity(_config_of(config, name), {"data": f"cannot be read: {error}"})


def _changed(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The keys in which two flat mappings differ."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))


def _stale(identity: Identity, record: manifest.Record | None) -> str | None:
    """Why a record is no longer what the stage would give, or None."""
    if record is None:
        return "not finished yet"
    if changed := _changed(record.config, identity.config):
        shown = []
        for key in changed[:3]:
            old, new = (repr(values.get(key, "unset")) for values in (record.config, identity.config))
            shown.append(f"{key} ({old} -> {new})" if max(len(old), len(new)) < 40 else key)
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"config changed: {', '.join(shown)}{more}"
    changed = _changed(record.inputs, identity.inputs)
    return f"input changed: {', '.join(changed)}" if changed else None


def decide(config: RunConfig, recorded: Manifest, redo: tuple[str, ...] = ()) -> list[Decision]:
    """What would happen to each stage, in order."""
    decisions: dict[str, Decision] = {}
    read = Datasets(run_data(config))
    for name, stage in config.stages.items():
        again = [parent for parent in dict.fromkeys(parents(stage).values()) if decisions[parent].run]
        record = recorded.stages.get(name)
        if name in redo:
            reason = "asked for with --redo"
        elif again and record is not None:
            reason = f"{', '.join(again)} {'runs' if len(again) == 1 else 'run'} again"
        else:
            reason = _stale(_identity_now(config, name, recorded, read), record)
        decisions[name] = Decision(name, reason is not None, reason or "finished, nothing changed")
    return list(decisions.values())
