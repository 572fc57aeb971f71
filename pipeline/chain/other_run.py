"""Look at a stage of another run that is to be taken: it is what its record says, and fits this run. Copy it.

The other run's folder is only read, without its locks. What was copied is compared with the checksums on record, so a
stage that runs again meanwhile is noticed.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pipeline.base import base_model
from pipeline.config.schema import RunConfig, Taken
from pipeline.config.taken import folder_of, stage_of
from pipeline.records import manifest
from pipeline.records.finished import Finished
from pipeline.records.manifest import Manifest, Origin, TokenizerRecord
from pipeline.system.digests import file_digest
from pipeline.system.errors import UserError

SAME_ARCHITECTURE = (
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)


def find(config: RunConfig, name: str) -> Finished:
    """Find the stage that `name` is taken from.

    Raises:
        UserError: if the other run's folder or its record is gone, or its manifest is damaged.
    """
    section = config.section(name, Taken)
    folder = folder_of(config, section)
    stage = stage_of(section)
    recorded = manifest.read(folder)
    if recorded is None:
        raise UserError(f"there is no run in {section.run}")
    if stage not in recorded.stages:
        raise UserError(f"stage {stage!r} of {section.run} is not finished")
    return Finished(folder, recorded, stage)


def fitting(config: RunConfig, name: str, recorded: Manifest, tokenizer: TokenizerRecord) -> Finished:
    """Find the stage that `name` is taken from; `recorded`, `tokenizer`: what this run has on record, and uses.

    Raises:
        UserError: if it is not there, or of another tokenizer or base model.
    """
    source = find(config, name)
    _check_tokenizer(source, tokenizer)
    _check_base(config, source, config.section(name, Taken), recorded)
    return source


def check(config: RunConfig, name: str, recorded: Manifest, tokenizer: TokenizerRecord) -> None:
    """Check that the other run's stage can be taken, and that its files are as recorded; see `fitting`.

    Raises:
        UserError: with what does not fit, or the file that is damaged.
    """
    try:
        fitting(config, name, recorded, tokenizer).verify()
    except UserError as error:
        raise UserError(f"stages.{name}: {error}") from None


def _check_tokenizer(source: Finished, tokenizer: TokenizerRecord) -> None:
    other = source.recorded.tokenizer
    if other is not None and other.fingerprint == tokenizer.fingerprint == source.record.tokenizer:
        return
    differs = "its vocabulary or rules differ"
    if other is not None:
        pairs = {"pad": (other.pad_token, tokenizer.pad_token), "eos": (other.eos_token, tokenizer.eos_token)}
        words = [f"{key} is {there!r} there and {here!r} here" for key, (there, here) in pairs.items() if there != here]
        if other.template != tokenizer.template:
            words.append("the chat template differs")
        differs = ", ".join(words) or differs
    mend = "give this config the same model and `tokenizer` section as that run's"
    raise UserError(f"{source.run_dir} has another tokenizer than this run: {differs}; {mend}")


def _check_base(config: RunConfig, source: Finished, stage: Taken, recorded: Manifest) -> None:
    """Compare the base models: an adapter needs the one that it was trained on, full weights one of their sizes."""
    if stage.weights != "on base":
        _check_sizes(config, source)
        return
    model = source.recorded.model
    its_own = source.record.output.full is not None  # full weights of that run are this run's base
    there = None if its_own else model.get("quantization")
    if config.quantization != there:
        fault = f"its adapter was trained on a base with `quantization: {json.dumps(there)}`"
        raise UserError(f"{fault}, this config has {json.dumps(config.quantization)}; say the same")
    if its_own or _is_same_base(config, source, recorded):
        return
    base = model.get("path")
    commit = "" if model.get("commit") is None else f" (commit {model['commit']}; `model.revision` names it)"
    here = config.model.path or "a model from scratch"
    raise UserError(f"it is an adapter on {base}{commit}, and not on this run's base model, {here}; set `model` to it")


def _is_same_base(config: RunConfig, source: Finished, recorded: Manifest) -> bool:
    if config.model.path is None:
        return False
    if base_model.fingerprint(config) == source.record.inputs.get("base model"):
        here = base_model.commit_of(config, recorded)
        return here == source.recorded.model.get("commit")
    commit = source.recorded.model.get("commit")  # one config may name the commit that the other's branch stands for
    is_same_hub_model = commit is not None and config.model.path == source.recorded.model.get("path")
    return is_same_hub_model and base_model.commit_of(config, recorded) == commit


def _check_sizes(config: RunConfig, source: Finished) -> None:
    """Compare the sizes of full weights with those of this run's base model, by which a plan counts."""
    from transformers import AutoConfig

    output = source.record.output
    path = output.path if output.kind == "full" else output.full
    assert path is not None, "it brings full weights"
    try:
        there = AutoConfig.from_pretrained(source.run_dir / path, trust_remote_code=config.model.trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(f"{source.run_dir / path}: {error}") from None
    here = base_model.architecture(config).get_text_config()
    there = there.get_text_config()
    for key in SAME_ARCHITECTURE:
        values = getattr(there, key, None), getattr(here, key, None)
        if values[0] != values[1]:
            fault = f"its weights are of another model than this run's base: `{key}` is {values[0]} there"
            raise UserError(f"{fault} and {values[1]} here; set `model` to what that run has, or to its pretrain stage")


def copy(source: Finished, output: Path, merged: Path | None) -> None:
    """Copy the stage's output, and for `merged` the full weights below its adapter; compare what was copied.

    Raises:
        UserError: if a file is gone, or is not what the record says.
    """
    folders = {source.record.output.path: output}
    if merged is not None:
        shutil.rmtree(merged, ignore_errors=True)
        assert source.record.output.full is not None, "there are full weights below the adapter"
        folders[source.record.output.full] = merged
    for path, expected in source.files().items():
        for folder, target in folders.items():
            if PurePosixPath(path).is_relative_to(folder):
                _copy_file(source.run_dir / path, target / PurePosixPath(path).relative_to(folder), expected)


def _copy_file(path: Path, target: Path, expected: str) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        shutil.copyfile(path, target)
    except FileNotFoundError:
        raise UserError(
            f"{path} is missing; its stage may be running again. Give the same command afterwards"
        ) from None
    if file_digest(target) != expected:
        raise UserError(f"{path} is not what its record says; its stage may be running again, or it is damaged")


def origin_of(config: RunConfig, name: str, source: Finished) -> Origin:
    """Return what to record of where a stage was taken from."""
    section = config.section(name, Taken)
    stages = {other: source.recorded.stages[other] for other in _lineage(source)}
    return Origin(
        run=section.run,
        path=str(source.run_dir),
        name=source.recorded.name,
        stage=source.stage,
        stages=stages,
    )


def _lineage(source: Finished) -> Iterator[str]:
    """Yield the stage and all that it was made from, in the order of the manifest, which is that of time."""
    needed = {source.stage}
    for name, record in reversed(source.recorded.stages.items()):
        if name in needed:
            needed |= set(record.parents.values())
    return (name for name in source.recorded.stages if name in needed)
