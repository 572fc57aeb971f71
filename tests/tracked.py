"""Read back what trackers have written, each by its own reader, and run stages that are killed on the way."""

import json
import sqlite3
import subprocess
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.util import get_core_path

from pipeline import stage
from pipeline.config.schema import RunConfig
from pipeline.training.curves import Curves

Curve = list[tuple[int, float]]  # (step, value) in the order of the file


def run(config: RunConfig, name: str, dies_at: int | None = None) -> None:
    """Run a stage; with `dies_at` it dies right after this step was logged."""
    log = Curves.on_log

    def log_then_die(self, args, state, control, **kwargs):
        log(self, args, state, control, **kwargs)
        if state.global_step == dies_at:
            raise tiny.Killed

    if dies_at is None:
        stage.run(config, name)
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curves, "on_log", log_then_die)
        with pytest.raises(tiny.Killed):
            stage.run(config, name)


class EventFiles:
    """A stage at tensorboard, as its web page reads it: all files of the folder, in order."""

    def __init__(self, folder: Path):
        self.read = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
        self.read.Reload()
        self.images = self.read.Tags()["images"]
        self.tables = [tag.removesuffix("/text_summary") for tag in self.read.Tags()["tensors"]]

    def curves(self) -> dict[str, Curve]:
        tags = self.read.Tags()["scalars"]
        return {tag: [(event.step, event.value) for event in self.read.Scalars(tag)] for tag in tags}


class WandbFolders:
    """A stage at wandb: each process has written a folder, read by `wandb leet inspect`; `pieces` are in their order.

    A piece is the run's own record, its rows of history with their steps, its summary, and how it ended (None: nobody
    said, as after a kill).
    """

    def __init__(self, folder: Path):
        self.pieces = [self._piece(file) for file in sorted(folder.glob("wandb/*run-*/*.wandb"))]

    def _piece(self, file: Path) -> dict[str, Any]:
        command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(file), str(file.parent)]
        done = subprocess.run(command, capture_output=True, text=True)
        found: dict[str, Any] = {"run": {}, "history": [], "summary": {}, "exit_code": None}
        for line in done.stdout.splitlines():
            record = json.loads(line)
            value = record[record["type"]]
            if record["type"] == "run":
                found["run"] = value
            elif record["type"] == "history":
                found["history"].append((value["step"].get("num", 0), value["item"]))
            elif record["type"] == "summary":
                found["summary"] |= value["update"]
            elif record["type"] == "exit":
                found["exit_code"] = value.get("exit_code", 0)
        return found

    def curves(self) -> dict[str, Curve]:
        curves: dict[str, Curve] = defaultdict(list)
        for piece in self.pieces:
            for step, row in piece["history"]:
                for name, value in row.items():
                    if isinstance(value, (int, float)):
                        curves[name].append((step, value))
        return dict(curves)


class TrackioDatabase:
    """A stage at trackio: its rows, and the run's record."""

    def __init__(self, folder: Path):
        with sqlite3.connect(folder / "trackio" / "rlhf-pipeline.db") as database:
            query = "select step, run_id, run_name, metrics from metrics order by id"
            self.rows = [(*row[:3], json.loads(row[3])) for row in database.execute(query)]
            self.configs = [json.loads(row[0]) for row in database.execute("select config from configs")]

    def curves(self) -> dict[str, Curve]:
        curves: dict[str, Curve] = defaultdict(list)
        for step, _, _, row in self.rows:
            for name, value in row.items():
                if isinstance(value, (int, float)):
                    curves[name].append((step, value))
        return dict(curves)


READERS = {"tensorboard": EventFiles, "wandb": WandbFolders, "trackio": TrackioDatabase}
