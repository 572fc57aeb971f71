"""Killed at any time, by any signal, a run ends with all its processes, says what is true, and recovers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import tiny
from filelock import FileLock
from rich.console import Console

from pipeline import stage
from pipeline.chain import run_folder, staleness
from pipeline.config.load import load
from pipeline.launch import channel, process
from pipeline.records import manifest
from pipeline.system.errors import UserError
from pipeline.system.signals import Interrupted, Stopped, stopping
from pipeline.training import checkpoints

ROOT = Path(__file__).parents[1]
ENDING = [signal.SIGTERM, signal.SIGHUP, signal.SIGINT]
# Each is a place where a process killed in it leaves another kind of half-done work; `kills.py` has many more.
POINTS = [
    "sft: after the record",
    "sft: old output gone, new one not there",
    "sft: optimizer of checkpoint-2",
    "sft: checkpoint-2 complete",
    "sft: checkpoints half removed",
    "sft: identity of the checkpoints",
    "sft: first manifest, half written",
    "sft: manifest with the record, not in its place",
    "sft: before the record",
    "data cache: a dataset as prepared",
    "ppo: completions",
    "ppo: scores",
]


def test_killed_at_named_points_it_ends_as_if_it_had_not_been(tmp_path):
    """Every signal, at the launcher, the stage and the group; the second run is compared with an uninterrupted one."""
    command = [sys.executable, ROOT / "tests" / "benchmarks" / "kills.py", "--folder", tmp_path / "kills"]
    done = subprocess.run([*command, "--points", *POINTS], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "kills" / "result.json").read_text())
    assert result["faults"] == [] and result["missed"] == []
    assert result["reached"] == sorted(POINTS)
    assert result["kills"] == {f"{s} to {t}": 1 for s in ("SIGHUP", "SIGINT", "SIGKILL", "SIGTERM")
                               for t in ("group", "launcher", "stage")}  # fmt: skip


@pytest.fixture
def config(tmp_path, make_record):
    """A run in which sft and reward are finished: their records are current, nothing was trained."""
    loaded = load(tiny.make_run(tmp_path, {"sft": tiny.SFT, "reward": tiny.REWARD}))
    run_folder.prepare_run(loaded)
    for name in loaded.stages:
        identity = staleness.identify(loaded, name, manifest.read(loaded.run_path))
        output = manifest.Output(kind="adapter", path=f"{name}/output", files={})
        manifest.commit(loaded.run_path, name, make_record(**vars(identity), type=name, output=output))
    return loaded


def leave_checkpoints(config, name):
    folder = config.run_path / name / "checkpoints"
    (folder / "checkpoint-2").mkdir(parents=True)
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"half")
    (folder.parent / ".lock").touch()
    return folder


def test_what_a_process_killed_after_its_record_left_is_removed(config, cli):
    left = {name: leave_checkpoints(config, name) for name in config.stages}
    partial = config.run_path / "manifest.json.tmp"
    partial.write_text("{")
    with FileLock(config.run_path / "reward" / ".lock"):  # somebody is at work there
        assert cli("run", config.source)[0] == 0
    assert not left["sft"].exists() and not partial.exists()
    assert left["reward"].exists()
    assert cli("plan", config.source)[0] == 0
    assert left["reward"].exists()  # a plan writes nothing
    assert cli("run", config.source)[0] == 0
    assert not left["reward"].exists()


def test_a_stage_by_hand_removes_them_too(config, capsys):
    left = leave_checkpoints(config, "sft")
    stage.run(config, "sft")
    assert "sft: finished already" in capsys.readouterr().out
    assert not left.exists()


def test_the_checkpoints_of_an_unfinished_stage_stay(config, cli):
    left = leave_checkpoints(config, "reward")
    manifest.drop(config.run_path, ["reward"])
    assert cli("run", config.source, "--until", "sft")[0] == 0
    assert left.exists()


def test_the_stamps_of_checkpoints_are_written_once(tmp_path):
    """A process killed while it writes them anew would cost the checkpoints beside them."""
    folder = tmp_path / "checkpoints"
    checkpoints.open_folder(folder, "identity", 1)
    stamps = sorted(folder.iterdir())
    for stamp in stamps:
        stamp.chmod(0o400)
        os.utime(stamp, (1, 1))
    assert checkpoints.open_folder(folder, "identity", 1) is False
    assert [stamp.stat().st_mtime for stamp in stamps] == [1, 1]
    (folder / "checkpoint-2").mkdir()
    stamps[1].chmod(0o600)
    checkpoints.open_folder(folder, "identity", 2)  # with no complete checkpoint the number may change
    assert (folder / "num_processes.txt").read_text() == "2" and (folder / "checkpoint-2").exists()
    assert checkpoints.open_folder(folder, "another", 2) is True
    assert not (folder / "checkpoint-2").exists()


@pytest.mark.parametrize("fault", ["tokenizer", "rows"])
def test_a_stage_that_is_refused_keeps_its_record_and_those_after_it(config, fault):
    """It was to run since its config had changed; undoing the change brings everything back."""
    before = manifest.read(config.run_path)
    overrides = ["stages.sft.training.learning_rate=0.5"]
    if fault == "tokenizer":
        file = config.run_path / "tokenizer" / "tokenizer.json"
        file.write_text(file.read_text().replace('"<system>"', '"<System>"'))
    else:
        overrides.append("stages.sft.training.max_length=3")
    with pytest.raises(UserError):
        stage.run(load(config.source, tuple(overrides)), "sft")
    assert manifest.read(config.run_path) == before
    if fault == "rows":
        assert not any(decision.run for decision in staleness.decide(config, before))


# A stage with two processes of its own, as `accelerate launch` has them: in sessions that no terminal reaches.
TREE = r"""
import subprocess, sys, time
child = [sys.executable, "-c", "import os, time; os.write(1, b'pid %d\\n' % os.getpid()); time.sleep(100)"]
children = [subprocess.Popen(child, start_new_session=True) for _ in range(2)]
time.sleep(100)
"""
# A stage that is finished, and does not end.
FINISHES = """
import sys, time
from pathlib import Path
from pipeline.records import manifest
run_dir = Path(sys.argv[1])
record = manifest.read(run_dir).stages["reward"]
manifest.commit(run_dir, "sft", record)
print("pid", 0, flush=True)
print("pid", 0, flush=True)
time.sleep(100)
"""


def stop(config, monkeypatch, tmp_path, program, number, said=2):
    """Run a program in the place of stage sft until it has said its pids, then send a signal to this process alone."""
    argv = [sys.executable, "-c", program, str(config.run_path)]
    monkeypatch.setattr(process, "command", lambda *_: argv)
    log = config.run_path / "sft" / "log.txt"

    def send():
        deadline = time.time() + 20
        while time.time() < deadline and not (log.exists() and log.read_text().count("\npid") == said):
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=send, daemon=True).start()
    with (tmp_path / "shown.txt").open("w") as shown, pytest.raises(Stopped) as stopped, stopping():
        process.run_stage(config, "sft", (), None, "not finished yet", False, Console(file=shown, width=1000))
    assert stopped.value.exit_code == 128 + number
    pids = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("pid")]
    return (tmp_path / "shown.txt").read_text(), pids


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_to_the_launcher_ends_all_processes_of_a_stage(config, monkeypatch, tmp_path, number):
    shown, pids = stop(config, monkeypatch, tmp_path, TREE, number)
    words = "Stopped in sft. The same command goes on from the last checkpoint of sft, if there is one; its log is "
    assert words in shown
    assert len(pids) == 2
    psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=10)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_it_says_that_the_stage_it_was_stopped_in_is_finished(config, monkeypatch, tmp_path):
    """Also where there was a record before, of another config."""
    shown, _ = stop(config, monkeypatch, tmp_path, FINISHES, signal.SIGTERM)
    assert "Stopped after sft, which is finished. The same command goes on from there" in shown
    assert "Stopped in" not in shown


def test_signals_become_interrupts_and_are_put_back():
    before = [signal.getsignal(number) for number in ENDING]
    for number in ENDING:
        with pytest.raises(Stopped) as stopped, stopping():
            try:
                signal.raise_signal(number)
            except KeyboardInterrupt as error:  # so that libraries clean up as they do at Ctrl-C
                assert isinstance(error, Interrupted) == (number != signal.SIGINT)
                raise
        assert stopped.value.exit_code == 128 + number
    assert [signal.getsignal(number) for number in ENDING] == before


def test_an_ignored_hangup_stays_ignored(monkeypatch):
    """As under `nohup`."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping():
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_worker_ends_by_the_signal():
    """Pools of processes end their workers by SIGTERM; a traceback of each would be shown."""
    with stopping():
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(write, b".")  # python forgets the signals that came before
            while True:
                time.sleep(0.01)
        assert os.read(read, 1) == b"."
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGTERM


def test_a_stage_ends_though_nobody_asked_how_its_launcher_ended(tmp_path):
    """The launcher is a zombie then: its number is still taken. What it can no longer remove, the stage removes."""
    folder = tmp_path / "rlhf-launch"
    folder.mkdir()
    gone = subprocess.Popen(["true"])
    while psutil.Process(gone.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    pid = os.fork()
    if pid == 0:
        channel.end_with_launcher(gone.pid, folder)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
    assert not folder.exists()
    gone.wait()
