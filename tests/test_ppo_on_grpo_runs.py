"""PPO on GRPOTrainer as users run it: resumed, in bf16, with baselines, in two processes, and what it refuses."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from pipeline import stage
from pipeline.config import options
from pipeline.config.load import load
from pipeline.config.stage_types import VARIANTS
from pipeline.launch import sharding
from pipeline.records import manifest
from pipeline.rl.critic_trainer import CriticTrainer
from pipeline.system.errors import UserError
from pipeline.training import checkpoints
from pipeline.training.trainers import TRAINED

TWO_PROCESSES = Path(__file__).parents[1] / "accelerate_configs" / "cpu_2_processes.yaml"
KIND = "ppo on grpo"
NUM_UPDATES = 7  # 12 prompts in batches of 8: a pass over the prompts is one update
TRAINING = tiny.PPO["training"] | {"total_episodes": 8 * NUM_UPDATES, "save_steps": 2, "lr_scheduler_type": "linear"}
SMALL = TRAINING | {"gradient_accumulation_steps": 1, "total_episodes": 4 * NUM_UPDATES}  # three updates in a pass
# TRL's own: what a user gets who says nothing of either.
DEFAULTS = {"bf16": None, "gradient_checkpointing": True}
OTHER_TIMES = {"step_time", "train_runtime", "train_samples_per_second", "train_steps_per_second"}
OTHER_TIMES |= {"train_loss"}  # the mean since the start, and since the resumption


def write(folder: Path, changes: dict, **top) -> Path:
    folder.mkdir(exist_ok=True)
    spec = {"data": "demonstrations", "trainer": "grpo", "training": TRAINING} | changes
    path = tiny.make_run(folder, {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": spec}, **top)
    tiny.write_rows(folder / "held_out.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    names = ("comparisons", "demonstrations", "held_out")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    return path


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    """A run whose SFT and reward model are finished."""
    folder = tmp_path_factory.mktemp("parents")
    config = load(write(folder, {}))
    for name in ("sft", "reward"):
        stage.run(config, name)
    return folder


def copied(parents: Path, folder: Path, changes: dict) -> Path:
    shutil.copytree(parents, folder)
    return write(folder, changes)


def train(path: Path) -> manifest.Record:
    config = load(path)
    stage.run(config, "ppo")
    return manifest.read(config.run_path).stages["ppo"]


def log_of(folder: Path) -> list[dict]:
    entries = json.loads((folder / "run" / "ppo" / "log_history.json").read_text())
    return [{key: value for key, value in entry.items() if key not in OTHER_TIMES} for entry in entries]


def output_of(folder: Path) -> bytes:
    return (folder / "run" / "ppo" / "output" / "adapter_model.safetensors").read_bytes()


class Killed(Exception):
    pass


@pytest.fixture
def killed_at(monkeypatch):
    """`killed_at(update)`: the next PPO stage dies after the checkpoint of this update."""
    mark = checkpoints.MarkComplete.on_save

    def arrange(update: int | None) -> None:
        def mark_then_die(self, args, state, control, **kwargs):
            mark(self, args, state, control, **kwargs)
            if state.global_step == update:
                raise Killed

        monkeypatch.setattr(checkpoints.MarkComplete, "on_save", mark_then_die)

    return arrange


CASES = {
    "plain": {},
    "several passes": {"training": SMALL},
    "leave one out": {"training": SMALL, "prompt_baseline": "leave_one_out", "baseline_completions": 4},
    "sft mean, held out": {"prompt_baseline": "sft_mean", "eval_data": "held_out", "eval_every": 3},
    "defaults": {"training": TRAINING | DEFAULTS},
}


@pytest.mark.parametrize("case", CASES)
def test_resumed_is_uninterrupted(parents, tmp_path, killed_at, case):
    """The same bytes, the same metrics, the same log."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(copied(parents, whole, CASES[case]))
    path = copied(parents, parts, CASES[case])
    killed = (2, 6) if case == "several passes" else (4,)
    for update in killed:
        killed_at(update)
        with pytest.raises(Killed):
            train(path)
    killed_at(None)
    record = train(path)
    assert record.resumed_from_step == killed[-1]
    assert record.metrics == expected.metrics
    assert (record.metrics["updates"], len(log_of(whole))) == (NUM_UPDATES, NUM_UPDATES + 1)
    assert log_of(parts) == log_of(whole)
    assert output_of(parts) == output_of(whole)


def test_killed_after_its_last_update(parents, tmp_path, killed_at):
    """There is nothing left to train, and it trains nothing more."""
    path = copied(parents, tmp_path / "run", {})
    killed_at(NUM_UPDATES)
    with pytest.raises(Killed):
        train(path)
    saved = load_file(path.parent / "run" / "ppo" / "checkpoints" / f"checkpoint-{NUM_UPDATES}" / TRAINED)
    killed_at(None)
    record = train(path)
    assert record.resumed_from_step == record.metrics["updates"] == NUM_UPDATES
    adapter = load_file(path.parent / "run" / "ppo" / "output" / "adapter_model.safetensors")
    of_policy = {name.removeprefix("policy.").replace(".default", ""): p for name, p in saved.items()}
    assert adapter.keys() == {name for name in of_policy if ".value." not in name and not name.startswith("value")}
    assert all(torch.equal(adapter[name], of_policy[name]) for name in adapter)


def test_a_checkpoint_holds_what_trains_and_no_more(parents, tmp_path, killed_at):
    path = copied(parents, tmp_path / "run", {})
    killed_at(4)
    with pytest.raises(Killed):
        train(path)
    folder = path.parent / "run" / "ppo" / "checkpoints"
    assert sorted(file.name for file in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    files = {file.name for file in (folder / "checkpoint-4").iterdir()}
    expected = {TRAINED, "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"}
    assert files == expected | {checkpoints.MARKER}
    names = load_file(folder / "checkpoint-4" / TRAINED).keys()
    kinds = {kind: {name for name in names if kind in name} for kind in (".default.", ".value.", "value.score")}
    assert all(kinds.values()) and set.union(*kinds.values()) == names
