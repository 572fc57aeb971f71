"""`rlhf run` and `rlhf plan`: decide, check everything, then one process per stage that is not current."""

import collections
import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import FileLock, Timeout
from rich.console import Console
from rich.rule import Rule

from pipeline.chain import preflight, run_folder, staleness
from pipeline.config import graph
from pipeline.config.graph import parents, waits_for
from pipeline.config.schema import RunConfig
from pipeline.launch import sharding
from pipeline.records import manifest
from pipeline.show import check_data, plan, results
from pipeline.show.screen import say
from pipeline.system.errors import StageFailed, UserError, all_of, unknown

LAUNCHER = "RLHF_LAUNCHER_PID"  # stages watch this process and end with it
REDO = "RLHF_REDO"  # set for a stage that is to begin anew, whatever checkpoints it has
_USER_ERROR = re.compile(r"exitcode\s*: 2 |non-zero exit status 2\b")
NUM_LOG_LINES = 20  # shown of a stage that failed
NUM_KEPT_LINES = 1000
STOP_SECONDS = 15  # that a stage has to end by itself


def select(config: RunConfig, until: str | None, only: str | None, redo: tuple[str, ...]) -> list[str]:
    """The stages a command is about, in order."""
    for option, name in [("--until", until), ("--only", only), *(("--redo", name) for name in redo)]:
        if name is not None and name not in config.stages:
            raise UserError(f"{option}: {unknown('stage', name, config.stages)}")
    if only:
        return [only]
    return [*graph.ancestors(config, until, waits_for), until] if until else list(config.stages)


def show_plan(config: RunConfig, console: Console, accelerate_config: str | None = None) -> None:
    """Check and print what a run would do, without writing to the run folder."""
    recorded, decisions = _decide(config)
    _launch_files(config, list(config.stages), accelerate_config)
    facts = _preflight(config, recorded, list(config.stages))
    plan.plan_table(config, decisions, facts, console)
    audits = {name: fact.audits for name, fact in facts.items()}
    check_data.tables(audits, config.checks.model_dump(), console)


def run(
    config: RunConfig,
    console: Console,
    overrides: tuple[str, ...] = (),
    until: str | None = None,
    only: str | None = None,
    redo: tuple[str, ...] = (),
    accelerate_config: str | None = None,
) -> None:
    """Run what is not current.

    Raises:
        UserError: if anything is wrong with config, data or run folder; nothing was trained then.
        StageFailed: if a stage's process failed.
    """
    selected = select(config, until, only, redo)
    for name in redo:
        if name not in selected:
            option = f"--only {only}" if only else f"--until {until}"
            wrong = f"{name!r} would lose its record and not run, since {option} is about {', '.join(selected)} alone"
            raise UserError(f"--redo {name}: {wrong}; leave out one of the two")
    recorded, decisions = _decide(config, redo)
    pending = [decision.stage for decision in decisions if decision.run and decision.stage in selected]
    _check_parents(config, decisions, selected)
    launch_files = _launch_files(config, pending, accelerate_config)
    gone = {name for stage in redo for name in (stage, *graph.descendants(config, stage))}
    recorded = recorded.without(gone)  # before the tokenizer is looked at: with all of them gone it may change
    facts = _preflight(config, recorded, pending) if pending else {}
    plan.plan_table(config, [d for d in decisions if d.stage in selected], facts, console)
    _tidy(config, [decision.stage for decision in decisions if not decision.run])
    if gone:
        manifest.drop(config.run_path, gone)
    for number, name in enumerate(pending, 1):
        kind = config.stages[name].type
        title = f"{number}/{len(pending)}  {name}" + (f" ({kind})" if kind != name else "")
        console.print(Rule(title, align="left", style="bold cyan"))
        _run_stage(config, name, overrides, launch_files[name], name in redo, console)
    results.shift_table(run_folder.open_run(config), console)
    results.result_table(run_folder.open_run(config), console)
    say(console, f"Everything is in {config.run_path}; `rlhf status {config.run_path}` shows how to load it.")


