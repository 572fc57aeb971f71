"""The real chain through the real command: what runs again and why, after `kill -9`, and under two processes."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import warm
from test_equalities import run

from pipeline.chain import staleness
from pipeline.config.load import load
from pipeline.records import manifest
from pipeline.show import results
from pipeline.system import digests
from pipeline.training import checkpoints

ROOT = Path(__file__).parents[1]
CHAIN = ["sft", "reward", "ppo", "dpo", "evaluate"]
EVALUATE = {"data": "heldout", "max_new_tokens": 8, "judge": "judge:score"}


def make_chain(folder: Path, **stages) -> Path:
    (folder / "judge.py").write_text("def score(prompt, completion):\n    return -len(completion)\n")
    own = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO, "dpo": tiny.DPO, "evaluate": EVALUATE}
    path = tiny.make_run(folder, own | stages)
    tiny.write_rows(folder / "heldout.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    names = ("comparisons", "demonstrations", "heldout")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    return path


def command(*args: str | Path) -> list[str]:
    return [sys.executable, "-m", "pipeline", *map(str, args)]


def rlhf(*args: str | Path) -> str:
    result = warm.rlhf(*args)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    return result.stdout + result.stderr


def records(config: Path) -> dict[str, manifest.Record]:
    return manifest.read(config.parent / "run").stages


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    config = make_chain(tmp_path_factory.mktemp("chain"))
    result = subprocess.run(command("run", config), capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert result.returncode == 0 and "win rates against sft" in result.stdout, result.stdout[-3000:] + result.stderr
    return config


def test_every_stage_leaves_a_verifiable_record(finished):
    assert list(records(finished)) == CHAIN
    for name, record in records(finished).items():
        manifest.verify(finished.parent / "run", name, record)
        assert record.duration > 0 and record.world_size == 1 and record.versions["trl"].startswith("1.12")
    samples = (finished.parent / "run" / "evaluate" / "output" / "samples.jsonl").read_text().splitlines()
    assert len(samples) == len(tiny.TOPICS)
    assert set(json.loads(samples[0])) == {"prompt", "base", "sft", "ppo", "dpo"}


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "dpo"])
def test_the_shown_snippet_loads_the_output(finished, name):
    run = finished.parent / "run"
    recorded = manifest.read(run)
    loaded: dict = {}
    exec(results.snippet(run, recorded, recorded.stages[name]), loaded)
    prompt = loaded["tokenizer"]("Tell me about tea.", return_tensors="pt")
    logits = loaded["model"](**prompt).logits
    assert logits.shape[-1] == (1 if name == "reward" else len(loaded["tokenizer"]))


def test_a_finished_run_is_skipped_and_one_key_reruns_its_dependents(finished):
    before = records(finished)
    output = rlhf("run", finished)
    assert output.count("skip: finished, nothing changed") == len(CHAIN)
    assert records(finished) == before

    output = rlhf("run", finished, "stages.ppo.training.kl_coef=0.2")
    assert "training.kl_coef" in output
    after = records(finished)
    assert {name for name in CHAIN if after[name].started != before[name].started} == {"ppo", "evaluate"}
    assert before["ppo"].reason == "not finished yet"
    assert after["ppo"].reason == "config changed: training.kl_coef ('unset' -> 0.2)"
    assert after["evaluate"].reason == "ppo runs again"  # its record was gone when its process began
    assert "why it ran: config changed: training.kl_coef ('unset' -> 0.2)" in rlhf("status", finished.parent / "run")


def test_changed_data_reruns_all_that_depends_on_it(finished, tmp_path):
    config = load(finished, ("stages.ppo.training.kl_coef=0.2",))
    recorded = manifest.read(config.run_path)
    assert not any(decision.run for decision in staleness.decide(config, recorded))
    other = tmp_path / "demonstrations.jsonl"
    tiny.write_rows(other, tiny.demonstrations()[1:])
    overrides = ("stages.ppo.training.kl_coef=0.2", f"data.demonstrations.path={other}")
    decisions = staleness.decide(load(finished, overrides), recorded)
    assert [decision.stage for decision in decisions if decision.run] == CHAIN
    assert decisions[0].reason == "input changed: data"
    assert decisions[1].reason == "sft runs again"


def test_by_hand_a_stage_says_that_it_is_finished_or_what_it_needs(finished, tmp_path):
    done = warm.rlhf(finished, "sft", "stages.ppo.training.kl_coef=0.2", module="stage")
    assert done.returncode == 0 and "finished already" in done.stdout
    needs = warm.rlhf(make_chain(tmp_path), "dpo", module="stage")
    assert needs.returncode == 2 and "needs 'sft'" in needs.stderr and "Traceback" not in needs.stderr


def kill_when(config: Path, ready) -> None:
    """Start `rlhf run`, and kill it with -9 as soon as `ready()` holds; its stage must end with it."""
    process = warm.Started("run", config)
    deadline = time.time() + 240
    while not ready():
        assert process.is_alive(), "the run ended before it could be killed"
        assert time.time() < deadline, "nothing to kill appeared"
        time.sleep(0.01)
    process.kill()


def test_killed_in_stages_of_every_kind_it_finishes_with_the_same_records(tmp_path):
    """One that trains on rows, with a checkpoint that is damaged; one that samples; one after it; and a report."""
    many = {"max_steps": 300, "save_steps": 50, "save_strategy": "steps", "logging_steps": 50}
    long = {name: spec | {"training": spec.get("training", {}) | many}
            for name, spec in {"sft": tiny.SFT, "dpo": tiny.DPO}.items()}  # fmt: skip
    slow_ppo = tiny.PPO | {"training": tiny.PPO["training"] | {"total_episodes": 160}}
    config = make_chain(tmp_path, **long, ppo=slow_ppo)
    run = tmp_path / "run"

    def two_checkpoints(name):
        return lambda: len(list((run / name / "checkpoints").glob("checkpoint-*/complete.json"))) >= 2

    def logged(name, text):
        log = run / name / "log.txt"
        return lambda: log.exists() and text in log.read_text()

    kill_when(config, two_checkpoints("sft"))
    newest = max((run / "sft" / "checkpoints").glob("checkpoint-*/complete.json"), key=os.path.getmtime).parent
    weights = newest / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    kill_when(config, logged("ppo", "===training policy==="))
    kill_when(config, two_checkpoints("dpo"))
    kill_when(config, logged("evaluate", "sampling"))
    rlhf("run", config)

    found = records(config)
    assert list(found) == CHAIN
    assert (
        f"{newest.name} is damaged (adapter_model.safetensors): falling back" in (run / "sft" / "log.txt").read_text()
    )
    for name in long:
        assert found[name].resumed_from_step in range(50, 300, 50)
        assert f"resuming at step {found[name].resumed_from_step}" in (run / name / "log.txt").read_text()
        assert found[name].metrics["steps"] == 300
    for name in CHAIN:
        manifest.verify(run, name, found[name])


def test_a_stage_goes_on_with_the_number_of_processes_it_had(tmp_path, monkeypatch):
    steps = {"training": {"max_steps": 4, "save_steps": 2, "save_strategy": "steps"}}
    config = make_chain(tmp_path, sft=tiny.SFT | steps)
    mark = checkpoints.MarkComplete.on_save

    def mark_and_stop(*args, **kwargs):
        mark(*args, **kwargs)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.MarkComplete, "on_save", mark_and_stop)
        with pytest.raises(KeyboardInterrupt):
            run(config, "sft")
    left = digests.checksums(tmp_path, [tmp_path / "run" / "sft" / "checkpoints"])
    two = ["--accelerate-config", ROOT / "accelerate_configs" / "cpu_2_processes.yaml"]
    refused = warm.rlhf("run", config, "--only", "sft", *two)
    assert refused.returncode == 2, refused.stdout[-3000:]
    for words in ("with 1 process(es), and now there are 2", "--redo sft", str(tmp_path / "run/sft/checkpoints")):
        assert words in refused.stderr
    assert digests.checksums(tmp_path, [tmp_path / "run" / "sft" / "checkpoints"]) == left
    shutil.copytree(tmp_path / "run", tmp_path / "left")
    by_hand = run(config, "sft").stages["sft"]
    assert by_hand.resumed_from_step == 2 and by_hand.reason == "not finished yet"
    expected = (tmp_path / "run" / "sft" / "output" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "left").rename(tmp_path / "run")
    output = rlhf("run", config, "--only", "sft", "--redo", "sft")
    assert "resuming" not in output
    record = records(config)["sft"]
    assert record.resumed_from_step is None and record.config["training.max_steps"] == 4
    assert record.reason == "asked for with --redo"
    assert (tmp_path / "run" / "sft" / "output" / "adapter_model.safetensors").read_bytes() == expected


def test_two_processes(tmp_path):
    """With TRL's defaults, as users run it: bf16 autocast and gradient checkpointing; every process is a new one.

    Reward model, PPO and DPO run under two processes in test_shipped.py.
    """
    config = make_chain(tmp_path)
    tiny.edit(config, {"stages": {"sft": tiny.SFT, "evaluate": EVALUATE}})
    defaults = {key: tiny.TRAINING[key] for key in tiny.TRAINING.keys() - {"bf16", "gradient_checkpointing"}}
    tiny.edit(config, {"training": defaults})
    two = ["--accelerate-config", ROOT / "accelerate_configs" / "cpu_2_processes.yaml"]
    done = subprocess.run(command("run", config, *two), capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    found = records(config)
    assert list(found) == ["sft", "evaluate"]
    for name, record in found.items():
        assert record.world_size == 2, name
        manifest.verify(tmp_path / "run", name, record)
        # Written once, by one process: one line says so.
        assert (tmp_path / "run" / name / "log.txt").read_text().count(f"{name}: finished in") == 1
    assert not list((tmp_path / "run").rglob("*.tmp"))
