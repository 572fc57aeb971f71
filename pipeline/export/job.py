"""Hold what the two processes of an export are told, as a file: the one that writes it and the one that reads it back.

Nothing else goes from one to the other but files, so that what is compared is what a user will load.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Form = Literal["adapter", "merged", "gguf"]
FORMS: tuple[Form, ...] = ("adapter", "merged", "gguf")
_FILE = "job.json"


@dataclass(frozen=True)
class Row:
    """A text as token ids; its outputs are compared from the position `start` on, where its completion begins."""

    text: str
    ids: list[int]
    start: int


@dataclass(frozen=True)
class Job:
    """Say what is exported and where to. Paths are absolute; `base` has the fields of the run's `Loader`.

    `work` is the folder that both processes share; the export itself is in its folder `output`.
    """

    run_dir: Path
    stage: str
    form: Form
    dtype: str  # of the weights that are written: float32, bfloat16 or float16
    scores: bool  # whether it is a reward model
    full: str  # the full weights: a folder or a hub id
    adapter: str | None
    base: dict[str, Any]
    file: str  # the name of a GGUF file
    work: Path

    @property
    def output(self) -> Path:
        return self.work / "output"

    def save(self) -> None:
        fields = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self).items()}
        (self.work / _FILE).write_text(json.dumps(fields), encoding="utf-8")

    @classmethod
    def read(cls, work: Path) -> "Job":
        fields = json.loads((work / _FILE).read_text(encoding="utf-8"))
        return cls(**(fields | {"run_dir": Path(fields["run_dir"]), "work": Path(fields["work"])}))

    def save_rows(self, rows: list[Row]) -> None:
        lines = [json.dumps(dataclasses.asdict(row)) for row in rows]
        (self.work / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def rows(self) -> list[Row]:
        lines = (self.work / "rows.jsonl").read_text(encoding="utf-8").split("\n")
        return [Row(**json.loads(line)) for line in lines]

    def save_json(self, name: str, value: object) -> None:
        (self.work / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")

    def json(self, name: str) -> Any:
        return json.loads((self.work / f"{name}.json").read_text(encoding="utf-8"))
