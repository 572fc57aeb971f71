"""Prepare the folder of an export: what somebody else keeps there is never written over, and none is left half done.

An export is made in a folder beside its target, which gets its name when everything has been compared.
"""

import contextlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from pipeline.records import manifest
from pipeline.system import digests
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

REPLACED = "replaced"  # an older export, until the new one has its place
FILE = "rlhf_export.json"  # what an export is of, its figures, and the checksums of its other files


def check(target: Path, force: bool) -> None:
    """Look at the target before any work.

    Raises:
        UserError: if something is there that must stay.
    """
    for above in target.parents:
        if manifest.is_run(above):
            raise UserError(f"--to: {target} lies within the run folder {above}; give a folder outside of it")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise UserError(f"--to: {target} is a file; give a folder")
    if target.is_mount():
        raise UserError(f"--to: {target} is a mount point, which cannot be replaced; give a folder in it")
    if not any(target.iterdir()):
        return
    files = _files_of(target)
    if files is None:
        raise UserError(f"--to: {target} holds files that are no export; give another folder")
    foreign = sorted(name for name in _names_in(target) if name not in files and name != FILE)
    if foreign:
        raise UserError(f"--to: {target} holds {foreign[0]}, which belongs to no export; move it away")
    if not force:
        raise UserError(f"--to: {target} holds an export already; give `--force` to replace it")


def _files_of(folder: Path) -> dict[str, str] | None:
    """Return the checksums of an export's files; None if the folder holds no export."""
    try:
        about = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    files = about.get("files") if isinstance(about, dict) else None
    return files if isinstance(files, dict) else None


def _names_in(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Make a folder beside the target, to work in; it is removed at the end, whatever happens.

    What a killed process of this machine has left there is removed first; an export that it had put aside goes back.
    """
    start = f".{target.name}.{socket.gethostname()}-"
    target.parent.mkdir(parents=True, exist_ok=True)
    for path in target.parent.glob(f"{_escaped(start)}*.part"):
        number = path.name.removeprefix(start).removesuffix(".part")
        # In a container the dead process may have had the number of this one.
        is_over = number.isdecimal() and (int(number) == os.getpid() or not psutil.pid_exists(int(number)))
        if is_over:
            if (path / REPLACED).exists() and not target.exists():  # it was killed between two renames
                (path / REPLACED).rename(target)
            shutil.rmtree(path, ignore_errors=True)
    work = target.parent / f"{start}{os.getpid()}.part"
    work.mkdir()
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _escaped(name: str) -> str:
    """Return a name for `glob` to find as it is."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)


def seal(folder: Path, about: JsonObject) -> None:
    """Write the file that makes a folder an export, with the checksums of all others."""
    files = digests.checksums(folder, [folder])
    text = json.dumps(about | {"files": files}, indent=1, default=str) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def put(output: Path, target: Path, work: Path, force: bool) -> None:
    """Give the finished export its place; an older one is gone only when the new one is there.

    Raises:
        UserError: if somebody has put something there meanwhile.
    """
    check(target, force)
    replaced = work / REPLACED
    try:
        if target.exists():
            target.rename(replaced)
        output.rename(target)
    except BaseException:  # a signal too
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise


def read(folder: Path) -> JsonObject:
    """Read what an export says of itself, and compare its files with their checksums.

    Raises:
        UserError: if the folder is no export, or a file is gone, changed or new.
    """
    files = _files_of(folder)
    if files is None:
        raise UserError(f"{folder}: no {FILE} here; expected a folder that `rlhf export` has written")
    for name, expected in files.items():
        path = folder / name
        if not path.is_file() or digests.file_digest(path) != expected:
            fault = "has changed since it was exported" if path.is_file() else "is missing"
            raise UserError(f"{path} {fault}. Export the stage again")
    foreign = sorted(set(_names_in(folder)) - files.keys() - {FILE})
    if foreign:
        raise UserError(f"{folder / foreign[0]} is no file of the export; move it away")
    return json.loads((folder / FILE).read_text(encoding="utf-8"))
