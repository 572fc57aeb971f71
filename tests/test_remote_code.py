"""A base model with code of its own: it runs through a chain of full weights, and only with `trust_remote_code`."""

import json

import pytest
import tiny
import warm

from pipeline.records import manifest

STEPS = {"max_steps": 2}
STAGES = {
    "sft": tiny.SFT | {"training": STEPS},
    "more": {"type": "sft", "data": "demonstrations", "init": "sft", "training": STEPS},
    "reward": {"data": "comparisons", "init": "more", "training": STEPS | {"max_length": 64}},
    "rloo": {
        "data": "demonstrations",
        "init": "more",
        "training": {"max_completion_length": 8, "num_generations": 4, "max_steps": 1},
    },
}
CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast


class OwnConfig(LlamaConfig):
    model_type = "own-llama"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig


class OwnForSequenceClassification(LlamaPreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = LlamaModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(self, input_ids=None, attention_mask=None, **options):
        options = {key: value for key, value in options.items() if key in ("position_ids", "use_cache")}
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)[0]
        last = (input_ids != self.config.pad_token_id).int().sum(-1) - 1
        logits = self.score(hidden)[range(len(last)), last]
        return SequenceClassifierOutputWithPast(logits=logits)
"""
AUTO_MAP = {
    "AutoConfig": "own.OwnConfig",
    "AutoModelForCausalLM": "own.OwnForCausalLM",
    "AutoModelForSequenceClassification": "own.OwnForSequenceClassification",
}


def rlhf(*args):
    """The command as a job runs it: nobody is there to answer a question."""
    done = warm.rlhf(*args)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def path(tmp_path):
    found = tiny.make_run(tmp_path, STAGES, lora=None, model={"path": "model", "trust_remote_code": True})
    model = tmp_path / "model"
    (model / "own.py").write_text(CODE)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "own-llama", "architectures": ["OwnForCausalLM"], "auto_map": AUTO_MAP}
    (model / "config.json").write_text(json.dumps(config))
    return found


def test_a_chain_of_full_weights_with_code_of_its_own(path):
    exit_code, shown, message = rlhf("plan", path)
    assert exit_code == 0, shown + message
    exit_code, shown, message = rlhf("run", path)
    assert exit_code == 0, shown + message
    assert "Do you wish to run the custom code" not in shown + message
    found = manifest.read(path.parent / "run")
    assert list(found.stages) == list(STAGES)
    assert found.stages["rloo"].metrics["initial_kl"] == pytest.approx(0, abs=1e-6)
    for name in STAGES:
        config = json.loads((path.parent / "run" / name / "output" / "config.json").read_text())
        assert config["model_type"] == "own-llama"
    _, shown, _ = rlhf("status", path.parent / "run")
    assert shown.count("trust_remote_code=True") == len(STAGES)


@pytest.mark.parametrize("command", ["plan", "run"])
def test_without_trust_it_is_one_message(path, command):
    tiny.edit(path, {"model": {"path": "model"}})
    exit_code, shown, message = rlhf(command, path)
    assert exit_code == 2
    assert "Do you wish" not in shown + message and "Traceback" not in message
    assert message.count("set model.trust_remote_code to true") == 1
    assert not (path.parent / "run").exists()


def test_a_model_without_a_score_head(path):
    config = json.loads((path.parent / "model" / "config.json").read_text())
    del config["auto_map"]["AutoModelForSequenceClassification"]
    (path.parent / "model" / "config.json").write_text(json.dumps(config))
    exit_code, _, message = rlhf("plan", path)
    assert exit_code == 2
    assert "stages.reward: model: this model has no class for sequences with a score" in message
    assert message.count("stages.") == 1
