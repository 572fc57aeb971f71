"""A version of TRL later than 1.12 in the place of the pinned one: what it lacks is said, and the rest works.

`tests/benchmarks/trl_versions.py` runs the chain under the versions themselves. Here a module that they lack is hidden.
"""

import importlib.metadata
import sys
from dataclasses import dataclass

import pytest
import tiny
import torch
from ruamel.yaml import YAML
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import ModelOutput

from pipeline.config.load import load
from pipeline.models.loading import float32_logits

STAGES = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO, "dpo": tiny.DPO}
FAULT = (
    f"stages.ppo: needs PPOTrainer, which TRL {importlib.metadata.version('trl')} does not have; 1.12 was the last. "
    "Install that one (`pip install 'trl==1.12.*'`), or say `trainer: grpo` in this stage"
)


@pytest.fixture
def path(tmp_path, monkeypatch):
    """A config with a ppo stage, where PPOTrainer is not."""
    path = tiny.make_run(tmp_path, STAGES)
    monkeypatch.setitem(sys.modules, "trl.experimental.ppo", None)  # as if there were no such module
    return path


@pytest.mark.parametrize("command", ["plan", "check-data", "run"])
def test_every_command_says_what_is_missing(path, cli, command):
    exit_code, _, err = cli(command, "tiny.yaml")
    assert exit_code == 2
    assert err.splitlines()[0] == "error: tiny.yaml: 1 problem in the config"
    assert FAULT in err and "Traceback" not in err
    assert not (path.parent / "run").exists()


def test_beside_the_other_problems_of_the_file(path, cli):
    """Also of the stage itself, but for its options of TRL, which nothing knows."""
    changes = ("stages.sft.training.learning_rat=1", "stages.ppo.kl=1", "stages.ppo.training.kl_coeff=1")
    exit_code, _, err = cli("plan", "tiny.yaml", *changes)
    assert exit_code == 2
    assert "3 problems" in err and FAULT in err
    assert "stages.sft.training.learning_rat: unknown option" in err and "stages.ppo.kl: unknown key" in err


def test_a_stage_without_options(path, cli):
    tiny.edit(path, {"stages": STAGES | {"ppo": {"data": "demonstrations"}}})
    assert FAULT in cli("plan", "tiny.yaml")[2]


def test_a_stage_of_another_name(path, cli):
    tiny.edit(path, {"stages": STAGES | {"ppo": tiny.DPO | {"type": "dpo"}, "align": tiny.PPO | {"type": "ppo"}}})
    err = cli("plan", "tiny.yaml")[2]
    assert FAULT.replace("stages.ppo", "stages.align") in err and "stages.ppo:" not in err


def test_a_stage_that_names_its_trainer(path, cli):
    assert FAULT in cli("plan", "tiny.yaml", "stages.ppo.trainer=ppo")[2]
    exit_code, _, err = cli("plan", "tiny.yaml", "stages.ppo.trainer=grpo")
    assert exit_code == 0, err


def test_a_config_without_ppo(path, cli):
    config = YAML().load(path)
    del config["stages"]["ppo"]
    YAML().dump(config, path)
    exit_code, _, err = cli("plan", "tiny.yaml")
    assert exit_code == 0, err


def test_nothing_is_missing_here(tmp_path):
    assert "ppo" in load(tiny.make_run(tmp_path, STAGES)).stages


@dataclass
class LogProbs(ModelOutput):
    """What the trainers of TRL 1.16 ask a policy for."""

    log_probs: torch.Tensor | None = None


def test_outputs_without_logits_stay_as_they_are():
    class Policy(torch.nn.Module):
        def forward(self, fused):
            values = torch.ones(1, dtype=torch.bfloat16)
            return LogProbs(log_probs=values) if fused else CausalLMOutput(logits=values)

        def get_output_embeddings(self):
            return None

    policy = Policy()
    float32_logits(policy)  # type: ignore[arg-type]  # any module has the hook
    assert policy(fused=True).log_probs.dtype == torch.bfloat16
    assert policy(fused=False).logits.dtype == torch.float32
