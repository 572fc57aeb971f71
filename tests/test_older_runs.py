"""Run folders that an earlier version finished: this version takes their stages as finished."""

import tarfile
from pathlib import Path

import pytest

from pipeline.records import manifest

ARCHIVE = Path(__file__).parent / "fixtures" / "finished_before.tar.xz"
STAGES = {
    "config": ["pretrain", "sft", "reward", "reward-shift", "ppo", "rloo", "grpo", "dpo", "evaluate"],
    "base": ["sft", "dpo"],
}
RUNS = {"config": "before", "base": "base"}


@pytest.fixture
def older(tmp_path):
    """The earlier version's configs, data and run folders, in `tmp_path`."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.parametrize("name", STAGES)
def test_stages_that_an_earlier_version_finished_are_skipped(rlhf, older, name):
    """By the real command, in a process of its own."""
    run_dir = older / "runs" / RUNS[name]
    before = manifest.read(run_dir).stages
    assert list(before) == STAGES[name]
    done = rlhf("run", f"{name}.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("skip: finished, nothing") == len(STAGES[name]), done.stdout
    assert manifest.read(run_dir).stages == before
    assert not list(run_dir.rglob("log.txt"))  # no process of a stage was started
