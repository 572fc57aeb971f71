"""PPO on GRPOTrainer as users run it: resumed, in bf16, with baselines, in two processes, and what it refuses."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from pipeline import stage
from pipeline.config import options
from pipeline.config.load import load
from pipeline.config.schema import variant_of
from pipeline.config.stage_types import STAGE_TYPES, VARIANTS
from pipeline.launch import sharding
from pipeline.records import manifest
from pipeline.rl import watchdog
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
DEFAULTS = {"bf16": True, "gradient_checkpointing": True}
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
        with pytest.raises(tiny.Killed):
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
    with pytest.raises(tiny.Killed):
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
    with pytest.raises(tiny.Killed):
        train(path)
    folder = path.parent / "run" / "ppo" / "checkpoints"
    assert sorted(file.name for file in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    files = {file.name for file in (folder / "checkpoint-4").iterdir()}
    expected = {TRAINED, "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"}
    assert files == expected | {checkpoints.MARKER}
    names = load_file(folder / "checkpoint-4" / TRAINED).keys()
    kinds = {kind: {name for name in names if kind in name} for kind in (".default.", ".value.", "value.score")}
    assert all(kinds.values()) and set.union(*kinds.values()) == names


def watched_autocast(monkeypatch) -> dict[str, list]:
    """The types of what the policy's adapters compute in rollouts and in training, and the ratios of micro-batches."""
    seen: dict[str, list] = {"rollout": [], "training": [], "ratios": []}
    train, close = CriticTrainer.train, CriticTrainer._close

    def watched(self, *args, **kwargs):
        def look(module, inputs, output):
            seen["training" if torch.is_grad_enabled() else "rollout"].append(output.dtype)

        for name, module in self.model.named_modules():
            if name.endswith("q_proj.lora_A.default"):
                module.register_forward_hook(look)
        return train(self, *args, **kwargs)

    def closed(self, stats):
        seen["ratios"] += torch.cat(self._of_groups["val/ratio"]).tolist()
        close(self, stats)

    monkeypatch.setattr(CriticTrainer, "train", watched)
    monkeypatch.setattr(CriticTrainer, "_close", closed)
    return seen


@pytest.mark.parametrize("bf16", [True, False])
def test_it_computes_in_one_precision(parents, tmp_path, monkeypatch, bf16):
    """By default in bf16: what is sampled and what is trained. So the first update begins with a ratio of 1."""
    seen = watched_autocast(monkeypatch)
    own = DEFAULTS if bf16 else {}
    metrics = train(copied(parents, tmp_path / "run", {"training": TRAINING | own})).metrics
    dtype = torch.bfloat16 if bf16 else torch.float32
    assert set(seen["rollout"]) == set(seen["training"]) == {dtype}
    assert seen["ratios"][:2] == pytest.approx([1, 1], abs=1e-4)  # the micro-batches of the first step
    assert len({round(ratio, 6) for ratio in seen["ratios"]}) > 2
    assert metrics["initial_kl"] == metrics["first_kl"] == pytest.approx(0, abs=1e-6)


def test_gradient_checkpointing_changes_nothing(parents, tmp_path):
    """Layers are computed again in the adapter of policy or value model that they were computed in."""
    outputs = []
    for checkpointing in (False, True):
        folder = tmp_path / str(checkpointing)
        options = {"training": TRAINING | {"gradient_checkpointing": checkpointing}}
        outputs.append((train(copied(parents, folder, options)).metrics, output_of(folder)))
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("method", ["sft_mean", "greedy", "reference", "leave_one_out"])
def test_with_a_baseline_a_shift_of_each_prompt_changes_nothing(parents, tmp_path, method):
    """The scores differ, and what is learned does not; without a baseline it does."""
    adapters = []
    scores = []
    for shift in (0.0, 10.0):
        folder = tmp_path / str(shift)
        options = {"prompt_baseline": method, "added_shift": shift, "training": TRAINING | {"total_episodes": 16}}
        record = train(copied(parents, folder, options))
        scores.append(record.metrics["first_score"])
        adapters.append(load_file(folder / "run" / "ppo" / "output" / "adapter_model.safetensors"))
    assert abs(scores[0] - scores[1]) > 0.5
    for name, expected in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], expected, rtol=0, atol=2e-3)


