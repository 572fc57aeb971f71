"""Kill runs of a tiny chain, run the same command again, and compare all that is left with an uninterrupted run.

    python tests/benchmarks/kills.py --folder /tmp/kills --kills 100

One half of the kills comes at a named point (`POINTS`: while a file is half written, between two steps of a hand-over),
the other at a random time. Signals are SIGKILL, SIGTERM, SIGINT and SIGHUP; they go to the launcher alone, to the stage
alone or to the whole process group. Some runs are killed a second time. Then the command runs to its end, and
everything recorded is compared with a run that was not interrupted: the manifest (but for times and the step a stage
was resumed from), every file of the run folder but the logs, and the names of all files in the data cache. Nothing may
be left over: no file that the uninterrupted run does not have, no process, no lock.

With `--at-random STAGE` every kill is a SIGKILL at a random time of this stage. With `--accelerate-config FILE` its
processes are started as `rlhf run` starts them, by `accelerate launch`.

A process takes long to import torch and TRL, so that launchers, and the servers that start their stages, are forked
from this one, which has done it. All else is as `rlhf run` does it. Compared are runs with the same numbers of
processes and threads, on CPUs in float32.
"""

import argparse
import contextlib
import faulthandler
import functools
import json
import os
import random
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tqdm.std

ROOT = Path(__file__).parents[2]
STAGES = ("sft", "reward", "ppo", "dpo", "evaluate")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
TARGETS = ("launcher", "stage", "group")
TIMES = ("started", "duration", "resumed_from_step")
# In the log of TRL's trainers these count from the start of the process.
SINCE_START = ("num_tokens", "train_loss", "eps", "step_time")
SECONDS = 40  # that a run may take, from a process that has imported everything
SECONDS_LAUNCHED = 180  # that it may take under `accelerate launch`


@dataclass(frozen=True)
class Point:
    """A call at which a process is killed: before it, after it, or "torn", with half of the file that it wrote.

    `call` is `module:name` or `module:Class.name`; it counts when `of` is a part of the text of its arguments.
    `again` starts from a finished stage that has lost its record, so that there is an output to replace.
    """

    name: str
    stage: str
    call: str
    when: str
    of: str = ""
    nth: int = 1
    by: str = "stage"
    cold: bool = False  # starts with an empty data cache
    again: bool = False


