"""The folder of labels: begun in one step, opened by one command at a time, and never inside a run.

A run folder may be made anew; hours of a person's work are not to go with it. So labels have a folder of their own,
by default `labels/RUN/NAME` in the working directory, as runs have `runs/RUN`.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.label import pairs
from pipeline.label.pairs import Pair
from pipeline.records import manifest
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

FILE = "label.json"  # written last: labels without it were never begun
COMPARISONS = "comparisons.jsonl"
PAIRS = "pairs.jsonl"
ANSWERS = "answers.jsonl"
_LOCK = ".lock"
_OURS = {FILE, COMPARISONS, PAIRS, ANSWERS, _LOCK}


def check(target: Path) -> None:
    """Look at the folder before any work.

    Raises:
        UserError: if labels cannot be there, or something else is.
    """
    for place in (target, *target.parents):
        if manifest.is_run(place):
            raise UserError(f"--to: {target} lies within the run folder {place}; give a folder outside of it")
    if target.suffix == ".jsonl" and not target.is_dir():
        raise UserError(f"--to: {target} is a file's name; give a folder, in which {COMPARISONS} will be")
    if not target.exists() and not target.is_symlink():
        return
    if not target.is_dir():
        raise UserError(f"--to: {target} is a file; give a folder")
    foreign = sorted(path.name for path in target.iterdir() if path.name.removesuffix(".tmp") not in _OURS)
    if foreign:
        raise UserError(f"--to: {target} holds {foreign[0]}, which belongs to no labels; give another folder")


@contextlib.contextmanager
def held(target: Path) -> Iterator[None]:
    """Make the folder, and keep other commands from it. A killed command holds it no longer.

    If no labels have begun in the block, nothing is left of the folder.

    Raises:
        UserError: if another command has it.
    """
    target.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(target / _LOCK).acquire(timeout=2)
    except Timeout:
        raise UserError(f"{target} is open in another `rlhf label`; go on there, or end it first") from None
    with lock:
        try:
            yield
        finally:
            if {path.name for path in target.iterdir()} == {_LOCK}:
                (target / _LOCK).unlink()
                with contextlib.suppress(OSError):  # another command may have come
                    target.rmdir()


def read(target: Path) -> JsonObject | None:
    """Read what labels say of themselves; None if none have begun here.

    Raises:
        UserError: if the file is damaged.
    """
    file = target / FILE
    try:
        about = json.loads(file.read_bytes())
        if isinstance(about, dict) and isinstance(about.get("settings"), dict):
            return about
    except FileNotFoundError:
        if (target / ANSWERS).exists():
            mend = f"restore {FILE}, or move the folder away to begin anew"
            raise UserError(f"{target}: holds answers, and {FILE} is gone; {mend}") from None
        return None
    except ValueError:
        pass
    raise UserError(f"{file}: damaged: expected what `rlhf label` writes. Restore it, or move the folder away")


def begin(target: Path, about: JsonObject, sampled: Sequence[Pair]) -> None:
    """Write the pairs, then the file that makes them labels."""
    pairs.write(target / PAIRS, sampled)
    replace(target / FILE, as_text(about))


def as_text(about: JsonObject) -> str:
    return json.dumps(about, indent=1, ensure_ascii=False, default=str) + "\n"


def replace(file: Path, text: str) -> None:
    """Write a file in one step: a reader, or a kill, sees the old one or the new one."""
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(file)
