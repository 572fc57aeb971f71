"""Open a run's folder and prepare it: what somebody else keeps there is never written over."""

from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.base import base_model, dtype
from pipeline.config.schema import RunConfig
from pipeline.data import fingerprints
from pipeline.records import manifest
from pipeline.records.manifest import Manifest, TokenizerRecord
from pipeline.records.stage_folder import CHECKPOINTS, GATE, HISTORY, LOCK, LOG, PROGRESS, TRACKING
from pipeline.system import digests
from pipeline.system.digests import digest
from pipeline.system.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SIGNS = (LOCK, f"{CHECKPOINTS}/identity.txt", HISTORY, TRACKING)


def check(config: RunConfig, recorded: Manifest | None) -> None:
    """Look at the run folder before anything is written to it; `recorded` is its manifest.

    A stage begins by removing what is left of an earlier try, so its folder must be one that a run has made.

    Raises:
        UserError: if the folder lies within another run, or holds files where this run would put its own.
    """
    folder = config.run_path
    if recorded is None:
        _check_above(folder)
    finished = {} if recorded is None else recorded.stages
    names = [name for name in config.stages if name not in finished]
    foreign = [folder / name for name in names if _is_foreign(folder / name)]
    if recorded is None and _holds_files(folder / "tokenizer"):
        foreign.append(folder / "tokenizer")
    if foreign:
        fault = f"{foreign[0]} holds files that no run has put there, and this run would write over them"
        mend = "give another `run_dir`, or move those files away"
        raise UserError(f"run_dir: {fault}; {mend}")


def _check_above(folder: Path) -> None:
    """Refuse a run folder within another one."""
    for above in folder.parents:
        if manifest.is_run(above):
            raise UserError(f"run_dir: {folder} lies within the run folder {above}; give another `run_dir`")


def _is_foreign(folder: Path) -> bool:
    """Tell whether somebody else's files lie where a stage would have its folder."""
    if folder.is_dir():
        return _holds_files(folder) and not any((folder / sign).exists() for sign in _SIGNS)
    return folder.exists() or folder.is_symlink()


def _holds_files(folder: Path) -> bool:
    """Tell whether a folder holds other files than those that a run makes before it does anything else."""
    return folder.is_dir() and any(path.name not in (LOCK, LOG, GATE, PROGRESS) for path in folder.iterdir())


def open_run(config: RunConfig) -> Manifest:
    """Read the manifest of the config's run folder; it is empty before the first run.

    Raises:
        UserError: if it is damaged or belongs to a run of another name, or the folder is no run folder.
    """
    recorded = manifest.read(config.run_path)
    check(config, recorded)
    if recorded is None:
        return Manifest(name=config.name)
    if recorded.name != config.name:
        fault = f"holds the run {recorded.name!r}, this config is {config.name!r}"
        raise UserError(f"{config.run_path} {fault}; give another `run_dir`, or the name of that run")
    if recorded.stages and recorded.tokenizer is None:
        fault = "damaged: it has finished stages but no tokenizer. Restore it from a copy"
        raise UserError(f"{config.run_path / manifest.FILE}: {fault}")
    return recorded


def tokenizer_of(config: RunConfig, recorded: Manifest) -> "tuple[PreTrainedTokenizerFast, TokenizerRecord]":
    """Return the run's tokenizer and its record: the saved one while what it is made from is unchanged, or a new one.

    Raises:
        UserError: if a new one differs from the one that finished stages were made with.
    """
    from pipeline.data import run_tokenizer

    source = source_of_tokenizer(config)
    saved = config.run_path / "tokenizer"
    before = recorded.tokenizer
    if before is not None and before.source == source and saved.is_dir():
        return _as_recorded(saved, before, config.model.trust_remote_code), before
    tokenizer = run_tokenizer.build(config)
    now = TokenizerRecord(
        source=source,
        fingerprint=run_tokenizer.fingerprint(tokenizer),
        pad_token=str(tokenizer.pad_token),
        eos_token=str(tokenizer.eos_token),
        template=digest(tokenizer.chat_template),
    )
    if recorded.stages and before is not None and before.fingerprint != now.fingerprint:
        template = "unchanged" if before.template == now.template else "changed"
        raise UserError(
            f"finished with another tokenizer than the config now gives: {', '.join(recorded.stages)} (pad "
            f"{before.pad_token!r} -> {now.pad_token!r}, eos {before.eos_token!r} -> {now.eos_token!r}, chat template "
            f"{template}). Undo the change, give a new `run_dir`, or give `--redo` of the first stages"
        )
    return tokenizer, now


def source_of_tokenizer(config: RunConfig) -> str:
    """Return a digest of everything that the run's tokenizer is made from."""
    settings = config.tokenizer.model_dump()
    template = config.folder / (settings["chat_template"] or "")
    if template.is_file():
        settings["chat_template"] = digests.file_digest(template)
    if config.model.scratch is None:
        return digest([settings, base_model.fingerprint(config)])
    scratch = config.model.scratch.tokenizer
    content = [fingerprints.of_dataset(name, config.data[name], config.folder) for name in scratch.data]
    return digest([settings, scratch.vocab_size, content])


def _as_recorded(saved: Path, record: TokenizerRecord, trust_remote_code: bool) -> "PreTrainedTokenizerFast":
    """Open the run's saved tokenizer. Cached rows are looked up by the fingerprint on record.

    Raises:
        UserError: if it is another tokenizer than the one on record.
    """
    from pipeline.data import run_tokenizer

    tokenizer = run_tokenizer.open_saved(saved, trust_remote_code)
    if run_tokenizer.fingerprint(tokenizer) != record.fingerprint:
        mend = "Restore that folder, or remove it: it is made again then"
        raise UserError(f"{saved} is not the tokenizer this run was started with. {mend}")
    return tokenizer


def prepare_run(config: RunConfig) -> Manifest:
    """Make sure that the run folder has its manifest and tokenizer; this is the first write to a run folder."""
    recorded = open_run(config)
    tokenizer, tokenizer_record = tokenizer_of(config, recorded)
    manifest.update(config.run_path, config.name)  # from here on what lies in the folder is the run's
    saved = config.run_path / "tokenizer"
    # The base's folder as it is here: whoever loads an output from the run folder does not know the config's place.
    path = config.model.path and config.resolve(config.model.path)
    model = config.model.model_dump(mode="json", exclude={"scratch"}) | {"path": path}
    model["dtype"] = dtype.choose(config).dtype
    model["quantization"] = config.quantization
    model["commit"] = base_model.commit_of(config, recorded)  # later stages load the same, whatever the hub has then
    if recorded.tokenizer == tokenizer_record and saved.is_dir():
        return recorded if recorded.model == model else manifest.update(config.run_path, config.name, model=model)
    try:
        tokenizer.save_pretrained(saved)
    except OSError as error:
        raise UserError(f"run_dir: cannot write to {config.run_path}: {error.strerror}") from None
    return manifest.update(config.run_path, config.name, tokenizer=tokenizer_record, model=model)