def _points() -> list[Point]:
    write, replace, rename = "pathlib:Path.write_text", "pathlib:Path.replace", "pathlib:Path.rename"
    save_state = "transformers.trainer_callback:TrainerState.save_to_json"
    finalize = "datasets.arrow_writer:ArrowWriter.finalize"
    points = []
    for stage in ("sft", "ppo", "evaluate"):
        points += [
            Point(f"{stage}: before the record", stage, "pipeline.records.manifest:commit", "before"),
            Point(f"{stage}: after the record", stage, "pipeline.records.manifest:commit", "after"),
            Point(f"{stage}: old output gone, new one not there", stage, rename, "before", "output.new", again=True),
            Point(f"{stage}: new output there, no record", stage, rename, "after", "output.new", again=True),
        ]
    for stage, saved in (("sft", "checkpoint-2"), ("reward", "checkpoint-4"), ("ppo", "checkpoint-4")):
        weights = "peft.peft_model:safe_save_file" if stage != "ppo" else "pipeline.training.trainers:save_file"
        points += [
            Point(f"{stage}: weights of {saved}", stage, weights, "torn", saved),
            Point(f"{stage}: optimizer of {saved}", stage, "torch:save", "torn", f"{saved}/optimizer.pt"),
            Point(f"{stage}: state of {saved}", stage, save_state, "torn", saved),
            Point(f"{stage}: {saved} without marker", stage, write, "before", f"{saved}/complete.json"),
            Point(f"{stage}: marker of {saved}", stage, write, "torn", f"{saved}/complete.json"),
            Point(f"{stage}: {saved} complete", stage, write, "after", f"{saved}/complete.json"),
        ]  # fmt: skip
    points += [
        Point("sft: identity of the checkpoints", "sft", write, "torn", "identity.txt"),
        Point("sft: processes of the checkpoints", "sft", write, "torn", "num_processes.txt"),
        Point("sft: checkpoints half removed", "sft", "shutil:rmtree", "torn", "sft/checkpoints"),
        Point("reward: an old checkpoint half removed", "reward", "shutil:rmtree", "torn", "checkpoint-2"),
        Point("sft: weights of the output", "sft", "peft.peft_model:safe_save_file", "torn", "output.new"),
        Point("sft: log history", "sft", write, "torn", "log_history.json"),
        Point("sft: old output half removed", "sft", "shutil:rmtree", "torn", "sft/output'", again=True),
        Point("sft: the run's tokenizer", "sft", "pipeline.records.manifest:update", "before"),
        Point("sft: first manifest, half written", "sft", "os:fsync", "torn"),
        Point("sft: first manifest, not in its place", "sft", replace, "before", "manifest.json"),
        Point("sft: first manifest, in its place", "sft", replace, "after", "manifest.json"),
        Point("sft: manifest with the record, half written", "sft", "os:fsync", "torn", nth=2),
        Point("sft: manifest with the record, not in its place", "sft", replace, "before", "manifest.json", 2),
        Point("ppo: completions, not written", "ppo", "pipeline.training.store:append", "before", "/completions-"),
        Point("ppo: completions", "ppo", "pipeline.training.store:append", "torn", "/completions-"),
        Point("ppo: completions, written", "ppo", "pipeline.training.store:append", "after", "/completions-"),
        Point("ppo: scores, not written", "ppo", "pipeline.training.store:append", "before", "/scores-"),
        Point("ppo: scores", "ppo", "pipeline.training.store:append", "torn", "/scores-"),
        Point("ppo: scores, written", "ppo", "pipeline.training.store:append", "after", "/scores-"),
        Point("ppo: in its first update", "ppo", "torch.optim.adamw:AdamW.step", "after", nth=2),
        Point("ppo: between checkpoints", "ppo", "torch.optim.adamw:AdamW.step", "after", nth=6),
        Point("ppo: place in the prompts", "ppo", "torch:save", "torn", "checkpoint-4/place-0.pt"),
        Point("ppo: weights of the output", "ppo", "peft.peft_model:safe_save_file", "torn", "output.new"),
        Point("dpo: merged weights", "dpo", "transformers.modeling_utils:safe_save_file", "torn", "merged"),
        Point("dpo: merged, no tokenizer", "dpo", "pipeline.models.loading:merge", "after"),
        Point("dpo: old merged weights, torn", "dpo", "transformers.modeling_utils:safe_save_file", "torn", "merged",
              again=True),
        Point("dpo: checkpoint of the new shape", "dpo", write, "after", "checkpoint-2/complete.json"),
        Point("evaluate: table", "evaluate", write, "torn", "table.json"),
        Point("evaluate: completions", "evaluate", "pipeline.training.store:append", "torn", "/completions-"),
        Point("data cache: a dataset as read", "sft", finalize, "before", by="launcher", cold=True),
        Point("data cache: a dataset as prepared", "sft", finalize, "before", nth=2, by="launcher", cold=True),
        Point("data cache: not in its place", "sft", "shutil:move", "before", "rlhf-pipeline/", 1, "launcher", True),
        Point("data cache: in its place", "sft", "shutil:move", "after", "rlhf-pipeline/", 1, "launcher", True),
        Point("data cache: a digest", "sft", write, "torn", "digests", by="launcher", cold=True),
        Point("launcher: before a stage", "reward", "pipeline.launch.process:command", "after", by="launcher"),
        Point("launcher: after a stage", "reward", "pipeline.show.results:result_table", "before", by="launcher"),
    ]  # fmt: skip
    return points


POINTS = _points()


@dataclass(frozen=True)
class Kill:
    """One interruption: at a point or after some seconds, by which signal, of which processes.

    `behind_checkpoint`: the seconds are those after the stage's first checkpoint.
    """

    number: signal.Signals
    target: str
    point: Point | None = None
    seconds: float = 0.0
    behind_checkpoint: bool = False


