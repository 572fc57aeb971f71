"""Report a stage to trackio, in a database in the stage's folder; no server, no Space, nothing is sent."""

import contextlib
import importlib
import io
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from unittest import mock

from pipeline.tracking.tracker import PROJECT, Cell, Tracked

_FOLDER = "TRACKIO_DIR"


class TrackioRun:
    """A stage at trackio, which keeps metrics in a database: of the stage, or in the TRACKIO_DIR of the user.

    `trackio.init` finds an earlier run by its name, which another run may have too, and may send to the Space or the
    server that the environment names. So the run is made with its id, for this machine alone.
    """

    def __init__(self, tracked: Tracked):
        self._trackio = _loaded(os.environ.get(_FOLDER) or str(tracked.folder / "trackio"))
        run_class = importlib.import_module("trackio.run").Run

        class LocalRun(run_class):
            def _get_username(self) -> None:
                """Ask nobody. upstream: the hub would be asked who the user is."""

        storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
        last: int | None = storage.get_max_step_for_run(PROJECT, tracked.name, run_id=tracked.id)
        self.last_step = -1 if last is None else last
        self._run = LocalRun(
            url=None,
            project=PROJECT,
            client=None,
            name=tracked.name,
            run_id=tracked.id,
            group=tracked.run,
            config=dict(tracked.config),
        )

    def begin(self, step: int) -> None:
        """Do nothing: `last_step` says where the curve goes on."""

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]], step: int) -> None:
        self._run.log({name: self._trackio.Table(columns=list(columns), data=[list(row) for row in rows])}, step=step)

    def image(self, name: str, path: Path, step: int) -> None:
        self._run.log({name: self._trackio.Image(str(path))}, step=step)

    def summarise(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, is_finished: bool) -> None:
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it uploads, and it does not
            self._run.finish()


def _loaded(folder: str) -> ModuleType:
    """Import trackio so that it keeps its data in a folder.

    It reads TRACKIO_DIR once, when it is imported, and TRL's trainers import it.
    """
    utils = sys.modules.get("trackio.utils")
    if utils is None or Path(folder) != utils.TRACKIO_DIR:
        for name in [name for name in sys.modules if name.partition(".")[0] == "trackio"]:
            del sys.modules[name]
        with mock.patch.dict(os.environ, {_FOLDER: folder}):
            importlib.import_module("trackio")
    return importlib.import_module("trackio")
