"""Keep from one command to the next what is slow to find out, as JSON in the cache folder.

Nothing depends on it: an entry that is not there, damaged, or cannot be written is found out again. An entry is looked
up by everything that it depends on, and is never changed.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipeline.system import digests
from pipeline.system.cache import cache_folder

_PACKAGE = Path(__file__).resolve().parents[1]
_DEVICES = ("nvidia", "kfd", "dxg", "accel", "davinci")  # NVIDIA, AMD, Windows' subsystem, Gaudi, Ascend
_OURS = (".py", ".jinja")
_DISTRIBUTIONS = (".dist-info", ".egg-info")
# Beginnings of variables that libraries read when they are imported or when options are checked.
_VARIABLES = (
    "ACCELERATE_",
    "BNB_",
    "CUDA_",
    "FSDP_",
    "HF_",
    "PYTORCH_",
    "TORCH_",
    "TRANSFORMERS_",
    "TRL_",
    "USE_",
)


def recall(kind: str, key: str) -> Any:
    """Return the value kept under a key, or None."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError, RecursionError):
        entry = json.loads(_file(kind, key).read_text(encoding="utf-8"))
        if entry["digest"] == digests.digest(entry["value"]):
            return entry["value"]
    return None


def keep(kind: str, key: str, value: Any) -> None:
    """Keep a JSON-like value, which is not None, under a key. What is half written counts as damaged."""
    file = _file(kind, key)
    entry = {"digest": digests.digest(value), "value": value}
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(entry), encoding="utf-8")


def remembered(kind: str, key_of: Callable[[], str | None], find_out: Callable[[], Any]) -> Any:
    """Return what was kept under a key, or find it out and keep it, unless the key changed meanwhile.

    A key is None where nothing may be kept.
    """
    key = key_of()
    value = None if key is None else recall(kind, key)
    if value is None:
        value = find_out()
        if key is not None and key == key_of():
            keep(kind, key, value)
    return value


def _file(kind: str, key: str) -> Path:
    return cache_folder() / "kept" / kind / f"{key}.json"


@functools.cache
def installation() -> str:
    """Return a digest of what decides how this package works: its files, Python, and all packages with their versions.

    The names of the folders that pip writes hold the versions, so that nothing is imported. The accelerators count too:
    libraries refuse options that they cannot have here, and the cache folder may be that of several machines.
    """
    files = sorted(path for path in _PACKAGE.rglob("*") if path.suffix in _OURS)
    ours = [[str(path.relative_to(_PACKAGE)), digests.file_digest(path)] for path in files]
    return digests.digest([sys.version, sorted(_distributions(sys.path)), ours, _accelerators()])


def _accelerators() -> list[str]:
    """Return the devices of the drivers of GPUs, as the system lists them."""
    with contextlib.suppress(OSError):
        return sorted(name for name in os.listdir("/dev") if name.startswith(_DEVICES))  # noqa: PTH208
    return []


def _distributions(folders: Iterable[str]) -> set[str]:
    """Return the packages installed in these folders, as `name-version.dist-info`."""
    names: set[str] = set()
    for folder in folders:
        with contextlib.suppress(OSError):
            names |= {name for name in os.listdir(folder or ".") if name.endswith(_DISTRIBUTIONS)}  # noqa: PTH208
    return names


def environment() -> dict[str, str]:
    """Return the variables that libraries may read while something is checked.

    Which GPU a stage gets does not count: options are tried out on the CPU.
    """
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}
    variables.pop("CUDA_VISIBLE_DEVICES", None)
    return variables
