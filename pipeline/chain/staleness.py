"""Which stages are current, which must run, and why.

A stage is current when it has a record, its config and inputs are those of the record, and its parents are current:
the three questions of every build tool. Inputs are compared by content, so a moved run folder stays current.

The config of a stage is all that this package decides: the keys of our schema with their defaults, and the options of
`training:` over our defaults for TRL. A key that a record lacks counts as the default that the key has now, so a new
key makes no finished stage stale, and neither does writing a default out. A default whose value changes is a change
for every record that holds the old value. TRL's own defaults are not part of it: they belong to the version of TRL,
which is on record, so an option that is added or taken out is a change even if its value is TRL's default.
`model.dtype` is on record as the type that the weights had: `auto` is a change only where it stands for another one.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from pipeline.base import base_model, dtype
from pipeline.chain import other_run
from pipeline.config import functions, graph
from pipeline.config.graph import datasets, functions_of, parents
from pipeline.config.options import with_defaults
from pipeline.config.requests import run_data
from pipeline.config.schema import RunConfig, Taken, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.data import fingerprints
from pipeline.data.removed import Removed
from pipeline.records.manifest import NOT_FINISHED, Manifest, Record
from pipeline.system import digests
from pipeline.system.digests import digest
from pipeline.system.errors import UserError

# Options of `training:` that change what is shown or kept, not what is learned.
_LOADING = ("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers")
NEUTRAL = ("logging_", "log_", "save_", "report_to", "disable_tqdm", *_LOADING)
_WIRING = {"init", "reward", "shift", "policy", "baseline", "policies", "data", "eval_data", "accelerate_config"}
_TOO_LONG = "too_long"
HELD_OUT_SHARE = "{role}: held-out share"  # among the inputs, of a dataset that is split
_OTHER_RUN = "stage of another run"  # among the inputs
CURRENT = "finished, nothing changed"
_UNSET = "unset"  # shown for a key that one side lacks
_MISSING = object()  # equal to no value

Flat = dict[str, Any]  # a config without nesting: {"training.learning_rate": 1e-4, ...}; values as JSON has them


@dataclass(frozen=True)
class Identity:
    """What a stage's result depends on: its config, and its inputs by content."""

    config: Flat
    inputs: dict[str, str]

    def digest(self) -> str:
        return digest({"config": self.config, "inputs": self.inputs})


@dataclass(frozen=True)
class Decision:
    """Whether a stage runs, and why, or why not.

    `identity`: what its record was compared with. None if there is no record, if a parent runs first, or if the data or
    functions cannot be read: the checks before the first stage tell that with all other problems.
    """

    stage: str
    run: bool
    reason: str
    identity: Identity | None = None


def decide(
    config: RunConfig, recorded: Manifest, redo: tuple[str, ...] = (), names: Iterable[str] | None = None
) -> list[Decision]:
    """Decide what happens to each stage, in order; `names`: to these alone, with all their ancestors among them."""
    decisions: dict[str, Decision] = {}
    data = Removed(run_data(config))
    for name in config.stages if names is None else names:
        first = [parent for parent in dict.fromkeys(parents(config.stages[name]).values()) if decisions[parent].run]
        decisions[name] = _decide_one(config, name, recorded, data, first, name in redo)
    return list(decisions.values())


def _decide_one(
    config: RunConfig, name: str, recorded: Manifest, data: Removed, first: list[str], redo: bool
) -> Decision:
    """Decide what happens to a stage; `first`: the parents that run before it."""
    record = recorded.stages.get(name)
    identity = None
    defaults: Flat = {}
    current = CURRENT
    if record is not None and not first:
        try:
            defaults = _defaults(config, name)
            identity = identify(config, name, recorded, data)
        except UserError as error:
            current = f"finished, cannot be compared: {error}"
    if redo:
        reason = "asked for with --redo"
    elif record is None:
        reason = NOT_FINISHED
    elif first:
        reason = f"{', '.join(first)} {'runs' if len(first) == 1 else 'run'} again"
    elif identity is not None:
        reason = _stale(identity, record, defaults)
    elif isinstance(config.stages[name], Taken):  # what was copied is usable without the other run
        reason = None
    else:
        reason = "its data or functions cannot be read"
    return Decision(name, reason is not None, reason or current, identity)


def identify(config: RunConfig, name: str, recorded: Manifest, data: Removed | None = None) -> Identity:
    """Return the identity of a stage whose parents are finished; a parent that is not has an empty digest.

    Raises:
        UserError: if its data or functions cannot be read, or the other run that it is taken from.
    """
    inputs = _data_inputs(config, name, data or Removed(run_data(config)))
    inputs |= function_inputs(config, name)
    if config.model.path:
        inputs["base model"] = base_model.fingerprint(config)
    for role, parent in parents(config.stages[name]).items():
        record = recorded.stages.get(parent)
        inputs[role] = digest(record.output.files) if record else ""
    if isinstance(config.stages[name], Taken):
        inputs[_OTHER_RUN] = digest(other_run.find(config, name).files())
    return Identity(_config_of(config, name), inputs)


def _config_of(config: RunConfig, name: str) -> Flat:
    """Return the part of the config that decides a stage's result."""
    stage = config.stages[name]
    own = stage.model_dump(mode="json")
    if isinstance(stage, Taken):  # what else it depends on is in the other run
        return _flat({key: own[key] for key in ("type", "lora", "weights")} | {"quantization": config.quantization})
    if isinstance(stage, TrainingStage):
        training = with_defaults(stage.kind, stage.training)
        own["training"] = {key: value for key, value in training.items() if not key.startswith(NEUTRAL)}
    own["seed"] = config.seed_of(name)
    model = config.model.model_dump(mode="json", exclude={"path"})
    model["dtype"] = dtype.choose(config).dtype
    if model["scratch"]:
        model["scratch"] = model["scratch"]["architecture"]
    shared = {"model": model, "quantization": config.quantization}
    if not type_of(stage).reads_raw_text:
        shared[_TOO_LONG] = config.too_long
    if config.smoke is not None and name in config.smoke.rows:
        shared["smoke"] = {"rows": config.smoke.rows[name], "longest": config.smoke.longest}
    return _flat({key: value for key, value in own.items() if key not in _WIRING} | shared)


