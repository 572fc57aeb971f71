"""Start stages without importing the libraries again: the launcher's side of `pipeline/stage_server.py`."""

import contextlib
import json
import os
import select
import socket
import struct
import subprocess
import sys
import threading
from types import TracebackType
from typing import IO, TypedDict

from pipeline.launch.channel import wait_until_gone

MODULE = "pipeline.stage"  # what a stage's process runs
SERVER = "pipeline.stage_server"
IS_HERE = sys.platform == "linux"  # elsewhere a process with loaded libraries cannot be copied safely
UNKNOWN = 256  # as an exit code: the server was killed, so nobody has seen how the process ended
_NUMBER = struct.Struct("<q")
# Lets `torch.cuda.is_available` count GPUs without touching CUDA, which a copy of the process could not use then.
_NO_CUDA = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}


class Request(TypedDict):
    """What the launcher asks for: a stage by its command, with all of its environment."""

    command: list[str]
    environment: dict[str, str]


class Forked:
    """A stage's process that the server has started, with what `subprocess.Popen` has for others."""

    def __init__(self, pid: int, stdout: IO[bytes], answers: socket.socket):
        self.pid = pid
        self.stdout = stdout
        self._answers = answers
        self._exit_code: int | None = None

    def wait(self) -> int:
        """Wait for the end of the process; returns its exit code, negative for a signal, or UNKNOWN."""
        if self._exit_code is None:
            self._exit_code = receive_number(self._answers)
        if self._exit_code is None:
            wait_until_gone(self.pid, 0.1)
            self._exit_code = UNKNOWN
        return self._exit_code

    def poll(self) -> int | None:
        """Return what `wait` would, or None as long as the process runs."""
        if self._exit_code is None and select.select([self._answers], [], [], 0)[0]:
            self.wait()
        return self._exit_code


class StageServer:
    """The process that has the libraries of all stages loaded; it starts when it is first asked for.

    `environment`: that of the stages, as far as it is known before the first one.
    """

    def __init__(self, environment: dict[str, str]):
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._launcher: socket.socket | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> "StageServer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None and self._launcher is not None:
            self._process.kill()  # it may be in the middle of its imports, and has nothing to lose
            self._process.wait()
            if self._reader is not None and self._process.stdout is not None:
                self._reader.join()
                self._process.stdout.close()
            self._launcher.close()

    def warm_up(self) -> None:
        """Let the server load the libraries while this process does something else."""
        if self._process is not None or not IS_HERE:
            return
        self._launcher, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", SERVER, str(theirs.fileno())],
                env=self._environment | _NO_CUDA,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,  # as stages have it
                stderr=subprocess.STDOUT,
            )
        # Nobody needs what it writes, which is little; but a full pipe would stop it.
        assert self._process.stdout is not None, "it is a pipe"
        self._reader = threading.Thread(target=self._process.stdout.read, daemon=True)
        self._reader.start()

    def start(self, command: list[str], environment: dict[str, str]) -> Forked | None:
        """Start a stage by its command. None: the server is gone or never was, and the command must be run itself."""
        self.warm_up()
        if self._launcher is None:
            return None
        read, write = os.pipe()
        stdout = os.fdopen(read, "rb")
        try:
            send_request(self._launcher, {"command": command, "environment": environment}, write)
            pid = receive_number(self._launcher)
        except OSError:
            pid = None
        finally:
            os.close(write)
        if pid is None:
            stdout.close()
            return None
        return Forked(pid, stdout, self._launcher)


def send_number(connection: socket.socket, number: int) -> None:
    """Send a number in 8 bytes."""
    connection.sendall(_NUMBER.pack(number))


def receive_number(connection: socket.socket) -> int | None:
    """Wait for a number of the other side; None: it is gone."""
    received = b""
    with contextlib.suppress(ConnectionError):
        received = connection.recv(_NUMBER.size, socket.MSG_WAITALL)
    return _NUMBER.unpack(received)[0] if len(received) == _NUMBER.size else None


def send_request(connection: socket.socket, request: Request, output: int) -> None:
    """Send a request, a line of JSON, and with its first byte the file that the stage writes to."""
    line = json.dumps(request).encode() + b"\n"
    socket.send_fds(connection, [line[:1]], [output])
    connection.sendall(line[1:])


def receive_request(connection: socket.socket) -> tuple[Request, int] | None:
    """Wait for a request and its file; None: the other side is gone. The next one comes only after an answer."""
    line, files, _, _ = socket.recv_fds(connection, 1, 1)
    while line and not line.endswith(b"\n"):
        piece = connection.recv(65536)
        line = line + piece if piece else b""
    return (json.loads(line), files[0]) if line else None
