"""How far a stage is, in a file in its folder: its process writes it, `rlhf run` and `rlhf status` read it.

Each line is a JSON object with its `time`, in seconds since 1970. The first line begins an attempt; `launch` is the
token of the `rlhf run` that started it, or null. A line with `said` is a message; with `once` it need not be shown
again where another stage says the same. All others say where the stage is:
`phase` names what it does, `step` of `of` is done, and `logs` are the figures that its trainer has just logged. `first`
are those that a resumed training had logged first.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline.system.json_object import JsonObject

TRAINING = "training"
LOADING = "loading"
HELD_OUT = "held-out batches"
SAMPLING = "sampling from"  # a policy
FIRST_BATCH = "comparing the first batch with the parent"
FIRST_TOKENS = "looking at first tokens"
FINISHING = "finishing"
NUM_FIRST = 32  # prompts whose first token is looked at
SECONDS = 1.0  # between two steps that are written
SHARE = 1 / 2000  # of the time since the start, likewise: the file of a week stays small
Item = TypeVar("Item")
Logs = Mapping[str, float | None]


class Progress:
    """Write how far a stage is; without a path write nothing.

    A new file takes the place of that of an earlier attempt. If the disk refuses it, the stage goes on without it.
    """

    def __init__(self, path: Path | None = None, launch: str | None = None):
        self._file: BinaryIO | None = None
        self._begun = time.time()
        self._next = 0.0
        self._phase = LOADING
        self._of: int | None = None
        if path is None:
            return
        partial = path.with_name(f"{path.name}.tmp")
        try:
            self._file = partial.open("wb", buffering=0)
            self._write({"launch": launch})
            partial.replace(path)
        except OSError:
            self._close()
        self.begin(LOADING)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def say(self, message: str, once: bool = False) -> None:
        """Print a message, and leave it to whoever watches; `once`: it is no news after another stage has said it."""
        print(message, flush=True)
        self.note(message, once)

    def note(self, message: str, once: bool = False) -> None:
        """Leave a message to whoever watches; what the stage prints has it in another form."""
        self._write({"said": message} | ({"once": True} if once else {}))

    def begin(self, phase: str, of: int | None = None, step: int = 0, first: Logs | None = None) -> None:
        """Say what the stage does next: `of` steps, of which `step` are done, or nothing that can be counted.

        `first`: what a resumed training had logged first.
        """
        self._phase = phase
        self._of = of
        self._place(step, first=first)

    def step(self, step: int, logs: Logs | None = None) -> None:
        """Say how many steps of the phase are done. Without `logs` it is written about once a second."""
        if self._file is not None and (logs or step == self._of or time.time() >= self._next):
            self._place(step, logs=logs)

    def each(self, items: Sequence[Item], phase: str) -> Iterator[Item]:
        """Yield the items of a phase, and count those that are done."""
        if items:
            self.begin(phase, len(items))
        for number, item in enumerate(items, 1):
            yield item
            self.step(number)

    def _place(self, step: int, **figures: Logs | None) -> None:
        now = time.time()
        self._next = now + max(SECONDS, SHARE * (now - self._begun))
        place: JsonObject = {"phase": self._phase}
        if self._of is not None:
            place |= {"step": step, "of": self._of}
        for key, values in figures.items():
            if values:
                place[key] = {name: value if _is_finite(value) else None for name, value in values.items()}
        self._write(place)

    def _write(self, entry: JsonObject) -> None:
        if self._file is None:
            return
        line = json.dumps({"time": round(time.time(), 3)} | entry)
        try:
            self._file.write(f"{line}\n".encode())
        except OSError:  # the disk is full: the stage will say so where it matters
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


class Entry(BaseModel):
    """Hold a line of the file: what it does not say is None, or empty."""

    model_config = ConfigDict(frozen=True)

    time: float
    launch: str | None = None
    said: str | None = None
    once: bool = False
    phase: str | None = None
    step: int | None = None
    of: int | None = None
    logs: dict[str, float | None] = {}
    first: dict[str, float | None] = {}


class Reader:
    """Read a progress file as it grows. `launch`: the only launch whose file counts; None: any counts."""

    def __init__(self, path: Path, launch: str | None = None):
        self._path = path
        self._launch = launch
        self._file: BinaryIO | None = None
        self._pending = b""

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def read(self) -> list[Entry]:
        """Return the entries since the last call. What cannot be read counts as none."""
        with contextlib.suppress(OSError):
            if self._file is not None or self._open():
                assert self._file is not None, "it is open"
                *lines, self._pending = (self._pending + self._file.read()).split(b"\n")
                return [entry for line in lines if (entry := _entry(line)) is not None]
        return []

    def _open(self) -> bool:
        """Open the file, if it is there and of this launch."""
        file = self._path.open("rb")
        head = _entry(file.readline())
        if head is None or self._launch not in (None, head.launch):
            file.close()
            return False
        file.seek(0)
        self._file = file
        return True


def _entry(line: bytes) -> Entry | None:
    """Read a line; None: it is none of ours, or was cut off by a full disk."""
    try:
        return Entry.model_validate_json(line)
    except ValidationError:
        return None
