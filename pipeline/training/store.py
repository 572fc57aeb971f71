"""Keep values that cost much to compute in the run's cache folder: completions of policies, scores of completions."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock

from pipeline.system.processes import same_everywhere

Value = TypeVar("Value")


class Store(Generic[Value]):
    """Hold values by key in one file of JSON lines: `{key_name: key, value_name: value}`.

    A file of lines can be killed at any time and written by several stages: a new line goes to the end, and a line that
    was cut off is passed over. All processes of a stage must call each method.
    """

    def __init__(self, file: Path, key_name: str, value_name: str):
        self.file = file
        self._key_name = key_name
        self._value_name = value_name

    def read(self) -> dict[str, Value]:
        """Return all values by key, the same in all processes; the last line of a key counts."""
        return same_everywhere(self._lines)

    def add(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Write the values that the processes have computed, each its own part; return those of all processes."""
        together: dict[str, Value] = dict(gather_object(list(values.items())))
        if PartialState().is_main_process:
            lines = [json.dumps({self._key_name: key, self._value_name: value}) for key, value in together.items()]
            append(self.file, lines)
        PartialState().wait_for_everyone()  # whoever reads the file next must see all of it
        return together

    def _lines(self) -> dict[str, Value]:
        values: dict[str, Value] = {}
        if not self.file.exists():
            return values
        for line in self.file.read_text().splitlines():
            try:
                entry = json.loads(line)
                values[entry[self._key_name]] = entry[self._value_name]
            except (ValueError, KeyError, TypeError):  # a stopped process left it unfinished
                continue
        return values


def append(file: Path, lines: list[str]) -> None:
    """Add lines to the end of a file, which other processes may be writing too."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"), file.open("a") as out:
        if file.stat().st_size:
            out.write("\n")  # after a line that was cut off
        out.writelines(line + "\n" for line in lines)