@dataclass
class Count:
    """What became of the kills."""

    kills: Counter[str] = field(default_factory=Counter)
    reached: set[str] = field(default_factory=set)
    missed: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


# --- processes -----------------------------------------------------------------------------------------------------


def _lookup(call: str) -> tuple[Any, str]:
    """The module or class that holds a call, and the call's name there."""
    module, _, dotted = call.partition(":")
    owner = __import__(module, fromlist=["_"])
    *classes, name = dotted.split(".")
    for part in classes:
        owner = getattr(owner, part)
    return owner, name


def _half(point: Point, arguments: tuple[Any, ...]) -> None:
    """Leave half of what a call wrote, or has to remove."""
    if point.call == "shutil:rmtree":
        files = sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file())
        for file in files[::2]:
            file.unlink()
        return
    file = next((Path(a) for a in arguments if isinstance(a, str | Path)), None)
    if point.call == "os:fsync":
        file = Path(f"/proc/self/fd/{arguments[0]}").readlink()
    os.truncate(file, file.stat().st_size // 2)


def kill_at(kill: Kill, reached: Path, launcher: int) -> None:
    """Let this process come to the end that `kill` describes."""
    point = kill.point
    owner, name = _lookup(point.call)
    original, calls = getattr(owner, name), [0]

    def end() -> None:
        reached.touch()
        if kill.target == "group":
            os.killpg(0, kill.number)
        elif kill.target == "launcher" and point.by == "stage":
            os.kill(launcher, kill.number)
        else:
            os.kill(os.getpid(), kill.number)
        if point.when == "torn":  # it must not go on with the half
            time.sleep(1)  # in which python raises what the signal means
            os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(original)
    def wrapper(*arguments: Any, **options: Any) -> Any:
        counts = point.of in str(arguments) and not reached.exists()
        calls[0] += counts
        now = counts and calls[0] == point.nth
        if now and point.when == "before":
            end()
        if now and point.when == "torn" and point.call == "shutil:rmtree":
            _half(point, arguments)
            end()
        result = original(*arguments, **options)
        if now and point.when == "torn" and point.call != "shutil:rmtree":
            _half(point, arguments)
            end()
        if now and point.when == "after":
            end()
        return result

    setattr(owner, name, wrapper)


def _own_locks() -> None:
    """Give this process locks of its own for progress bars: all forks share one, and a killed process keeps it."""
    tqdm.std.TqdmDefaultWriteLock.mp_lock = None
    classes = [tqdm.std.tqdm]
    while classes:
        bar = classes.pop()
        bar._lock = threading.RLock()
        classes += bar.__subclasses__()


def _become(main: Callable[[], None], argv: list[str]) -> None:
    """Run an entry point in this forked process and end as the interpreter would."""
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)  # of what it is now, a file or a pipe
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    _own_locks()
    faulthandler.dump_traceback_later(SECONDS_LAUNCHED - 10)
    sys.argv = argv
    code: Any = 0
    try:
        main()
    except SystemExit as error:
        code = error.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = None
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code is None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code or 0)


class Server:
    """The server of a launcher, forked from this process instead of started: it has loaded what stages import."""

    def __init__(self, kill: Kill | None, reached: Path, started: Path):
        from pipeline import stage, stage_server

        self.connection, theirs = socket.socketpair()
        launcher = os.getpid()
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            return
        self.connection.close()
        is_stage = False
        with theirs, contextlib.suppress(ConnectionError):
            is_stage = stage_server.serve(theirs, stage_server.ignore_signals())
        if not is_stage:
            os._exit(0)
        started.write_text(str(os.getpid()))
        if kill is not None and kill.point is not None and kill.point.by == "stage":
            kill_at(kill, reached, launcher)
        _become(stage.main, sys.argv)

    def start(self, server: Any) -> None:
        """Do what `StageServer.warm_up` does."""
        server._launcher, server._process = self.connection, self

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> None:
        os.waitpid(self.pid, 0)


