"""PPO that was killed and goes on ends as PPO that was not: the same bytes, the same log."""

import json
import shutil
import time
from pathlib import Path

import pytest
import tiny
import warm

from pipeline import stage
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.training import checkpoints
from pipeline.training.trainers import TRAINED

TWO_PROCESSES = Path(__file__).parents[1] / "accelerate_configs" / "cpu_2_processes.yaml"
# Of PPOTrainer: episodes per second; of GRPOTrainer: seconds, and the mean loss since the start or the resumption.
OTHER_TIMES = ("eps", "step_time", "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second")
NUM_UPDATES = 7  # 12 prompts in batches of 8: a pass over the prompts is one update
TRAINING = tiny.PPO["training"] | {
    "total_episodes": 8 * NUM_UPDATES,
    "save_steps": 2,
    "num_sample_generations": 3,
    "lr_scheduler_type": "linear",
}
LEAVE_ONE_OUT = {"prompt_baseline": "leave_one_out", "baseline_completions": 4}
# Half of the batch: a pass over the prompts has three updates.
SMALL = TRAINING | {"gradient_accumulation_steps": 1, "total_episodes": 4 * NUM_UPDATES}


def write(folder: Path, options: dict, **top) -> Path:
    folder.mkdir(exist_ok=True)
    spec = {"data": "demonstrations", "training": TRAINING} | options
    path = tiny.make_run(folder, {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": spec}, **({"gate": "off"} | top))
    tiny.write_rows(folder / "held_out.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    names = ("comparisons", "demonstrations", "held_out")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    return path


def train(path: Path) -> manifest.Record:
    config = load(path)
    stage.run(config, "ppo")
    return manifest.read(config.run_path).stages["ppo"]


def run_before_ppo(path: Path) -> None:
    config = load(path)
    for name in ("sft", "reward"):
        stage.run(config, name)


def train_until_killed(path: Path) -> None:
    with pytest.raises(tiny.Killed):
        train(path)


def log_of(folder: Path) -> list[dict]:
    entries = json.loads((folder / "run" / "ppo" / "log_history.json").read_text())
    return [{key: value for key, value in entry.items() if key not in OTHER_TIMES} for entry in entries]


def bytes_of(folder: Path) -> dict[str, bytes]:
    output = folder / "run" / "ppo" / "output"
    return {file.name: file.read_bytes() for file in sorted(output.glob("*.safetensors"))}


FULL = "separate models"
CASES = {
    "plain": {},
    "several passes": {"training": SMALL},
    "leave one out": LEAVE_ONE_OUT | {"training": SMALL},
    "sft mean, held out": {"prompt_baseline": "sft_mean", "eval_data": "held_out", "eval_every": 3},
    "greedy": {"prompt_baseline": "greedy"},
    "answers of the rows": {"prompt_baseline": "reference"},
    "gradient checkpointing": {"training": TRAINING | {"gradient_checkpointing": True}},
    FULL: {"lora": None},
}


# All weights are never trained in bfloat16.
ALL = [(case, dtype) for case in CASES for dtype in ("float32", "bfloat16") if (case, dtype) != (FULL, "bfloat16")]


@pytest.mark.parametrize(("case", "dtype"), ALL)
def test_resumed_is_uninterrupted(tmp_path, killed_at, case, dtype):
    options = CASES[case]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    model = {"model": {"path": "model", "dtype": dtype}}
    path = write(whole, options, **model)
    run_before_ppo(path)
    shutil.copytree(whole, parts)
    expected = train(path)

    path = write(parts, options, **model)
    killed = (2, 6) if case == "several passes" else (4,)
    for update in killed:
        killed_at(update)
        train_until_killed(path)
    killed_at(None)
    record = train(path)
    assert record.resumed_from_step == killed[-1]
    assert record.metrics == expected.metrics
    assert log_of(parts) == log_of(whole)
    assert bytes_of(parts) == bytes_of(whole)


@pytest.mark.parametrize(("save_steps", "changed", "kept"), [(0.28, 0.28, [4, 6]), (2, 3, [3, 6])])
def test_checkpoints_after_a_resume(tmp_path, killed_at, save_steps, changed, kept):
    """A share is of all updates, not of those that remain; and the options of now hold."""
    every = {"save_steps": save_steps, "save_total_limit": 2}
    path = write(tmp_path, {"training": TRAINING | every})
    run_before_ppo(path)
    killed_at(2)
    train_until_killed(path)
    killed_at(6)
    path = write(tmp_path, {"training": TRAINING | every | {"save_steps": changed}})
    train_until_killed(path)
    folder = tmp_path / "run" / "ppo" / "checkpoints"
    assert sorted(checkpoints.step_of(file) for file in folder.glob("checkpoint-*")) == kept


def test_killed_after_its_last_update(tmp_path, killed_at):
    """There is nothing left to train, and it trains nothing more."""
    path = write(tmp_path, {})
    run_before_ppo(path)
    killed_at(NUM_UPDATES)
    train_until_killed(path)
    killed_at(None)
    record = train(path)
    assert record.resumed_from_step == record.metrics["updates"] == NUM_UPDATES


def test_a_checkpoint_holds_what_trains_and_no_more(tmp_path, killed_at):
    path = write(tmp_path, {})
    run_before_ppo(path)
    killed_at(4)
    train_until_killed(path)
    folder = tmp_path / "run" / "ppo" / "checkpoints"
    assert sorted(file.name for file in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    files = {file.name for file in (folder / "checkpoint-4").iterdir()}
    expected = {TRAINED, "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth", "place-0.pt"}
    assert files == expected | {checkpoints.MARKER}


# With TRL's defaults: PPO on GRPOTrainer computes in bf16, PPOTrainer in the type of the weights.
TRAINERS = {"ppo": {}, "grpo": {"bf16": True}}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_two_processes_that_were_killed_go_on(tmp_path, trainer):
    """Each process goes on with its own random numbers and its own place in the prompts."""
    training = TRAINING | {"per_device_train_batch_size": 2, "total_episodes": 8 * 20, "save_steps": 5}
    training |= {"learning_rate": 1e-3, "gradient_checkpointing": True} | TRAINERS[trainer]
    options = {"prompt_baseline": "sft_mean", "eval_data": "held_out", "eval_every": 7, "training": training}
    if trainer == "grpo":
        options |= {"trainer": trainer}
        del training["num_sample_generations"]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    run_before_ppo(write(whole, options))
    shutil.copytree(whole, parts)
    for folder in (whole, parts):
        path = write(folder, options)
        command = ["run", str(path), "--accelerate-config", str(TWO_PROCESSES)]
        if folder == parts:
            kill_after(command, folder / "run" / "ppo" / "checkpoints" / "checkpoint-10" / checkpoints.MARKER)
        done = warm.rlhf(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        record = manifest.read(folder / "run").stages["ppo"]
        assert record.world_size == 2 and record.metrics["updates"] == 20
        assert (record.resumed_from_step in (10, 15)) == (folder == parts)
    assert log_of(parts) == log_of(whole)
    assert bytes_of(parts) == bytes_of(whole)


def kill_after(command: list[str], file: Path) -> None:
    """Start `rlhf` with these words, and kill it with all its processes once there is a file."""
    process = warm.Started(*command)
    while not file.exists():
        assert process.is_alive(), "it ended before it could be killed"
        time.sleep(0.01)
    process.kill_all()
