"""What the machine refuses: a full or read-only disk, a second run at once, the network."""

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny

from pipeline import stage
from pipeline.config.load import load
from pipeline.records import manifest

RLHF = [sys.executable, "-m", "pipeline"]
SFT = tiny.SFT | {"training": {"max_steps": 4, "save_steps": 2}}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A config, and the record of its one stage in a run that nothing disturbed."""
    path = tiny.make_run(tmp_path_factory.mktemp("machine"), {"sft": SFT})
    undisturbed = load(path, (f"run_dir={path.parent / 'undisturbed'}",))
    stage.run(undisturbed, "sft")
    return path, manifest.read(undisturbed.run_path).stages["sft"]


def namespace() -> list[str]:
    """A command that runs another one where it may mount a disk of its own."""
    for options in (["--user", "--mount", "--map-root-user"], ["--mount"]):
        command = ["unshare", *options]
        try:
            subprocess.run([*command, "mount", "-t", "tmpfs", "none", "/mnt"], check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError):
            continue
        return command
    pytest.skip("this system lets nobody mount a small disk (unshare, tmpfs)")


def test_a_disk_that_is_full_and_then_read_only(uninterrupted, tmp_path):
    """The disk is full at once, then in the middle of a checkpoint; then there is room; then it is read-only."""
    path, record = uninterrupted
    script = """
        cd "$1"; mkdir run; mount -t tmpfs -o size=4k none run
        try() { "$@"; echo "exit code $?"; }
        try $RLHF run tiny.yaml
        mount -o remount,size=80k run; try $RLHF run tiny.yaml
        mount -o remount,size=30m run; try $RLHF run tiny.yaml
        mount -o remount,ro run; try $RLHF run tiny.yaml --redo sft
        try $RLHF run tiny.yaml
        cp run/manifest.json "$2"; umount run
    """
    command = [*namespace(), "sh", "-c", textwrap.dedent(script), "sh", str(path.parent), str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"RLHF": " ".join(RLHF)}, capture_output=True, text=True)
    shown = done.stdout + done.stderr
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 2", "exit code 2", "exit code 0", "exit code 2", "exit code 0"], shown
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    full = "the disk is full (0.0 MiB free). Make room, then give the same command again: what is finished stays"
    for error in errors[:2]:
        assert error.startswith(f"error: stage 'sft' stopped: {path.parent / 'run'}") and full in error
    assert "the disk is read-only. Allow writing there, or give another `run_dir`" in errors[2]
    assert str(path.parent / "run") in errors[2]
    assert "Traceback" not in shown
    assert "nothing changed" in done.stdout.rpartition("exit code 2")[2]  # all there, so nothing was to be written
    found = manifest.read(tmp_path).stages["sft"]
    assert found.output == record.output
    assert found.metrics == record.metrics


@pytest.mark.parametrize(("options", "reason"), [("size=8k", "No space left"), ("size=8k,ro", "Read-only file system")])
def test_a_cache_that_cannot_be_written(uninterrupted, tmp_path, options, reason):
    """It is the cache's fault, and not that of the data."""
    path, _ = uninterrupted
    script = 'cd "$1"; mount -t tmpfs -o $2 none "$3"; $RLHF plan tiny.yaml run_dir=planned; echo "exit code $?"'
    cache = tmp_path / "cache"
    cache.mkdir()
    command = [*namespace(), "sh", "-c", script, "sh", str(path.parent), options, str(cache)]
    environment = os.environ | {"RLHF": " ".join(RLHF), "HF_DATASETS_CACHE": str(cache)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.endswith("exit code 2\n"), done.stdout + done.stderr
    assert f"{cache}" in done.stderr and f"the cache of prepared data cannot be written ({reason}" in done.stderr
    assert "set HF_HOME to another folder" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["sft/checkpoints", "sft/.lock", ".manifest.lock", "tokenizer", "sft/log.txt"])
def test_a_file_in_the_place_of_a_folder_or_a_folder_in_that_of_a_file(finished, rlhf, name):
    place = finished.run_dir / name
    if place.is_dir():
        shutil.rmtree(place)
    if "lock" in name or name.endswith(".txt"):
        place.unlink(missing_ok=True)
        place.mkdir()
    else:
        place.write_text("mine")
    done = rlhf("run", finished.config, "--redo", "sft", "--until", "sft")
    assert done.returncode == 2, done.stdout + done.stderr
    assert str(place) in done.stderr and "Traceback" not in done.stdout + done.stderr
    assert place.is_dir() or place.read_text() == "mine"


def test_two_runs_at_once(uninterrupted):
    """One trains; the other finds the stage finished, or says that somebody is at work on it."""
    path, record = uninterrupted
    command = [*RLHF, "run", path, f"run_dir={path.parent / 'shared'}"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, **pipes) for _ in range(2)]
    ends = [(process.communicate(), process.returncode) for process in processes]
    assert any(exit_code == 0 for _, exit_code in ends), ends
    for (_, err), exit_code in ends:
        assert exit_code == 0 or (exit_code == 2 and "being run by another process" in err), err
    assert manifest.read(path.parent / "shared").stages["sft"].output == record.output


def test_no_connection_is_tried(uninterrupted, tmp_path):
    """Also where the hub is not said to be out of reach."""
    path, record = uninterrupted
    (tmp_path / "sitecustomize.py").write_text(
        textwrap.dedent("""
        import os, pathlib, socket
        def refuse(self, address, *_):
            with pathlib.Path(__file__).with_name("tried.txt").open("a") as file:
                file.write(f"{os.getpid()} {address}\\n")
            raise ConnectionRefusedError(f"no network: {address}")
        socket.socket.connect = socket.socket.connect_ex = refuse
    """)
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(__file__).resolve().parent.parent)])
    command = [*RLHF, "run", path, f"run_dir={path.parent / 'alone'}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "tried.txt").exists(), (tmp_path / "tried.txt").read_text()
    assert manifest.read(path.parent / "alone").stages["sft"].output == record.output
