"""Report a stage to Weights & Biases: offline, unless WANDB_MODE says otherwise."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk.data_types._private import MEDIA_TMP
from wandb.util import get_core_path

from pipeline.system.errors import UserError, reason_of
from pipeline.tracking.tracker import PROJECT, Cell, Tracked

# Beside what is logged, a run would hold the machine's packages, the code, the repository and what is printed.
_SETTINGS: dict[str, Any] = {
    "silent": True,
    "console": "off",
    "disable_git": True,
    "save_code": False,
    "disable_job_creation": True,
    "x_disable_meta": True,
    "x_save_requirements": False,
}
_DATA = "WANDB_DATA_DIR"  # where tables wait until they are uploaded


class WandbRun:
    """A stage at wandb, where steps only grow.

    A process that goes on with a stage writes a new folder, whose run has the same id: `wandb sync` puts the folders of
    one id together, in their order. wandb writes its file in blocks, so that little of it may be there after a kill.
    """

    def __init__(self, tracked: Tracked):
        folder = tracked.folder / "wandb"
        files = [] if tracked.is_new else folder.glob(f"*run-*-{tracked.id}/run-{tracked.id}.wandb")
        self.last_step = max((step for file in files for step in _steps(file)), default=-1)
        # upstream: the folder is made when wandb is imported. A copy of the process removes it when it ends, for all.
        Path(MEDIA_TMP.name).mkdir(exist_ok=True)
        self._sets_data = _DATA not in os.environ
        if self._sets_data:
            os.environ[_DATA] = str(folder)
        try:
            self._run = wandb.init(
                mode=os.environ.get("WANDB_MODE") or "offline",  # pyright: ignore[reportArgumentType]  # it checks it
                project=os.environ.get("WANDB_PROJECT") or PROJECT,
                name=tracked.name,
                group=tracked.run,
                job_type=tracked.stage_type,
                id=tracked.id,
                resume="allow",
                reinit="create_new",  # nobody else finds the run: TRL would log to it, and ask for its address
                dir=str(tracked.folder),
                config=dict(tracked.config),
                settings=wandb.Settings(**_SETTINGS),
            )
        except (wandb.Error, ValueError) as error:
            raise UserError(f"report_to: wandb cannot start a run: {reason_of(error)}") from None

    def begin(self, step: int) -> None:
        """Do nothing: `last_step` says where the curve goes on."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def _log_once(self, name: str, value: object, step: int) -> None:
        """Keep what is no point of a curve, which may come at a step that was logged before this process."""
        self._run.log({name: value}, step=max(step, self.last_step + 1))

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        data: list[Any] = [list(row) for row in rows]
        self._log_once(name, wandb.Table(columns=list(columns), data=data, allow_mixed_types=True), step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._log_once(name, wandb.Image(str(path)), step)

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        self._run.summary.update(dict(figures))

    def close(self, is_finished: bool) -> None:
        self._run.finish(exit_code=0 if is_finished else 1)
        if self._sets_data:
            del os.environ[_DATA]


def _steps(file: Path) -> Iterator[int]:
    """Return the steps that a file of a run has; of one that was not written to its end, those that are readable."""
    command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(file), str(file.parent)]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        record = json.loads(line)
        if record["type"] == "history":
            yield int(record["history"]["step"].get("num", 0))
