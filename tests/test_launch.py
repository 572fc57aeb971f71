"""What a stage finds of devices and of other processes: nothing that reading the config has decided, or refused."""

import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from accelerate.state import AcceleratorState, PartialState
from test_equalities import run

from pipeline import manifest
from pipeline.config import load
from pipeline.errors import UserError
from pipeline.stages import ppo
from pipeline.watch import Watch, finite

ROOT = Path(__file__).parents[1]
STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO}

# Reading a config builds TRL's config classes, which look for a device and join the other processes. "meta" stands for
# a GPU; waiting for a second process that never comes would not end.
LOOK = """
import os, sys, torch
from pipeline.config import load
before = dict(os.environ)
load(sys.argv[1])
assert dict(os.environ) == before
assert not torch.distributed.is_initialized()
for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
    os.environ.pop(name, None)
os.environ["ACCELERATE_TORCH_DEVICE"] = "meta"
from accelerate import PartialState
print(PartialState().device)
"""


@pytest.mark.parametrize("world_size", [None, 2])
def test_reading_a_config_joins_no_process_and_chooses_no_device(tmp_path, world_size):
    path = tiny.make_run(tmp_path, STAGES)
    own = {}
    if world_size:
        own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        own |= {"ACCELERATE_USE_FSDP": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    command = [sys.executable, "-c", LOOK, str(path)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "meta"


def test_reading_a_config_leaves_a_state_that_is_there(tmp_path, monkeypatch):
    path = tiny.make_run(tmp_path, STAGES)
    PartialState(cpu=True)
    monkeypatch.setitem(PartialState._shared_state, "device", "a GPU")
    states = [dict(state._shared_state) for state in (PartialState, AcceleratorState)]
    assert load(path).stages
    assert [dict(state._shared_state) for state in (PartialState, AcceleratorState)] == states


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    run(tiny.make_run(folder, STAGES), "sft", "reward")
    return folder


def test_a_launchers_options_do_not_reach_a_stage(parents, tmp_path, monkeypatch, capsys):
    """accelerate would take them where the stage says no precision: then PPO's first ratio would not be 1."""
    launchers = {"plain": {}, "launched": {"MIXED_PRECISION": "bf16", "GRADIENT_ACCUMULATION_STEPS": "1"}}
    for where, options in launchers.items():
        path = shutil.copytree(parents, tmp_path / where) / "tiny.yaml"
        tiny.edit(path, {"run_dir": str(tmp_path / where / "run")})
        manifest.drop(tmp_path / where / "run", ["reward"])
        for name in ("reward", "ppo"):
            for option, value in options.items():
                monkeypatch.setenv(f"ACCELERATE_{option}", value)
            run(path, name)
    for name in ("reward", "ppo"):
        plain, launched = (tmp_path / where / "run" for where in launchers)
        assert manifest.read(plain).stages[name].metrics == manifest.read(launched).stages[name].metrics
        weights = f"{name}/output/adapter_model.safetensors"
        assert (plain / weights).read_bytes() == (launched / weights).read_bytes()
    said = capsys.readouterr().out
    assert "reward: mixed_precision bf16 of the launcher is ignored: precision comes from model.dtype and bf16" in said
    assert "ppo: gradient_accumulation_steps 1 of the launcher is ignored: the stage's own is 2" in said


def test_ppo_refuses_fsdp(parents, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="PPO does not run under FSDP; use accelerate_configs"):
        run(parents / "tiny.yaml", "ppo")


def test_under_deepspeed_ppo_has_four_models(parents, monkeypatch, capsys):
    """DeepSpeed itself is not there; the models are those it would be given, and its first question is their size."""
    made = {}
    separate = ppo.separate_models

    def keep(*args):
        made["models"] = separate(*args)
        return made["models"]

    monkeypatch.setattr(ppo, "separate_models", keep)
    monkeypatch.setattr(ppo, "_launched_with", lambda what: what == "DEEPSPEED")
    centred = []
    init = ppo.CentredReward.__init__
    monkeypatch.setattr(ppo.CentredReward, "__init__", lambda self, *a: (init(self, *a), centred.append(self))[0])
    record = run(parents / "tiny.yaml", "ppo").stages["ppo"]
    assert "ppo: four separate models" in capsys.readouterr().out
    assert record.metrics["initial_kl"] == pytest.approx(0, abs=1e-6)
    models = [made["models"].policy, made["models"].reference, made["models"].value, centred[0]]
    assert [model.config.hidden_size for model in models] == [64] * 4
    assert len({id(p) for model in models for p in model.parameters()}) == sum(
        len(list(model.parameters())) for model in models
    )


@pytest.mark.parametrize(
    ("plugins", "refused"),
    [
        ({"fsdp_plugin": object()}, True),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, True),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2), "fsdp_plugin": None}, False),
        ({}, False),
    ],
)
def test_held_out_prompts_need_whole_weights(plugins, refused):
    """A process that holds a part can neither sample by itself nor keep a copy of the best policy."""
    stage = SimpleNamespace(type="grpo", on_alarm="warn", num_eval_prompts=1, eval_every=1)
    ctx = SimpleNamespace(name="grpo", stage=stage, say=print, tokenizer=None)
    callbacks = []
    accelerator = SimpleNamespace(state=SimpleNamespace(**plugins))
    watch = Watch(ctx, SimpleNamespace(accelerator=accelerator, add_callback=callbacks.append), {})
    if refused:
        with pytest.raises(UserError, match=r"stages.grpo.eval_data: the weights are split over the processes; leave"):
            watch.hold_out([[1]], SimpleNamespace(batch_size=1), None, None)
    else:
        watch.hold_out([[1]], SimpleNamespace(batch_size=1), None, None)
        assert len(callbacks) == 2


def test_finite_weights():
    good = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    split_away = torch.nn.Parameter(torch.empty(0))
    replaced = torch.nn.Parameter(torch.empty(2, device="meta"))
    assert finite([good, split_away, replaced]) and finite([split_away])
    for bad in (math.nan, math.inf, -math.inf):
        assert not finite([good, torch.nn.Parameter(torch.tensor([0.0, bad]))])