def _decide(config: RunConfig, redo: tuple[str, ...] = ()) -> tuple[manifest.Manifest, list[staleness.Decision]]:
    """The run's manifest and what happens to each stage; the files of finished stages are as recorded."""
    recorded = run_folder.open_run(config)
    decisions = staleness.decide(config, recorded, redo)
    for decision in decisions:
        if not decision.run:
            manifest.verify(config.run_path, decision.stage, recorded.stages[decision.stage])
    return recorded, decisions


def _tidy(config: RunConfig, finished: list[str]) -> None:
    """Remove what processes left that were killed after a record was written, or while the manifest was.

    Under the locks, since another process may be at work; what cannot be removed does no harm.
    """
    with contextlib.suppress(OSError):
        manifest.remove_partial(config.run_path)
    for name in finished:
        folder = config.run_path / name
        if not (folder / "checkpoints").is_dir():
            continue
        with contextlib.suppress(OSError, Timeout), FileLock(folder / ".lock").acquire(timeout=0):
            if name in run_folder.open_run(config).stages:
                shutil.rmtree(folder / "checkpoints")


def _check_parents(config: RunConfig, decisions: list[staleness.Decision], selected: list[str]) -> None:
    waiting = {decision.stage: decision.reason for decision in decisions if decision.run}
    for name in selected:
        for parent in parents(config.stages[name]).values():
            if name in waiting and parent in waiting and parent not in selected:
                raise UserError(f"--only {name}: needs {parent!r} first ({waiting[parent]}); use --until {name}")


def _preflight(config: RunConfig, recorded: manifest.Manifest, names: list[str]) -> dict[str, Any]:
    tokenizer, made = run_folder.tokenizer_of(config, recorded)
    return preflight.check(config, names, tokenizer, made.fingerprint)


def _launch_files(config: RunConfig, names: list[str], given: str | None) -> dict[str, str | None]:
    """The accelerate config of each stage: its own (relative to the config), or the command line's.

    Raises:
        UserError: with a line for each stage whose file is not there or that cannot run under it.
    """
    files: dict[str, str | None] = {}
    problems = []
    for name in names:
        own = config.stages[name].accelerate_config
        files[name] = path = config.resolve(own) if own else given
        if path is None:
            continue
        where = f"stages.{name}.accelerate_config" if own else "--accelerate-config"
        if not Path(path).is_file():
            raise UserError(f"{where}: no such file: {path}")
        if fault := sharding.refusal(config, name, sharding.of_file(path, where)):
            problems.append(f"stages.{name}: {where} is {path}: {fault}")
    if problems:
        raise all_of(config.source, "stage", "cannot run", problems)
    return files


def command(config: RunConfig, name: str, overrides: tuple[str, ...], accelerate_file: str | None) -> list[str]:
    """The command that runs one stage; the same one that users type under `accelerate launch`."""
    launch = [sys.executable, "-u"]
    if accelerate_file is not None:
        launch += ["-m", "accelerate.commands.launch", "--config_file", accelerate_file]
        if sharding.needs_gpu_id(accelerate_file):
            launch += ["--gpu_ids", _first_gpu()]
    return [*launch, "-m", "pipeline.stage", str(config.source), name, *overrides]