class Bench:
    """The chain, its uninterrupted run and what it looked like before each stage."""

    def __init__(self, folder: Path, accelerate_config: str | None = None):
        self.launch = ["--accelerate-config", accelerate_config] if accelerate_config else []
        self.time_limit = SECONDS_LAUNCHED if accelerate_config else SECONDS
        self.folder, self.work = folder, folder / "work"
        self.config = folder / "base" / "tiny.yaml"
        self.output, self.reached, self.started = folder / "output.txt", folder / "reached", folder / "stage"
        self.seconds: dict[str, float] = {}
        self.seconds_behind: dict[str, float] = {}  # the stage's first checkpoint

    def start(self, until: str, kill: Kill | None = None) -> int:
        """Fork `rlhf run --until STAGE` as the leader of a process group of its own; it may start one stage."""
        self.started.unlink(missing_ok=True)
        pid = os.fork()
        if pid:
            with contextlib.suppress(OSError):
                os.setpgid(pid, pid)
            return pid
        with contextlib.suppress(OSError):
            os.setpgid(0, 0)
        out = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(out, 2)
        from pipeline import cli
        from pipeline.launch.stage_server import StageServer

        server = Server(kill, self.reached, self.started)
        StageServer.warm_up = lambda asked: server.start(asked)
        if kill is not None and kill.point is not None and kill.point.by == "launcher":
            kill_at(kill, self.reached, os.getpid())
        _become(cli.main, ["rlhf", "run", str(self.config), "--until", until, *self.launch])
        raise AssertionError

    def has_checkpoint(self, stage: str) -> bool:
        return any(self.work.glob(f"run/{stage}/checkpoints/*/complete.json"))

    def wait(self, pid: int, meanwhile: Callable[[], object] = lambda: None) -> int:
        """The exit code of a launcher, negative for a signal, as subprocess has it."""
        deadline = time.time() + self.time_limit
        while True:
            meanwhile()
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            if time.time() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return -99
            time.sleep(0.01)

    def make(self, until: str, trainer: str) -> None:
        """The chain's files; the uninterrupted run, stage by stage, with a copy of it before and after each."""
        sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
        import tiny

        base = self.folder / "base"
        base.mkdir(parents=True)
        steps = {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}
        ppo = tiny.PPO | {
            "prompt_baseline": "sft_mean",
            "baseline_completions": 2,
            "trainer": trainer,
            "eval_data": "heldout",
            "eval_every": 3,
        }
        ppo["training"] = tiny.PPO["training"] | {
            "total_episodes": 320 if self.launch else 64,  # or two processes had ended before they were killed
            "per_device_train_batch_size": 2,
            "save_steps": 2,
        }
        stages = {
            "sft": tiny.SFT | {"training": steps},
            "reward": tiny.REWARD | {"training": tiny.REWARD["training"] | steps | {"save_total_limit": 1}},
            "ppo": ppo,
            "dpo": tiny.DPO | {"lora": tiny.LORA | {"r": 2}, "training": tiny.DPO["training"] | steps},
            "evaluate": {"data": "heldout", "max_new_tokens": 8, "judge": "judge:score"},
        }
        names = ("comparisons", "demonstrations", "heldout")
        (base / "judge.py").write_text("def score(prompt, completion):\n    return -len(completion)\n")
        tiny.write_rows(base / "heldout.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
        data = {name: {"path": f"{name}.jsonl"} for name in names}
        tiny.make_run(base, stages, data=data, run_dir=str(self.work / "run"))
        for file in (base / "model").iterdir():
            os.utime(file, (1e9, 1e9))  # old enough for its digest to be kept
        self.work.mkdir()
        for stage in STAGES[: STAGES.index(until) + 1]:
            shutil.copytree(self.work, self.folder / f"before-{stage}")
            start = time.time()
            seen: list[float] = []
            look = functools.partial(self._note_checkpoint, stage, seen)
            code = self.wait(self.start(stage), look)
            self.seconds[stage] = time.time() - start
            self.seconds_behind[stage] = time.time() - seen[0] if seen else 0.0
            if code:
                raise SystemExit(f"the uninterrupted run failed in {stage}:\n{self.output.read_text()}")
            shutil.copytree(self.work, self.folder / f"after-{stage}")

    def _note_checkpoint(self, stage: str, seen: list[float]) -> None:
        if not seen and self.has_checkpoint(stage):
            seen.append(time.time())

    def lay_out(self, stage: str, point: Point | None = None) -> None:
        """The work folder as it was before a stage, or after it but without its record."""
        shutil.rmtree(self.work)
        again = point is not None and point.again
        shutil.copytree(self.folder / f"{'after' if again else 'before'}-{stage}", self.work)
        if again:
            from pipeline.records import manifest

            manifest.drop(self.work / "run", [stage])
        if point is not None and point.cold:
            shutil.rmtree(self.work / "cache", ignore_errors=True)
        self.reached.unlink(missing_ok=True)

    def interrupt(self, until: str, kill: Kill) -> tuple[bool, list[str]]:
        """Run and kill; whether the kill came before the end, and what was not as it should be."""
        pid = self.start(until, kill)
        if kill.point is None:
            deadline = time.time() + self.time_limit
            while kill.behind_checkpoint and not self.has_checkpoint(until) and time.time() < deadline:
                time.sleep(0.01)
            time.sleep(kill.seconds)
            targets = [pid]
            if kill.target == "stage" and self.started.exists():
                targets = [int(self.started.read_text() or pid)]
            with contextlib.suppress(ProcessLookupError):
                for target in targets:
                    if kill.target == "group":
                        _kill_all(pid, kill.number)
                    else:
                        os.kill(target, kill.number)
        code = self.wait(pid)
        faults = _alive(pid)
        text = self.output.read_text()
        if code == 0:  # it was too late, or the point is not on the way
            return kill.point is not None and self.reached.exists(), faults
        by_launcher = kill.point is not None and kill.point.by == "launcher"
        to_launcher = kill.target != "stage" or by_launcher or (kill.point is None and targets == [pid])
        allowed = [1]
        if to_launcher:
            allowed = [-kill.number if kill.number == signal.SIGKILL else 128 + kill.number]
            if kill.point is None:
                allowed.append(-kill.number)  # before and after its work `rlhf run` has no handlers
        if code not in allowed:
            faults.append(f"exit code {code}, expected one of {allowed}: {text[-1500:]}")
        # Under `accelerate launch` a process that is not killed yet says that it has lost the others.
        if to_launcher and not self.launch and "Traceback" in text and "KeyboardInterrupt" not in text:
            faults.append(f"a traceback: {text[-1500:]}")
        in_stage = kill.point is not None and kill.point.by == "stage" and kill.number != signal.SIGKILL
        if in_stage and to_launcher and "Stopped " not in text:
            faults.append(f"said nothing of having been stopped: {text[-1500:]}")
        return True, faults + self._untrue(text)

    def _untrue(self, text: str) -> list[str]:
        """What the launcher said of the stage it was stopped in, if that is not so."""
        from pipeline.records import manifest

        recorded = manifest.read(self.work / "run")
        finished = recorded.stages if recorded else {}
        for stage in STAGES:
            if f"Stopped in {stage}." in text and stage in finished:
                return [f"said 'Stopped in {stage}', which is finished"]
            if f"Stopped after {stage}," in text and stage not in finished:
                return [f"said 'Stopped after {stage}', which has no record"]
        return []

    def compare(self, stage: str) -> list[str]:
        """Where the work folder differs from the uninterrupted run after a stage; what is left over in it."""
        expected, seen = (contents(folder) for folder in (self.folder / f"after-{stage}", self.work))
        faults = [f"left over: {name}" for name in sorted(seen.keys() - expected.keys())]
        faults += [f"missing: {name}" for name in sorted(expected.keys() - seen.keys())]
        faults += [f"differs: {name}" for name in sorted(seen.keys() & expected.keys()) if seen[name] != expected[name]]
        return faults + _held(self.work)

    def resumed(self, stage: str) -> str:
        """Say from which step a stage went on."""
        from pipeline.records import manifest

        recorded = manifest.read(self.work / "run")
        if recorded is None or stage not in recorded.stages:
            return "not finished"
        step = recorded.stages[stage].resumed_from_step
        return "from the start" if step is None else f"from step {step}"

    def trial(self, stage: str, kills: list[Kill]) -> tuple[int, list[str]]:
        """Kill a run of one stage as often as `kills` says, finish it, compare; how many kills came in time."""
        first = kills[0].point
        self.lay_out(stage, first)
        in_time, faults = 0, []
        for kill in kills:
            came, wrong = self.interrupt(stage, kill)
            in_time += came
            faults += wrong
        code = self.wait(self.start(stage))
        if code:
            return in_time, [*faults, f"not recovered, exit code {code}: {self.output.read_text()[-2000:]}"]
        return in_time, faults + self.compare(stage)


def _kill_all(launcher: int, number: int) -> None:
    """Send a signal to a launcher's group, and to what `accelerate launch` has put in groups of their own."""
    import psutil

    below = psutil.Process(launcher).children(recursive=True) if number == signal.SIGKILL else []
    os.killpg(launcher, number)
    for process in below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _alive(group: int) -> list[str]:
    """Processes of a group that do not end within 20 seconds after their launcher."""
    import psutil

    remaining: list[str] = []
    for _ in range(200):
        remaining = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                    remaining.append(f"still alive: {process.pid} {process.name()}")
        if not remaining:
            return []
        time.sleep(0.1)
    return remaining


def _held(folder: Path) -> list[str]:
    """Locks that cannot be taken."""
    from filelock import FileLock, Timeout

    held = []
    for path in folder.rglob("*.lock"):
        try:
            FileLock(path).acquire(timeout=0).lock.release()
        except Timeout:
            held.append(f"held: {path}")
    return held


def _without(value: Any, keys: Callable[[str], bool]) -> Any:
    if isinstance(value, dict):
        return {key: _without(item, keys) for key, item in value.items() if not keys(key)}
    return [_without(item, keys) for item in value] if isinstance(value, list) else value


OF_ATTEMPTS = ("log.txt", "progress.jsonl", "chain.json", "last_run.json", "report.html")  # they tell of each attempt


def contents(folder: Path) -> dict[str, Any]:
    """What is compared of every file of a run folder and its data cache, by path."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if "/kept" in name:  # what a run has looked at depends on where it was killed
            continue
        if path.is_dir():
            found[f"{name}/"] = None
        elif name.startswith("cache/") or path.name in OF_ATTEMPTS:
            found[name] = None
        elif path.name == "manifest.json":
            found[name] = _without(json.loads(path.read_text()), lambda key: key in TIMES)
        elif path.name == "log_history.json":
            entries = json.loads(path.read_text())
            found[name] = _without(entries, lambda key: key in SINCE_START or key.endswith(("_runtime", "_per_second")))
        elif path.name.startswith(("completions-", "scores-")) and path.suffix == ".jsonl":
            found[name] = sorted(_entries(path))
        else:
            found[name] = path.read_bytes()
    return found


def _entries(path: Path) -> Iterator[str]:
    """The whole lines of a store; what a killed process left of one is passed over, as the package does."""
    for line in path.read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.dumps(json.loads(line), sort_keys=True)


# --- the kills -----------------------------------------------------------------------------------------------------


def draw(
    bench: Bench, number: int, points: list[Point], at_random: str | None, behind: bool, rng: random.Random
) -> tuple[str, list[Kill]]:
    """The kills of one trial: at the points named, or every second one at the next point and the others at any time."""
    if at_random:
        longest = bench.seconds_behind[at_random] if behind else bench.seconds[at_random] * 1.05
        return at_random, [Kill(signal.SIGKILL, "group", None, rng.uniform(0, longest), behind)]
    if len(points) < len(POINTS):
        at = points[number % len(points)]
        return at.stage, [Kill(SIGNALS[number % len(SIGNALS)], TARGETS[number % len(TARGETS)], at)]
    at = points[number // 2 % len(points)] if number % 2 == 0 else None
    stage = at.stage if at else rng.choice(STAGES)

    def seconds() -> float:
        return rng.uniform(0, bench.seconds[stage] * 1.05)

    kills = [Kill(rng.choice(SIGNALS), rng.choice(TARGETS), at, 0.0 if at else seconds())]
    if rng.random() < 0.2:
        kills.append(Kill(rng.choice(SIGNALS), rng.choice(TARGETS), None, seconds()))
    return stage, kills


def said(kill: Kill) -> str:
    since = " behind the first checkpoint" if kill.behind_checkpoint else ""
    where = kill.point.name if kill.point else f"after {kill.seconds:.1f} s{since}"
    return f"{kill.number.name} to {kill.target}, {where}"


def run(bench: Bench, options: argparse.Namespace) -> Count:
    """Kill until there are enough of them, or the time is up."""
    rng, count, number, end = random.Random(options.seed), Count(), 0, time.time() + 60 * options.minutes
    points = [point for point in POINTS if not options.points or point.name in options.points]
    num_kills = len(points) if options.points else options.kills
    while number < num_kills and time.time() < end:
        stage, kills = draw(bench, number, points, options.at_random, options.behind_checkpoint, rng)
        number += 1
        start = time.time()
        in_time, faults = bench.trial(stage, kills)
        resumed = bench.resumed(stage)
        what = f"{stage}: " + "; then ".join(map(said, kills))
        for kill in kills[:in_time]:
            count.kills[f"{kill.number.name} to {kill.target}"] += 1
        point = kills[0].point
        if point is not None:
            (count.reached.add if bench.reached.exists() else count.missed.append)(point.name)
        count.faults += [f"{what}: {fault}" for fault in faults]
        print(f"{number:3d}  {time.time() - start:5.1f} s  {what}: {faults or 'equal'}, {resumed}", flush=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--kills", type=int, default=100, help="that many runs are killed, some of them twice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=60.0, help="stop after so many")
    parser.add_argument("--points", nargs="*", default=[], choices=[point.name for point in POINTS], metavar="NAME",
                        help="only these, each once, by all signals and of all processes in turn")  # fmt: skip
    parser.add_argument("--at-random", choices=STAGES, help="only SIGKILL, at random times of this stage")
    parser.add_argument("--behind-checkpoint", action="store_true", help="with --at-random: after the first checkpoint")
    parser.add_argument("--trainer", choices=["ppo", "grpo"], default="ppo", help="TRL's class that trains PPO")
    parser.add_argument("--accelerate-config", metavar="FILE", help="run stages under `accelerate launch`")
    options = parser.parse_args()
    if options.behind_checkpoint and not options.at_random:
        parser.error("--behind-checkpoint needs --at-random")
    # A shell lets a command in the background ignore the one, and `nohup` the other.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    folder = options.folder.resolve()
    os.environ |= {
        "HF_HOME": str(folder / "hf"),
        "HF_DATASETS_CACHE": str(folder / "work" / "cache"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    sys.path.insert(0, str(ROOT))
    import pipeline.launcher
    import pipeline.stage
    import pipeline.stages.dpo
    import pipeline.stages.evaluate
    import pipeline.stages.ppo
    import pipeline.stages.reward
    import pipeline.stages.sft  # noqa: F401

    file = options.accelerate_config
    bench = Bench(folder, str(Path(file).resolve()) if file else None)
    start = time.time()
    used = [point.stage for point in POINTS if not options.points or point.name in options.points]
    bench.make(options.at_random or max(used, key=STAGES.index), options.trainer)
    print(f"uninterrupted: {bench.seconds}, with imports {time.time() - start:.0f} s", flush=True)
    count = run(bench, options)
    result = {
        "kills": dict(sorted(count.kills.items())),
        "total": sum(count.kills.values()),
        "points": len(POINTS),
        "reached": sorted(count.reached),
        "missed": count.missed,
        "faults": count.faults,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))
    raise SystemExit(1 if count.faults else 0)


if __name__ == "__main__":
    main()
