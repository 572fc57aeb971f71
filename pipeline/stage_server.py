"""Start stages as copies of one process that has the libraries loaded, so that only this one imports them.

`rlhf run` starts it; nobody types it. It imports what stages import and computes nothing: no model, no random number,
no CUDA context and no thread of Python is there when it is copied (fork). On a machine with a GPU bitsandbytes is
imported in the copies, since its import uses CUDA. Where CUDA was used all the same, a copy becomes the stage's command
and imports everything anew. The threads of OpenBLAS and of jemalloc end in a copy, and start
again when they are needed: both libraries see to that. A stage is thus a process like one that was
started by its command, and ends like one; whatever becomes of it, this process only tells how it ended.

The launcher sends a request, the stage's command and environment with the file for its output. It hears the number of
the new process, and at the end its exit code, which is negative for a signal. Stages run one after the other. The
server ends when the launcher's end of the socket is closed, by itself or by the launcher's death.
"""

import contextlib
import gc
import importlib
import importlib.util
import os
import signal
import socket
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from pipeline.config.rehearsal import missing_trainer
from pipeline.config.stage_types import KINDS
from pipeline.launch.stage_server import MODULE, Request, receive_request, send_number
from pipeline.system import kept
from pipeline.system.signals import ENDING

# A terminal sends these to all processes; they are for the launcher and the stage.
SIGNALS: tuple[int, ...] = (signal.SIGINT, *ENDING)
ASKS_FOR_GPU = "bitsandbytes"  # when it is imported
Handlers = dict[int, Any]  # what becomes of a signal, as `signal.signal` takes it


def main() -> None:
    """Serve until the launcher is gone; in each copy, run the stage that it was made for."""
    kept.installation()  # now, not when a stage asks: what it keeps was found out by the code that is loaded here
    before = ignore_signals()
    _direct((os.devnull,) * 3)  # what libraries say when they are imported is not a stage's
    load()
    if importlib.import_module("torch").cuda.is_initialized():
        return  # a copy could not use CUDA, and a context here would take memory: stages are started by their commands
    is_stage = False
    with socket.socket(fileno=int(sys.argv[1])) as launcher, contextlib.suppress(ConnectionError):
        launcher.set_inheritable(False)
        is_stage = serve(launcher, before)
    if is_stage:
        importlib.import_module(MODULE).main()


def ignore_signals() -> Handlers:
    """Let signals for the stage leave this process alone; returns what became of them before."""
    return {number: signal.signal(number, signal.SIG_IGN) for number in SIGNALS}


def load() -> None:
    """Import what stages import, and keep the memory that it takes out of the reach of copies' garbage collectors."""
    if importlib.import_module("torch").cuda.is_available():
        _postpone(ASKS_FOR_GPU)
    importlib.import_module(MODULE)
    for kind, row in KINDS.items():
        if missing_trainer(kind) is None:
            importlib.import_module(f"pipeline.stages.{row.module}")
    gc.collect()
    gc.freeze()


class _Postponed(ModuleType):
    """Stands for a module until something in it is asked for; then it is imported."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked for by what looks through all modules
            raise AttributeError(name)
        return getattr(_resume(self.__name__), name)


def _postpone(name: str) -> None:
    """Let `import` of a module do nothing yet."""
    spec = importlib.util.find_spec(name)
    if spec is not None and name not in sys.modules:
        module = _Postponed(name)
        module.__spec__ = spec
        module.__path__ = spec.submodule_search_locations or []
        sys.modules[name] = module


def _resume(name: str) -> ModuleType:
    """Import a module that was postponed."""
    if isinstance(sys.modules.get(name), _Postponed):
        del sys.modules[name]
    return importlib.import_module(name)


def serve(launcher: socket.socket, before: Handlers) -> bool:
    """Answer the launcher's requests. Returns True in the process of a stage, False when the launcher is gone."""
    while (received := receive_request(launcher)) is not None:
        request, output = received
        # A signal to the new process waits until it has its own handlers.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pid = os.fork()
        if pid == 0:
            _become_stage(request, output, before)
            return True
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        os.close(output)
        send_number(launcher, pid)
        _, status = os.waitpid(pid, 0)
        send_number(launcher, os.waitstatus_to_exitcode(status))
    return False


def _become_stage(request: Request, output: int, before: Handlers) -> None:
    """Give a copy of this process what its command would have given it."""
    os.environ.clear()
    os.environ.update(request["environment"])
    _direct((os.devnull, output, output))
    os.close(output)
    for number, handler in before.items():
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    command = request["command"]
    # upstream: where the driver's library does not tell the number of GPUs, as of a part of one (MIG), torch asks CUDA.
    if importlib.import_module("torch").cuda._is_in_bad_fork():
        os.execve(command[0], command, os.environ)
    if ASKS_FOR_GPU in sys.modules:
        with contextlib.suppress(Exception):  # a stage that needs it meets the error
            _resume(ASKS_FOR_GPU)
    sys.argv = [sys.modules[MODULE].__file__ or "", *command[command.index(MODULE) + 1 :]]


def _direct(files: Sequence[str | int]) -> None:
    """Let stdin, stdout and stderr be these files, by path or by number.

    Python's own streams stay as they are, since handlers of logs hold them. They were made for a pipe, so that they
    never ask for a position in a file.
    """
    for number, file in enumerate(files):
        opened = os.open(file, os.O_RDWR) if isinstance(file, str) else os.dup(file)
        os.dup2(opened, number)
        os.close(opened)


if __name__ == "__main__":
    main()
