"""Run `rlhf` in forks of a process that has the package imported: seconds of importing are saved for each command.

What is tested of a process itself (its imports, signals, terminal, the way it is started) needs a process of its own.
"""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

AT_START = dict(os.environ)  # a test may change it for a while
TESTS = Path(__file__).resolve().parent
REPO = TESTS.parent
# What libraries read when they are imported.
AT_IMPORT = {
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(REPO),
    "PYTHONUTF8": "1",
}


@dataclass(frozen=True)
class Answer:
    """How a command ended and what it printed."""

    exit_code: int
    hung: bool
    seconds: float
    stdout: str
    stderr: str


class Zygote:
    """The process that has imported the package; `run` forks it. To be closed.

    `scratch`: an empty folder for what commands print. `environment`: beside AT_IMPORT, what is set in it.
    """

    def __init__(self, scratch: Path, environment: dict[str, str]):
        self.scratch = scratch
        argv = [sys.executable, "-u", str(TESTS / "zygote.py")]
        # Pipes, all three: its streams are those of the commands, which may write to a pipe.
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        variables = AT_START | AT_IMPORT | environment
        self.process = subprocess.Popen(argv, env=variables, text=True, cwd=scratch, **pipes)
        self.reader = threading.Thread(target=self._keep_log, daemon=True)
        self.reader.start()
        assert self._answer() == {"ready": True}

    def _keep_log(self) -> None:
        """Write what the process says of itself to a file; a full pipe would stop it."""
        with (self.scratch / "zygote.log").open("w") as log:
            for line in self.process.stderr:
                log.write(line)
                log.flush()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        assert line, f"the process that runs the commands has ended: {(self.scratch / 'zygote.log').read_text()}"
        return json.loads(line)

    def run(
        self, argv: tuple[str, ...], folder: Path, environment: dict[str, str | None], limit: float, module: str = "cli"
    ) -> Answer:
        """Run `rlhf *argv` (or the module of one stage) in `folder`, at most `limit` seconds."""
        streams = {key: self.scratch / key for key in ("stdout", "stderr")}
        answer = self._ask(argv, folder, limit, module, environment, {key: str(path) for key, path in streams.items()})
        texts = {key: path.read_text(encoding="utf-8", errors="replace") for key, path in streams.items()}
        return Answer(**answer, **texts)

    def start(self, argv: tuple[str, ...], folder: Path) -> int:
        """Start `rlhf *argv` in `folder`, with nobody to read what it says; returns the process's number."""
        nowhere = dict.fromkeys(("stdout", "stderr"), os.devnull)
        return self._ask(argv, folder, None, "cli", {}, nowhere)["pid"]

    def _ask(
        self,
        argv: tuple[str, ...],
        folder: Path,
        limit: float | None,
        module: str,
        environment: dict[str, str | None],
        streams: dict[str, str],
    ) -> dict[str, Any]:
        request = {"argv": list(argv), "folder": str(folder), "limit": limit, "module": module}
        self.process.stdin.write(json.dumps(request | streams | {"environment": environment}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.reader.join()
        self.process.stdout.close()
        self.process.stderr.close()


@functools.cache
def _zygote() -> Zygote:
    """That of this process of the tests, with its environment."""
    folder = tempfile.TemporaryDirectory(prefix="rlhf-zygote-")
    zygote = Zygote(Path(folder.name), {})
    atexit.register(folder.cleanup)
    atexit.register(zygote.close)
    return zygote


def rlhf(
    *args: object,
    folder: Path = REPO,
    limit: float = 600,
    environment: dict[str, str | None] | None = None,
    module: str = "cli",
) -> subprocess.CompletedProcess[str]:
    """Run `rlhf`, or the module of one stage, in a working directory; returns what `subprocess.run` would of it.

    `environment`: variables that are set or, if None, not set; what is read at import is not among them.
    """
    argv = tuple(map(str, args))
    assert not AT_IMPORT.keys() & (environment or {}).keys()
    answer = _zygote().run(argv, folder, environment or {}, limit, module)
    if answer.hung:
        raise subprocess.TimeoutExpired(["rlhf", *argv], limit, answer.stdout, answer.stderr)
    return subprocess.CompletedProcess(["rlhf", *argv], answer.exit_code, answer.stdout, answer.stderr)


class Started:
    """`rlhf` at work in the background, to be killed: with -9, by itself or with all that it has started."""

    def __init__(self, *args: object, folder: Path = REPO):
        self.process = psutil.Process(_zygote().start(tuple(map(str, args)), folder))

    def is_alive(self) -> bool:
        return self.process.status() != psutil.STATUS_ZOMBIE

    def kill(self) -> None:
        self.process.kill()
        self._wait()

    def kill_all(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self._wait()

    def _wait(self) -> None:
        while self.is_alive():  # the number is taken until its parent has asked how it ended
            time.sleep(0.01)
