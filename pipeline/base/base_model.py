"""The base model of a run: what its files hold, and which of a hub model's commits the run uses."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from filelock import FileLock
from transformers import AutoConfig
from transformers.utils.hub import cached_file, extract_commit_hash

from pipeline.config.schema import RunConfig
from pipeline.records import manifest
from pipeline.records.manifest import Manifest
from pipeline.system import digests
from pipeline.system.cache import cache_folder
from pipeline.system.errors import UserError, reason_of

_FILES = (".safetensors", ".bin", ".json", ".jinja", ".model", ".txt", ".py")
_SETTLED = 2  # seconds; a file that was written just now may be written again at the same time


def digest_of(config: RunConfig) -> str:
    """Digest of the base model: of what its files hold, or of its hub id and revision."""
    where = Path(config.resolve(config.model.path))
    if not where.is_dir():
        return digests.digest([config.model.path, config.model.revision])
    files = sorted(file for file in where.iterdir() if file.suffix in _FILES)
    with ThreadPoolExecutor() as pool:
        return digests.digest(list(zip([file.name for file in files], pool.map(_weights_digest, files), strict=True)))


def commit_of(config: RunConfig, recorded: Manifest | None) -> str | None:
    """The commit of the hub model that the run has used since its first stage; before that the newest of its revision.

    None of a folder, and of a model from scratch.

    Raises:
        UserError: if the hub, and its cache, have no such model.
    """
    model = config.model
    if not model.path or Path(config.resolve(model.path)).is_dir():
        return None
    known = {} if recorded is None else recorded.model
    if known.get("commit") and (known["path"], known["revision"]) == (model.path, model.revision):
        return known["commit"]
    try:
        file = cached_file(model.path, "config.json", revision=model.revision)
    except OSError as error:
        raise unreadable(config, "model", error) from None
    return extract_commit_hash(file, None)


def unreadable(config: RunConfig, what: str, error: Exception) -> UserError:
    """What to say where the base's `what` (model or tokenizer) cannot be loaded."""
    if "trust_remote_code" in str(error):
        seen = f"{config.model.path!r} has code of its own, which is run with your consent only"
        mend = "look at its .py files, then set model.trust_remote_code to true"
        return UserError(f"model.trust_remote_code: {seen}; {mend}")
    mend = "expected a hub id, or a folder with all files of a model"
    return UserError(f"model.path: no {what} at {config.model.path!r}: {reason_of(error)}; {mend}")


def revision_of(config: RunConfig) -> str | None:
    """What to load the base model by: the commit that the run has used so far, else the config's revision."""
    recorded = manifest.read(config.run_path)
    if recorded is None or "commit" not in recorded.model:
        return config.model.revision
    return commit_of(config, recorded) or config.model.revision


def _weights_digest(file: Path) -> str:
    """Digest of a file that may have many gigabytes, kept from run to run by its path, size and times."""
    look = file.stat()
    key = digests.digest([str(file.resolve()), look.st_size, look.st_mtime_ns, look.st_ctime_ns, look.st_ino])
    kept = cache_folder() / "digests" / key
    with contextlib.suppress(OSError):
        return kept.read_text()
    found = digests.file_digest(file)
    if time.time() - look.st_mtime > _SETTLED:
        with contextlib.suppress(OSError):  # without a cache it is only slower
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_name("part")  # the same for all, so that what a killed process leaves is replaced
            with FileLock(kept.with_name(".lock")):
                part.write_text(found)
                part.replace(kept)
    return found


def architecture(config: RunConfig) -> Any:
    """The config of the run's base model.

    Raises:
        UserError: if there is none, or it needs code that may not run.
    """
    model = config.model
    if model.scratch:
        return AutoConfig.for_model(**model.scratch.architecture)
    options = {"revision": revision_of(config), "trust_remote_code": model.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(config.resolve(model.path), **options)
    except (OSError, ValueError) as error:
        raise unreadable(config, "model", error) from None