def _first_gpu() -> str:
    """The first GPU that this process may see; empty for none."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def _run_stage(
    config: RunConfig, name: str, overrides: tuple[str, ...], launch: str | None, redo: bool, console: Console
) -> None:
    path = config.run_path / name / run_folder.LOG
    path.parent.mkdir(parents=True, exist_ok=True)
    argv = command(config, name, overrides, launch)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    environment = os.environ | {LAUNCHER: str(os.getpid()), "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # what `_relay` reads, in any locale
    if not console.encoding.startswith("utf"):
        environment["TQDM_ASCII"] = " 123456789#"  # bars of blocks would be shown as escapes
    environment["PYTHONSAFEPATH"] = "1"  # or `-m` would look for this package in the working directory first
    if redo:
        environment[REDO] = "true"
    if launch is None:
        # One process on several GPUs would fall into torch's DataParallel, which no trainer here supports.
        environment["CUDA_VISIBLE_DEVICES"] = _first_gpu()
    before = run_folder.open_run(config).stages.get(name)
    process = subprocess.Popen(argv, env=environment, **streams)
    try:
        with _Log(path, console) as log:
            log.write(f"$ {' '.join(argv)}\n")
            _relay(process.stdout, log, console)
        exit_code = process.wait()
    except KeyboardInterrupt:
        _stop(process)
        finished = run_folder.open_run(config).stages.get(name, before) != before
        where = f"after {name}, which is finished" if finished else f"in {name}"
        again = ", without --redo," if redo else ""
        _say_last(console, f"\nStopped {where}. The same command{again} goes on from there; its log is {path}")
        raise
    finally:
        if process.poll() is None:
            _stop(process)
    if exit_code != 0 or name not in run_folder.open_run(config).stages:
        raise _failure(name, exit_code, log)


def _failure(name: str, exit_code: int, log: "_Log") -> StageFailed:
    """What to say of a stage that ended without its record, by its exit code and its last lines."""
    lines = list(log.lines)
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    # Under `accelerate launch` the launcher reports a stage's exit code in its text.
    if starts and (exit_code == 2 or any(_USER_ERROR.search(line) for line in lines)):
        first, *others = lines[starts[-1] :]
        others = list(itertools.takewhile(lambda line: line.startswith("  "), others))
        return StageFailed("\n".join([f"stage {name!r} stopped: {first.removeprefix('error: ')}", *others]), 2)
    what = f"ended with exit code {exit_code}" if exit_code else "ended without a record in the manifest"
    if exit_code < 0:
        what = f"was ended by signal {-exit_code} ({signal.strsignal(-exit_code)})"
    tail = lines[-NUM_LOG_LINES:]
    return StageFailed("\n  ".join([f"stage {name!r} {what}. The last lines of {log.path}:", *tail]), 1)


class _Log:
    """A stage's log file, and its last lines in memory. A disk that is full does not end the stage that says so."""

    def __init__(self, path: Path, console: Console):
        self.path = path
        self.lines: collections.deque[str] = collections.deque(maxlen=NUM_KEPT_LINES)
        self._console = console
        self._file = path.open("ab", buffering=0)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, text: str) -> None:
        """Add whole lines."""
        self.lines.extend(text.splitlines())
        if self._file.closed:
            return
        try:
            self._file.write(text.encode(errors="backslashreplace"))
        except OSError as error:
            self._file.close()
            _say_last(self._console, f"{self.path}: cannot be written any more ({error.strerror}); the stage goes on")


def _stop(process: subprocess.Popen) -> None:
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


def _say_last(console: Console, text: str) -> None:
    """Print, where there may be no terminal any more, or nobody who reads."""
    try:
        console.print(text, soft_wrap=True)
    except (OSError, SystemExit):  # rich ends the process when a pipe is closed
        with Path(os.devnull).open("w") as nowhere:  # or python would fail when it writes the rest at its end
            os.dup2(nowhere.fileno(), console.file.fileno())


def _relay(stream: IO[bytes], log: _Log, console: Console) -> None:
    """Show a stage's output as it comes, progress bars redrawn in place on a terminal; log its finished lines."""
    pending = b""
    while chunk := os.read(stream.fileno(), 65536):
        *lines, pending = (pending + chunk).split(b"\n")
        finished = "".join(line.decode(errors="replace").rstrip("\r").split("\r")[-1] + "\n" for line in lines)
        log.write(finished)
        console.file.write(chunk.decode(errors="replace") if console.is_terminal else finished)
        console.file.flush()
    if pending:
        log.write(pending.decode(errors="replace").split("\r")[-1] + "\n")
