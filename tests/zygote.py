"""A process that imports the package once and runs each command in a fork of itself; see `warm.Zygote`.

It reads one request a line and answers with one line, both JSON:
request: {"argv": [...], "folder": working directory, "environment": {name: value or null}, "limit": seconds,
"stdout": file, "stderr": file, "module": "cli" or "stage"};
answer: {"exit_code": of the process, negative for a signal, "hung": whether the limit was over, "seconds": wall time}.

The process that starts stages (`pipeline/stage_server.py`) is a fork too: it is made before the command begins, so
that it knows as little of it as a process of its own would.
"""

import importlib
import json
import os
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

IMPORTED = [f"pipeline.{name}" for name in ("cli", "launcher", "show.results", "stage", "stages.sft", "stages.reward")]
IMPORTED += [f"datasets.packaged_modules.{kind}.{kind}" for kind in ("csv", "json", "parquet", "text")]
IMPORTED += ["transformers.models.llama.modeling_llama"]
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


class Server:
    """What the command has of the process that starts its stages."""

    stdout = None

    def __init__(self, pid: int):
        self.pid = pid

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


def fork_server() -> None:
    """Fork the process that starts stages, and let the command's first `StageServer` find it."""
    from pipeline import stage_server
    from pipeline.launch.stage_server import StageServer

    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        ours.close()
        sys.argv = ["", str(theirs.detach())]
        end(stage_server.main)
    theirs.close()
    start = StageServer.warm_up

    def warm_up(self: StageServer) -> None:
        self._launcher, self._process = ours, Server(pid)
        StageServer.warm_up = start

    StageServer.warm_up = warm_up


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
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
        print(json.dumps(wait(child, request["limit"])), flush=True)


if __name__ == "__main__":
    main()
