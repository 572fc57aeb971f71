"""The message of a gate that stops a run names a command that evaluates what is finished; that command works."""

import shlex

import pytest
import tiny

from pipeline import stage
from pipeline.chain import gate
from pipeline.config.load import load
from pipeline.launch import process
from pipeline.records import manifest
from pipeline.system.errors import StageFailed, UserError

STOPPED = "stage 'ppo' stopped: ppo does not start, the gate failed:"
SHORT = {"max_steps": 1, "max_length": 64}
STAGES = {
    "sft": tiny.SFT | {"training": {"max_steps": 1}},
    "reward": {"data": "comparisons", "training": SHORT},
    "ppo": tiny.PPO | {"data": "comparisons"},
    "dpo": {"data": "comparisons", "training": SHORT},
    "evaluate": {"data": "comparisons", "num_prompts": 2, "max_new_tokens": 4},
}
LIMITS = {"accuracy": None, "first_token": None, "within_sd": 1000}  # which no scores reach


def in_this_process(config, name, overrides, *_):
    """Run a stage here: it would import for ten seconds in a process of its own."""
    try:
        stage.run(load(config.source, overrides), name)
    except UserError as error:
        raise StageFailed(f"stage {name!r} stopped: {error}", 2) from None


def command_of(message):
    lines = message.splitlines()
    (number,) = [number for number, line in enumerate(lines) if line.endswith(" comes from:")]
    return lines[number].strip().removesuffix(" comes from:"), shlex.split(lines[number + 1])


def test_the_command_gives_the_table_of_what_is_finished(tmp_path, cli, monkeypatch):
    """DPO comes after the stage that is stopped, and runs too."""
    monkeypatch.setattr(process, "run_stage", in_this_process)
    path = tiny.make_run(tmp_path, STAGES, gate="stop", gate_limits=LIMITS)
    tiny.edit(
        path, {"data": {name: {"path": f"{name}.jsonl", "heldout": 0.3} for name in ("comparisons", "demonstrations")}}
    )
    code, _, err = cli("run", path, "seed=3")
    assert code == 2 and "ppo does not start, the gate failed:" in err
    what, command = command_of(err)
    assert what == "The table of evaluate without ppo (base, sft, dpo)"
    assert command == ["rlhf", "run", str(path), "seed=3", "stages.evaluate.policies=[dpo]", "--until", "evaluate"]
    code, out, err = cli(*command[1:])
    assert code == 0, err
    assert "win rate" in out
    assert list(manifest.read(tmp_path / "run").stages) == ["sft", "reward", "reward-shift", "dpo", "evaluate"]


@pytest.mark.parametrize(("stopped", "policies"), [("ppo", "[dpo]"), ("dpo", "[ppo]"), ("rloo", None)])
def test_what_builds_on_the_stopped_stage_is_left_out(tmp_path, stopped, policies):
    evaluations = {"evaluate": STAGES["evaluate"] | {"policies": ["ppo", "dpo"]}}
    evaluations["second"] = STAGES["evaluate"] | {"type": "evaluate", "policies": [], "baseline": "ppo"}
    config = load(tiny.make_run(tmp_path, STAGES | evaluations, gate="stop"))
    message = STOPPED.replace("ppo", stopped)
    command = ["rlhf", "run", "tiny.yaml", "stages.evaluate.policies=[ppo]"]
    if policies is None:
        stopped, message = "ppo", "stage 'ppo' ended with exit code 1"
    with pytest.raises(StageFailed) as raised, gate.explained(config, stopped, command):
        raise StageFailed(message, 2)
    if policies is None:
        assert str(raised.value) == message
        return
    lines = [line.strip() for line in str(raised.value).splitlines() if line.strip().startswith("rlhf ")]
    assert lines[0] == f"rlhf run tiny.yaml 'stages.evaluate.policies={policies}' --until evaluate"
    assert len(lines) == (1 if stopped == "ppo" else 2)  # the second one has PPO as its baseline


def test_what_the_same_gate_stops_is_left_out_too(tmp_path, cli, monkeypatch):
    """The fault is SFT's, from which DPO starts as well."""
    monkeypatch.setattr(process, "run_stage", in_this_process)
    sft = tiny.SFT | {"eval_data": "demonstrations", "training": {"max_steps": 1, "learning_rate": 10.0}}
    path = tiny.make_run(tmp_path, STAGES | {"sft": sft}, gate="stop", gate_limits=LIMITS | {"within_sd": None})
    tiny.edit(
        path, {"data": {name: {"path": f"{name}.jsonl", "heldout": 0.3} for name in ("comparisons", "demonstrations")}}
    )
    code, _, err = cli("run", path)
    assert code == 2 and "sft: held-out loss: FAILED" in err
    what, command = command_of(err)
    assert what.endswith("(base, sft)") and "stages.evaluate.policies=[]" in command
    code, out, err = cli(*command[1:])
    assert code == 0, err
    assert "win rate" in out
