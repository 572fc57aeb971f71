"""Which stages are current, which must run, and why.

A stage is current when it has a record, its config and inputs are those of the record, and its parents are current:
the three questions of every build tool. Inputs are compared by content, so a moved run folder stays current.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline import basemodel, functions, manifest, runfolder, tokenizers
from pipeline.data import heldout, sources
from pipeline.data.prepare import Datasets
from pipeline.errors import UserError
from pipeline.manifest import Manifest, TokenizerRecord, digest
from pipeline.schema import RunConfig, Stage, TrainingStage, datasets, functions_of, parents

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
    return _flat(own | shared | ({} if own["type"] == "pretrain" else {"too_long": config.too_long}))


def _data_inputs(config: RunConfig, name: str, read: Datasets) -> dict[str, str]:
    stage, inputs = config.stages[name], {}
    for role, dataset in datasets(stage).items():
        inputs[role] = sources.fingerprint_of(config, dataset)
        if heldout.is_shared(config, dataset):
            inputs[f"{role}: held-out share"] = str(config.data[dataset].heldout)
        trained_on = heldout.role_split(role, isinstance(stage, TrainingStage)) == heldout.TRAIN
        if trained_on and (removed := read.removed(dataset)):
            inputs[f"{role}: held-out prompts in it"] = removed
    for field, reference in functions_of(stage):
        files = functions.sources_of(reference, config.folder, f"stages.{name}.{field}")
        if len(files) == 1:
            inputs[f"function {reference}"] = manifest.file_digest(files[0])
        elif files:
            inputs[f"function {reference}"] = digest(sorted([file.name, manifest.file_digest(file)] for file in files))
    return inputs


def identify(config: RunConfig, name: str, recorded: Manifest, read: Datasets | None = None) -> Identity:
    """The identity of a stage whose parents are finished; a parent that is not has an empty digest."""
    inputs = _data_inputs(config, name, read or Datasets(config))
    if config.model.path:
        inputs["base model"] = basemodel.digest_of(config)
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
    read = Datasets(config)
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


def ancestors(config: RunConfig, name: str, needs: Callable[[Stage], Iterable[str]] | None = None) -> list[str]:
    """The stages `name` takes something from (or those that it `needs`), at any distance, in order."""
    needed = {name}
    for other in reversed(config.stages):
        if other in needed:
            stage = config.stages[other]
            needed |= set(needs(stage) if needs else parents(stage).values())
    return [other for other in config.stages if other in needed and other != name]


def descendants(config: RunConfig, name: str) -> list[str]:
    """The stages that take something from `name`, at any distance."""
    return [other for other in config.stages if name in ancestors(config, other)]


def open_run(config: RunConfig) -> Manifest:
    """The manifest of the config's run folder, empty before the first run.

    Raises:
        UserError: if it is damaged or belongs to a run of another name, or the folder is no run folder.
    """
    found = manifest.read(config.run_path)
    runfolder.check(config, found)
    recorded = found or Manifest(name=config.name)
    if recorded.name != config.name:
        seen = f"holds the run {recorded.name!r}, this config is {config.name!r}"
        raise UserError(f"{config.run_path} {seen}; give another `run_dir`, or the name of that run")
    if recorded.stages and recorded.tokenizer is None:
        fault = "damaged: it has finished stages but no tokenizer. Restore it from a copy"
        raise UserError(f"{config.run_path / manifest.FILE}: {fault}")
    return recorded


def _tokenizer_source(config: RunConfig) -> str:
    """Digest of everything the run's tokenizer is made from."""
    settings = config.tokenizer.model_dump()
    template = config.folder / (settings["chat_template"] or "")
    if template.is_file():
        settings["chat_template"] = manifest.file_digest(template)
    if config.model.path:
        return digest([settings, basemodel.digest_of(config)])
    scratch = config.model.scratch.tokenizer
    content = [sources.fingerprint_of(config, name) for name in scratch.data]
    return digest([settings, scratch.vocab_size, content])


def tokenizer_of(config: RunConfig, recorded: Manifest) -> tuple[Any, TokenizerRecord]:
    """The run's tokenizer with its record: the saved one while what it is made from is unchanged, else a new one.

    Raises:
        UserError: if a new one differs from the one that finished stages were made with.
    """
    source, saved, old = _tokenizer_source(config), config.run_path / "tokenizer", recorded.tokenizer
    if old and old.source == source and saved.is_dir():
        return _as_recorded(saved, old, config.model.trust_remote_code), old
    tokenizer = tokenizers.build(config)
    made = TokenizerRecord(
        source=source,
        fingerprint=tokenizers.fingerprint(tokenizer),
        pad_token=tokenizer.pad_token,
        eos_token=tokenizer.eos_token,
        template=digest(tokenizer.chat_template),
    )
    if recorded.stages and old.fingerprint != made.fingerprint:
        template = "unchanged" if old.template == made.template else "changed"
        raise UserError(
            f"finished with another tokenizer than the config now gives: {', '.join(recorded.stages)} (pad "
            f"{old.pad_token!r} -> {made.pad_token!r}, eos {old.eos_token!r} -> {made.eos_token!r}, chat template "
            f"{template}). Undo the change, give a new `run_dir`, or give `--redo` of the first stages"
        )
    return tokenizer, made


def _as_recorded(saved: Path, old: TokenizerRecord, trust_remote_code: bool) -> Any:
    """The run's saved tokenizer, which is still the one on record: cached rows are looked up by its fingerprint."""
    tokenizer = tokenizers.open_saved(saved, trust_remote_code)
    if tokenizers.fingerprint(tokenizer) != old.fingerprint:
        mend = "Restore that folder, or remove it: it is made again then"
        raise UserError(f"{saved} is not the tokenizer this run was started with. {mend}")
    return tokenizer


def prepare_run(config: RunConfig) -> Manifest:
    """Make sure that the run folder has its manifest and tokenizer; the first write to a run folder."""
    recorded = open_run(config)
    tokenizer, made = tokenizer_of(config, recorded)
    manifest.update(config.run_path, config.name)  # from here on what lies in the folder is the run's
    saved = config.run_path / "tokenizer"
    # The base's folder as it is here: whoever loads an output from the run folder does not know the config's place.
    path = config.model.path and config.resolve(config.model.path)
    model = config.model.model_dump(mode="json", exclude={"scratch"}) | {"path": path}
    model["quantization"] = config.quantization
    model["commit"] = basemodel.commit_of(config, recorded)  # later stages load the same, whatever the hub has then
    if recorded.tokenizer == made and saved.is_dir():
        return recorded if recorded.model == model else manifest.update(config.run_path, config.name, model=model)
    try:
        tokenizer.save_pretrained(saved)
    except OSError as error:
        raise UserError(f"run_dir: cannot write to {config.run_path}: {error.strerror}") from None
    return manifest.update(config.run_path, config.name, tokenizer=made, model=model)
