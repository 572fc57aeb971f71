"""The states of a run's stages, in a file of the run folder: `rlhf run` writes it, `rlhf status` reads it.

The manifest knows only what is finished. Here are the other stages too, with what the latest `rlhf run` knew of them.
"""

import contextlib
import os
import socket
from collections.abc import Container
from pathlib import Path
from typing import Literal

import psutil
from pydantic import BaseModel, ValidationError

from pipeline.records.stage_folder import LOCK
from pipeline.system import locks

FILE = "chain.json"
State = Literal["finished", "at work", "waiting", "failed", "stopped"]


class Launcher(BaseModel):
    """Tell the process of a launcher from all others; `created`: seconds since 1970."""

    host: str
    pid: int
    created: float


class Chain(BaseModel):
    """Hold the name of a run, the types and states of its stages, in order, and who runs them."""

    name: str
    types: dict[str, str]
    states: dict[str, State]
    launcher: Launcher

    def write(self, run_dir: Path) -> None:
        """Put the file in its place in one step. A disk that refuses it stops nothing."""
        partial = run_dir / f"{FILE}.tmp"
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            partial.write_text(f"{self.model_dump_json(indent=1)}\n", encoding="utf-8")
            partial.replace(run_dir / FILE)
        except OSError:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def this_process() -> Launcher:
    """Return what tells this process from all others."""
    return Launcher(host=socket.gethostname(), pid=os.getpid(), created=psutil.Process().create_time())


def read(run_dir: Path) -> Chain | None:
    """Read the file; None: there is none, or it cannot be read."""
    try:
        chain = Chain.model_validate_json((run_dir / FILE).read_bytes())
    except (OSError, ValidationError):
        return None
    return chain if set(chain.types) == set(chain.states) else None


def now(chain: Chain, run_dir: Path, recorded: Container[str]) -> dict[str, State]:
    """Return the states as they are: what a killed process has left is not at work. `recorded`: finished stages."""
    alive = _is_alive(chain.launcher)
    states: dict[str, State] = {}
    for name, state in chain.states.items():
        is_export = state == "finished" and name in recorded  # it reads the weights under the same lock
        if not is_export and is_locked(run_dir / name):
            states[name] = "at work"
        elif state == "finished" and name not in recorded:
            states[name] = "waiting"
        elif state != "failed" and name in recorded and not alive:
            states[name] = "finished"
        elif state == "at work" and not alive:
            states[name] = "stopped"
        else:
            states[name] = state
    return states


def is_locked(folder: Path) -> bool:
    """Tell whether a process is at work on the stage of this folder: its lock ends with the process."""
    return locks.is_held(folder / LOCK)


def _is_alive(launcher: Launcher) -> bool:
    """Tell whether the process runs; of those on other machines nothing is known."""
    try:
        created = psutil.Process(launcher.pid).create_time()
    except (psutil.Error, ValueError):
        return False
    return launcher == Launcher(host=socket.gethostname(), pid=launcher.pid, created=created)