def _defaults(config: RunConfig, name: str) -> Flat:
    """Return the default that each key of a stage's config has in this version."""
    stage = config.stages[name]
    own = _defaults_of(stage)
    if isinstance(stage, TrainingStage):
        own["training"] = with_defaults(stage.kind, {})
    shared = _defaults_of(config)
    if config.model.dtype == "auto":  # it is on record as what it stood for
        shared["model"]["dtype"] = dtype.automatic(config).dtype
    return _flat(own | {key: shared[key] for key in ("model", "quantization", _TOO_LONG)})


def _defaults_of(section: BaseModel) -> dict[str, Any]:
    """Return the defaults of a section's keys, and of those of the sections in it; some keys have none."""
    defaults = {}
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            defaults[key] = _defaults_of(value)
        elif not field.is_required():
            defaults[key] = field.get_default(call_default_factory=True)
    return defaults


def _flat(value: object, prefix: str = "") -> Flat:
    """Flatten nested sections; a section without keys stays as `{}`, since `lora: {}` is another thing than null."""
    if not isinstance(value, dict) or not value:
        return {prefix.removesuffix("."): value}
    return {k: v for key, item in value.items() for k, v in _flat(item, f"{prefix}{key}.").items()}


def _data_inputs(config: RunConfig, name: str, data: Removed) -> dict[str, str]:
    """Return a digest of each dataset of a stage, and what else decides which of its rows the stage gets."""
    stage = config.stages[name]
    inputs: dict[str, str] = {}
    for role, dataset in datasets(stage).items():
        inputs[role] = fingerprints.of_dataset(dataset, config.data[dataset], config.folder)
        if graph.is_shared(config, dataset):
            inputs[HELD_OUT_SHARE.format(role=role)] = str(config.data[dataset].heldout)
        trained_on = graph.role_split(role, isinstance(stage, TrainingStage)) == graph.TRAIN
        removed = data.digest_of(dataset) if trained_on else None
        if removed:
            inputs[f"{role}: held-out prompts in it"] = removed
    return inputs


def function_inputs(config: RunConfig, name: str) -> dict[str, str]:
    """Return a digest of the source of each function that a stage calls."""
    inputs: dict[str, str] = {}
    for field, reference in functions_of(config.stages[name]):
        files = functions.sources_of(reference, config.folder, f"stages.{name}.{field}")
        if len(files) == 1:
            inputs[f"function {reference}"] = digests.file_digest(files[0])
        elif files:
            inputs[f"function {reference}"] = digest(sorted([file.name, digests.file_digest(file)] for file in files))
    return inputs


def _stale(identity: Identity, record: Record, defaults: Flat) -> str | None:
    """Say why a record is no longer what the stage would give; None if it is."""
    before = _completed(record.config, identity.config, defaults)
    if _TOO_LONG in before and _TOO_LONG in identity.config and not _has_long_rows(record):
        before |= {_TOO_LONG: identity.config[_TOO_LONG]}  # what to do with such rows made no difference
    changed = [key for key in _changed(before, identity.config) if not _is_told_by_keys(key, before, identity.config)]
    if changed:
        words = [_words(key, before, identity.config) for key in changed[:3]]
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        return f"config changed: {', '.join(words)}{more}"
    changed = _changed(record.inputs, identity.inputs)
    if _OTHER_RUN in changed and record.origin is not None:
        return f"{record.origin} has changed: it was run again there, or this config names another one"
    return f"input changed: {', '.join(changed)}" if changed else None


def _has_long_rows(record: Record) -> bool:
    """Tell whether a row of a stage's data was longer than the limit; where nothing is on record, one may have been."""
    if not record.datasets or not all(account.keys() >= {"dropped", "noticed"} for account in record.datasets.values()):
        return True
    return any("too_long" in one["dropped"] or "truncated" in one["noticed"] for one in record.datasets.values())


def _completed(recorded: Flat, now: Flat, defaults: Flat) -> Flat:
    """Return a recorded config with the keys that it lacks, as far as they have a default now.

    Records of earlier versions also lack sections without keys.
    """
    lacking = {key: value for key, value in now.items() if key not in recorded}
    empty = {key: value for key, value in lacking.items() if value == {}}
    return {key: defaults[key] for key in lacking if key in defaults} | empty | recorded


def _changed(old: Mapping[str, object], new: Mapping[str, object]) -> list[str]:
    """Return the keys in which two flat mappings differ."""
    return sorted(key for key in old.keys() | new.keys() if old.get(key, _MISSING) != new.get(key, _MISSING))


def _is_told_by_keys(key: str, old: Flat, new: Flat) -> bool:
    """Tell whether a section was null or empty on one side and has keys on the other, which say what changed."""
    other = new if key in old else old
    return (key in old) != (key in new) and any(one.startswith(f"{key}.") for one in other)


def _words(key: str, old: Flat, new: Flat) -> str:
    """Name a key that changed, with both values if they are short."""
    before, after = (repr(values.get(key, _UNSET)) for values in (old, new))
    return f"{key} ({before} -> {after})" if max(len(before), len(after)) < 40 else key
