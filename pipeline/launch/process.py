"""Run one stage in a process of its own: start it, carry its output, stop it, and say why it failed."""

import contextlib
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from typing import TypeAlias

import psutil
from rich.console import Console

from pipeline.config import precision
from pipeline.config.schema import RunConfig
from pipeline.launch import channel, sharding
from pipeline.launch.log import StageLog, Watch, nobody, relay, say_last
from pipeline.launch.stage_server import MODULE, UNKNOWN, Forked, StageServer
from pipeline.records import manifest
from pipeline.records.manifest import Record
from pipeline.records.stage_folder import LOG, PROGRESS
from pipeline.system.errors import StageFailed

StageProcess: TypeAlias = "subprocess.Popen[bytes] | Forked"
NUM_LOG_LINES = 20  # shown of a stage that failed
STOP_SECONDS = 15  # that a stage has to end by itself


def command(config: RunConfig, name: str, overrides: tuple[str, ...], accelerate_file: str | None) -> list[str]:
    """Return the command that runs one stage; the same one that users type under `accelerate launch`."""
    launch = [sys.executable, "-u"]
    if accelerate_file is not None:
        launch += ["-m", "accelerate.commands.launch", "--config_file", accelerate_file]
        if sharding.needs_gpu_id(accelerate_file):
            launch += ["--gpu_ids", _first_gpu()]
    return [*launch, "-m", MODULE, str(config.source), name, *overrides]


def run_stage(
    config: RunConfig,
    name: str,
    overrides: tuple[str, ...],
    accelerate_file: str | None,
    reason: str,
    redo: bool,
    console: Console,
    server: StageServer | None = None,  # starts it without its imports, where it is one process
    watch: Watch = nobody,
) -> None:
    """Run a stage's process until it ends, and log its output; `watch` looks at it. `reason`: for its record.

    Raises:
        StageFailed: if it ended with an error or without a record.
    """
    before = _record(config, name)
    path = config.run_path / name / LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = command(config, name, overrides, accelerate_file)
    launch = channel.Launch(os.getpid(), reason, redo, token := uuid.uuid4().hex)
    with channel.opened(launch, config.run_path) as answers:  # a stage's folder may hold nothing else before its lock
        said = environment(accelerate_file, precision.asks_for_cpu(config, name)) | {channel.FOLDER: answers}
        process = None
        try:
            with StageLog(path, console) as log:
                log.write(f"$ {' '.join(argv)}\n")
                process = _started(argv, said, server if accelerate_file is None else None)
                assert process.stdout is not None, "it is a pipe"
                relay(process.stdout, log, watch(path.with_name(PROGRESS), token))
            exit_code = process.wait()
        except KeyboardInterrupt:
            if process is not None:
                _stop(process)
            _say_stopped(config, name, _record(config, name) not in (None, before), redo, path, console)
            raise
        finally:
            if process is not None and process.poll() is None:
                _stop(process)
        finished = _record(config, name)
        if exit_code == UNKNOWN and finished not in (None, before):
            exit_code = 0
        if exit_code != 0 or finished is None:
            raise _failure(name, exit_code, channel.error_in(answers), log)


def _say_stopped(config: RunConfig, name: str, is_finished: bool, redo: bool, log: Path, console: Console) -> None:
    """Say where a run was stopped, and how it goes on."""
    if config.smoke is not None:
        return say_last(console, f"\nStopped in {name}. The same command begins anew; its log is {log}")
    where = f"after {name}, which is finished" if is_finished else f"in {name}"
    again = ", without --redo," if redo else ""
    place = "there" if is_finished else f"the last checkpoint of {name}, if there is one"
    say_last(console, f"\nStopped {where}. The same command{again} goes on from {place}; its log is {log}")


def _record(config: RunConfig, name: str) -> Record | None:
    """Return the stage's record as it is now, or None."""
    recorded = manifest.read(config.run_path)
    return None if recorded is None else recorded.stages.get(name)


def _started(command: list[str], environment: dict[str, str], server: StageServer | None) -> StageProcess:
    """Start a stage's process: by the server, or where there is none, or it was killed, by its command."""
    forked = None if server is None else server.start(command, environment)
    if forked is not None:
        return forked
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def environment(accelerate_file: str | None = None, on_cpu: bool = False) -> dict[str, str]:
    """Return the environment of a stage's process, but for the folder of its channel; `on_cpu`: it needs no GPU."""
    variables = os.environ | {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONIOENCODING": "utf-8:backslashreplace",  # as the log is written, in any locale
        "PYTHONSAFEPATH": "1",  # or `-m` would look for this package in the working directory first
    }
    if accelerate_file is None:
        # One process on several GPUs would fall into torch's DataParallel, which no trainer here supports. A stage on
        # the CPU sees none. upstream: PEFT reads adapters through a GPU that it sees.
        variables["CUDA_VISIBLE_DEVICES"] = "" if on_cpu else _first_gpu()
    return variables


def _first_gpu() -> str:
    """Return the first GPU that this process may see; empty if it may see no GPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _failure(name: str, exit_code: int, error: str | None, log: StageLog) -> StageFailed:
    """Say why a stage ended without its record: the user's error that it left, or how it ended and its last lines."""
    if error is not None:
        return StageFailed(f"stage {name!r} stopped: {error}", 2)
    what = f"ended with exit code {exit_code}" if exit_code else "ended without a record in the manifest"
    if exit_code == UNKNOWN:
        what = "ended, and nobody saw how: the process that starts the stages was killed"
    if exit_code < 0:
        what = f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    tail = list(log.lines)[-NUM_LOG_LINES:]
    return StageFailed("\n  ".join([f"stage {name!r} {what}. The last lines of {log.path}:", *tail]), 1)


def _stop(process: StageProcess) -> None:
    """End a stage with all processes that it has started; insist after a while, or at another interrupt.

    Nothing is lost by not letting it finish what it does: a stage may be killed at any time.
    """
    try:
        stage = psutil.Process(process.pid)
        remaining = [stage, *stage.children(recursive=True)]
    except psutil.NoSuchProcess:
        remaining = []
    for insist in (psutil.Process.terminate, psutil.Process.kill):
        for one in remaining:
            with contextlib.suppress(psutil.NoSuchProcess):
                insist(one)
        with contextlib.suppress(KeyboardInterrupt):
            _, remaining = psutil.wait_procs(remaining, timeout=STOP_SECONDS)
    process.wait()