def test_without_a_baseline_a_shift_changes_what_is_learned(parents, tmp_path):
    adapters = []
    for shift in (0.0, 10.0):
        folder = tmp_path / str(shift)
        train(copied(parents, folder, {"added_shift": shift, "training": TRAINING | {"total_episodes": 16}}))
        adapters.append(load_file(folder / "run" / "ppo" / "output" / "adapter_model.safetensors"))
    assert max((adapters[1][name] - expected).abs().max() for name, expected in adapters[0].items()) > 1e-2


STOP = {"eval_data": "held_out", "eval_every": 1, "on_alarm": "stop", "num_eval_prompts": 8}


@pytest.mark.parametrize("measure", ["kl", "entropy", "clip_fraction", "explained_variance", "length"])
def test_an_alarm_keeps_the_best_policy(parents, tmp_path, monkeypatch, measure):
    """The watchdog reads the same names, and counts updates: here each value is called too high."""
    ranges = {one.measure: one for one in watchdog.HEALTHY}
    wrong = dataclasses.replace(ranges[measure], high=-math.inf, of_first=False, patience=4, warm_up=0)
    monkeypatch.setattr(watchdog, "HEALTHY", (wrong,))
    metrics = train(copied(parents, tmp_path / "run", STOP)).metrics
    assert [(alarm["measure"], alarm["update"]) for alarm in metrics["alarms"]] == [(measure, 4)]
    assert metrics["updates"] == 4
    assert [entry["update"] for entry in metrics["held_out_scores"]] == list(range(metrics["updates"] + 1))
    scores = {entry["update"]: entry["score"] for entry in metrics["held_out_scores"]}
    assert scores[metrics["kept_update"]] == max(scores.values()) > min(scores.values())


def test_weights_that_are_no_numbers_end_it(parents, tmp_path):
    metrics = train(copied(parents, tmp_path / "run", STOP | {"training": TRAINING | {"learning_rate": 1e38}})).metrics
    assert [(alarm["measure"], alarm["update"]) for alarm in metrics["alarms"]] == [("weights", 1)]
    assert metrics["kept_update"] == 0


