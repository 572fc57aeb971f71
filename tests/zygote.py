"""A process that imports the package once and runs each command in a fork of itself; see `warm.Zygote`.

It reads one request a line and answers with one line, both JSON:
request: {"argv": [...], "folder": working directory, "environment": {name: value or null}, "limit": seconds,
"stdout": file, "stderr": file, "module": "cli" or "stage"};
answer: {"exit_code": of the process, negative for a signal, "hung": whether the limit was over, "seconds": wall time}.
With a limit of null it does not wait; its answer is {"pid": of the process}, which leads a session of its own.

The process that starts stages (`pipeline/stage_server.py`) is a fork too: it is made before the command begins, so
that it knows as little of it as a process of its own would. `accelerate launch` and the processes that it starts are
forks as well; what they run, and all that they are told, is accelerate's and torchrun's.
"""

import importlib
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.launch.process import StageProcess
    from pipeline.launch.stage_server import StageServer

IMPORTED = [f"pipeline.{name}" for name in ("cli", "launcher", "show.results", "stage", "stages.sft", "stages.reward")]
IMPORTED += [f"datasets.packaged_modules.{kind}.{kind}" for kind in ("csv", "json", "parquet", "text")]
IMPORTED += ["accelerate.commands.launch", "torch.distributed.run", "transformers.models.llama.modeling_llama"]
MEMORY = 12 << 30  # bytes a command may take; more is a fault of the command, and must not take the machine with it


def preload() -> None:
    """Import what commands import when they need it."""
    for name in IMPORTED:
        importlib.import_module(name)
    from pipeline import stage_server
    from pipeline.config.options import check_section

    stage_server.load()
    for kind in ("sft", "reward", "dpo", "ppo", "rloo", "grpo", "lora", "quantization"):
        check_section(kind, {})


def become(request: dict) -> None:
    """Turn the forked process into the command; never returns."""
    os.setsid()
    os.chdir(request["folder"])
    for name, value in request["environment"].items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for number, key in ((1, "stdout"), (2, "stderr")):
        opened = os.open(request[key], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(opened, number)
        os.close(opened)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    from pipeline import cli, stage

    main = stage.main if request["module"] == "stage" else cli.main
    if request["module"] == "cli" and request["argv"][0] == "run":
        fork_server()
        fork_launches()
    sys.argv = ["rlhf", *request["argv"]]
    end(main)


def end(main: Callable[[], None]) -> None:
    """Run a program and end the process as the interpreter would; never returns."""
    exit_code = 0
    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        exit_code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        exit_code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


class Fork:
    """A program in a fork of this process, with what `subprocess.Popen` has for one that was started by its command.

    `environment`: all of it. `stdout`: what it writes to, stderr too; None: as this process. `session`: whether it
    begins a session, as torchrun's processes do.
    """

    def __init__(
        self,
        main: Callable[[], None],
        argv: list[str],
        environment: dict[str, str],
        stdout: int | None = None,
        session: bool = False,
    ):
        self.stdout: IO[bytes] | None = None
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            if session:
                os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os.environ.clear()
            os.environ.update(environment)
            for number in (1, 2) if stdout is not None else ():
                os.dup2(stdout, number)
            sys.argv = argv
            end(main)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self, timeout: float | None = None) -> int | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while deadline is not None and self.poll() is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(sys.argv, timeout)
            time.sleep(0.01)
        return self._wait(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode


def fork_server() -> None:
    """Fork the process that starts stages, and let the command's first `StageServer` find it."""
    from pipeline import stage_server
    from pipeline.launch.stage_server import StageServer

    ours, theirs = socket.socketpair()

    def serve() -> None:
        ours.close()
        stage_server.main()

    process = Fork(serve, ["", str(theirs.fileno())], dict(os.environ))
    theirs.close()
    start = StageServer.warm_up

    def warm_up(self: StageServer) -> None:
        self._launcher, self._process = ours, process
        StageServer.warm_up = start

    StageServer.warm_up = warm_up


def fork_launches() -> None:
    """Let `accelerate launch` be a fork, and the processes that it starts be forks of it."""
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    from pipeline import stage
    from pipeline.launch import process

    start = process._started

    def started(command: list[str], environment: dict[str, str], server: "StageServer | None") -> "Fork | StageProcess":
        if launch.__name__ not in command:
            return start(command, environment, server)
        read, write = os.pipe()
        forked = Fork(launch.main, command[command.index(launch.__name__) :], environment, write)
        os.close(write)
        forked.stdout = os.fdopen(read, "rb")
        return forked

    def popen(self: SubprocessHandler, args: tuple[str, ...], environment: dict[str, str]) -> Fork:
        return Fork(stage.main, list(args[args.index("pipeline.stage") :]), environment, session=True)

    process._started = started
    SubprocessHandler._popen = popen


def wait(child: int, limit: float) -> dict:
    """How the child ended; it and what it started are killed when the limit is over."""
    start = time.monotonic()
    hung = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        seconds = time.monotonic() - start
        if ended:
            break
        if seconds > limit and not hung:
            hung = True
            os.killpg(child, signal.SIGKILL)
        time.sleep(0.005)
    return {"exit_code": os.waitstatus_to_exitcode(status), "hung": hung, "seconds": round(seconds, 3)}


def main() -> None:
    preload()
    print(json.dumps({"ready": True}), flush=True)
    left = []
    for line in sys.stdin:
        left = [child for child in left if not os.waitpid(child, os.WNOHANG)[0]]
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        if request["limit"] is None:
            left.append(child)
            print(json.dumps({"pid": child}), flush=True)
        else:
            print(json.dumps(wait(child, request["limit"])), flush=True)


if __name__ == "__main__":
    main()
