"""Look up the base model of a run: what its files hold, and which of a hub model's commits the run uses.

transformers is imported where it is needed: what is on record and the digests of files tell most commands enough.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pipeline.config.schema import RunConfig
from pipeline.records import manifest
from pipeline.records.manifest import Manifest
from pipeline.system import digests
from pipeline.system.cache import cache_folder
from pipeline.system.errors import UserError, reason_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
_SETTLED = 2  # seconds; a file that was written just now may be written again at the same time


def location(config: RunConfig) -> str:
    """Return the folder or the hub id of the base model; a run from scratch has none."""
    path = config.model.path
    assert path is not None, "a run from scratch has no base model"
    return config.resolve(path)


def hub_options(config: RunConfig) -> dict[str, Any]:
    """Return how transformers loads the base's config, tokenizer and weights: its commit, its own code or not."""
    return {"revision": revision_of(config), "trust_remote_code": config.model.trust_remote_code}


def fingerprint(config: RunConfig) -> str:
    """Return the digest of what the base model's files hold, or of its hub id and revision."""
    folder = Path(location(config))
    if not folder.is_dir():
        return digests.digest([config.model.path, config.model.revision])
    return fingerprint_of_folder(folder)


def fingerprint_of_folder(folder: Path) -> str:
    """Return the digest of what the files of a base model in a folder hold."""
    files = sorted(file for file in folder.iterdir() if file.suffix in _FILES)
    names = [file.name for file in files]
    with ThreadPoolExecutor() as pool:
        return digests.digest(list(zip(names, pool.map(_file_digest, files), strict=True)))


def settled_state(config: RunConfig, recorded: Manifest | None) -> Any:
    """Return what the base model's files hold; None of a hub model of which the run has used no commit yet.

    A hub model without a commit may be another one the next time.
    """
    if config.model.path is None:
        return []
    commit = _recorded_commit(config, recorded)
    is_settled = commit is not None or Path(location(config)).is_dir()
    return [fingerprint(config), commit] if is_settled else None


def commit_of(config: RunConfig, recorded: Manifest | None) -> str | None:
    """Return the commit of the hub model that the run has used since its first stage, or at first the newest one.

    A folder and a model from scratch have no commit: None.

    Raises:
        UserError: if the hub, and its cache, have no such model.
    """
    model = config.model
    if not model.path or Path(location(config)).is_dir():
        return None
    commit = _recorded_commit(config, recorded)
    if commit is not None:
        return commit
    from transformers.utils.hub import cached_file, extract_commit_hash

    try:
        file = cached_file(model.path, "config.json", revision=model.revision)
    except OSError as error:
        raise unreadable(config, "model", error) from None
    return extract_commit_hash(file, None)


def _recorded_commit(config: RunConfig, recorded: Manifest | None) -> str | None:
    """Return the commit on record, if it is one of the config's model and revision."""
    model = {} if recorded is None else recorded.model
    is_the_same = model.get("path") == config.model.path and model.get("revision") == config.model.revision
    return model.get("commit") if is_the_same else None


def unreadable(config: RunConfig, what: str, error: Exception) -> UserError:
    """Return the error for a base whose `what` (model or tokenizer) cannot be loaded."""
    if "trust_remote_code" in str(error):
        fault = f"{config.model.path!r} has code of its own, which is run with your consent only"
        mend = "look at its .py files, then set model.trust_remote_code to true"
        return UserError(f"model.trust_remote_code: {fault}; {mend}")
    mend = "expected a hub id, or a folder with all files of a model"
    path = str(config.model.path)
    folder = (config.folder / Path(path).expanduser()).resolve()
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not folder.exists():  # it can be no hub id
        return UserError(f"model.path: there is no folder {folder}; {mend}")
    return UserError(f"model.path: no {what} at {config.model.path!r}: {reason_of(error)}; {mend}")


def revision_of(config: RunConfig) -> str | None:
    """Return the revision to load: the commit that the run has used so far, else the config's revision."""
    recorded = manifest.read(config.run_path)
    if recorded is None or "commit" not in recorded.model:
        return config.model.revision
    return commit_of(config, recorded) or config.model.revision


def _file_digest(file: Path) -> str:
    """Return the digest of a file that may have many gigabytes; it is cached by the file's path, size and times."""
    state = file.stat()
    key = digests.digest([str(file.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino])
    entry = cache_folder() / "digests" / key
    with contextlib.suppress(OSError):
        return entry.read_text()
    digest = digests.file_digest(file)
    if time.time() - state.st_mtime > _SETTLED:
        with contextlib.suppress(OSError):  # without a cache it is only slower
            entry.parent.mkdir(parents=True, exist_ok=True)
            partial = entry.with_name("part")  # the same for all, so that what a killed process leaves is replaced
            with FileLock(entry.with_name(".lock")):
                partial.write_text(digest)
                partial.replace(entry)
    return digest


def options_on_record(recorded: Manifest) -> dict[str, Any]:
    """Return how a run loads its base model, as it is on record: the fields of its `Loader` that are about the base."""
    model = recorded.model
    return {
        "base": model.get("path") or "",
        "dtype": model.get("dtype", "float32"),
        "revision": model.get("commit") or model.get("revision"),
        "trust_remote_code": model.get("trust_remote_code", False),
        "quantization": model.get("quantization"),
    }


def num_positions(config: "PretrainedConfig") -> int | None:
    """Return how many positions a model has; None if it names no limit."""
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    return positions if isinstance(positions, int) and positions > 0 else None  # some models name 0 or -1


def architecture(config: RunConfig) -> "PretrainedConfig":
    """Return the transformers config of the run's base model.

    Raises:
        UserError: if there is none, or it needs code that may not run.
    """
    from transformers import AutoConfig

    model = config.model
    if model.scratch:
        return AutoConfig.for_model(**model.scratch.architecture)
    try:
        return AutoConfig.from_pretrained(location(config), **hub_options(config))
    except (OSError, ValueError) as error:
        raise unreadable(config, "model", error) from None