# What each of two processes ends with.
PROGRAM = """
import sys
import torch
from accelerate import PartialState
from pipeline import stage
from pipeline.config.load import load
from pipeline.rl import watchdog
from pipeline.rl.critic_trainer import CriticTrainer

train = CriticTrainer.train
make_step = CriticTrainer.training_step
prompts = []

def step(self, model, inputs, *args):
    prompts.append([row["input_ids"] for row in inputs])
    return make_step(self, model, inputs, *args)

def kept(self, *args, **options):
    before = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
    train(self, *args, **options)
    after = {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}
    torch.save((before, after, prompts), f"{sys.argv[2]}/process-{PartialState().process_index}.pt")

CriticTrainer.train = kept
CriticTrainer.training_step = step
stage.run(load(sys.argv[1]), "ppo")
"""


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_processes_train_one_policy_and_one_value_model(parents, tmp_path, accumulation):
    """They work on other prompts, and after every step have the same weights: of the adapters and of the value head."""
    sizes = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    path = copied(parents, tmp_path / "run", {"training": SMALL | sizes | {"total_episodes": 24} | DEFAULTS})
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    environment = {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(stage.__file__).parents[1])}
    done = subprocess.run(
        [*command, tmp_path / "program.py", path, tmp_path],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (before, first, prompts), (_, second, others) = (
        torch.load(tmp_path / f"process-{rank}.pt", weights_only=True) for rank in (0, 1)
    )
    assert len(prompts) == 3 and all(
        not {*map(tuple, a)} & {*map(tuple, b)} for a, b in zip(prompts, others, strict=True)
    )
    assert first.keys() == second.keys()
    for name, weights in first.items():
        assert torch.equal(weights, second[name]), name
    moved = {kind: [n for n in first if kind in n and not torch.equal(first[n], before[n])] for kind in PARTS}
    assert all(moved.values()), moved
    record = manifest.read(path.parent / "run").stages["ppo"]
    assert (record.world_size, record.metrics["updates"], record.metrics["episodes"]) == (2, 3, 24)
    assert record.metrics["first_kl"] == pytest.approx(0, abs=1e-6)


PARTS = (".default.", ".value.", "value.score")


def test_options_are_those_of_ppotrainer():
    """All that a user may give to PPOTrainer, with its defaults; and of GRPOTrainer's nothing that has no effect."""
    own, others = options._field_types(KIND), options._field_types("ppo")
    unused = {"dataset_num_proc"}  # rows are tokenised
    assert others.keys() - options.owned_by("ppo").keys() - unused <= own.keys()
    for name in others.keys() & own.keys() - options.OWNED.keys() - {"num_sample_generations"}:
        assert options._default_of(KIND, name) == options._default_of("ppo", name) or name == "disable_dropout", name
    left = own.keys() - options._field_types("training").keys() - options.owned_by(KIND).keys()
    assert left <= others.keys()


REFUSED = {
    "stages.ppo.lora": (None, "`trainer: grpo` needs adapters"),
    "stages.reward.lora": (None, "`trainer: grpo` needs adapters"),
    "stages.ppo.training": ({"max_steps": 3}, "PPO's length is `total_episodes`"),
    "stages.ppo.training.num_iterations": (3, "`num_ppo_epochs`"),
    "stages.ppo.training.use_vllm": (True, "transformers samples"),
    "stages.ppo.training.num_mini_batches": (3, "must be a multiple of num_mini_batches"),
    "stages.ppo.training.num_sample_generations": (2, "`trainer: ppo` alone"),
    "stages.ppo.training.neftune_noise_alpha": (5, "would also be in what is sampled"),
    "stages.ppo.training.cliprnge": (0.3, "did you mean"),
    "stages.ppo.trainer": ("trl", "expected 'ppo' or 'grpo'"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_it_cannot_do_is_refused_in_the_plan(parents, tmp_path, key):
    value, message = REFUSED[key]
    path = copied(parents, tmp_path / "run", {})
    with pytest.raises(UserError, match=re.escape(message)):
        load(path, (f"{key}={json.dumps(value)}",))


def test_deepspeed_is_refused(parents, tmp_path):
    config = load(copied(parents, tmp_path / "run", {}))
    message = sharding.refusal(config, "ppo", sharding.ZERO_2)
    assert "ppo on grpo does not run under DeepSpeed ZeRO-2" in message and "`trainer: ppo`" in message
    assert sharding.refusal(config, "ppo", None) is None


NO_PPO_TRAINER = """
import sys
sys.modules["trl.experimental.ppo"] = None
from pipeline import stage
from pipeline.config.load import load
stage.run(load(sys.argv[1]), "ppo")
"""


def test_it_needs_no_ppotrainer(parents, tmp_path):
    """Where TRL has none, configs are checked and stages run."""
    path = copied(parents, tmp_path / "run", {"training": TRAINING | {"total_episodes": 8}})
    environment = {"PYTHONPATH": str(Path(stage.__file__).parents[1])}
    command = [sys.executable, "-c", NO_PPO_TRAINER, path]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert manifest.read(path.parent / "run").stages["ppo"].metrics["updates"] == 1


def test_every_variant_is_of_a_trainer_that_its_type_has():
    expected = set()
    for name, row in STAGE_TYPES.items():
        field = row.section.model_fields.get("trainer")
        trainers = typing.get_args(field.annotation) if field else ()
        expected |= {variant_of(name, trainer) for trainer in trainers} - {name}
    assert VARIANTS.keys() == expected == {KIND}
