"""A run that takes finished stages from another run: what it makes of them, and when it refuses them."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from filelock import FileLock
from safetensors.torch import load_file
from test_equalities import QUANTISED, run
from test_readme import fences
from test_smoke import CPU, in_this_process

from pipeline import planner
from pipeline.chain import cuts, earlier_data, forecast, other_run, run_folder, staleness
from pipeline.config.lineage import shares_backbone
from pipeline.config.load import load, recall
from pipeline.export import ancestors, source
from pipeline.html import reading, tables
from pipeline.launch import process
from pipeline.records import manifest
from pipeline.records.stage_folder import LOCK
from pipeline.show import facts, results, times
from pipeline.system.digests import checksums
from pipeline.system.errors import UserError

ROOT = Path(__file__).parents[1]
WIDE = tiny.LORA | {"r": 8}
DPO = {
    "same": tiny.DPO | {"type": "dpo", "init": "sft"},
    "wide": tiny.DPO | {"type": "dpo", "init": "sft", "lora": WIDE},
    "whole": tiny.DPO | {"type": "dpo", "init": "sft", "lora": None},
}
TAKEN = {"run": "../one/run"}
CURRENT = (False, "finished, nothing changed")


def make(folder: Path, stages: dict[str, Any], **top: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return tiny.make_run(folder, stages, **top)


def other_comparisons(folder: Path) -> None:
    """Give a run comparisons of its own: those of a second round."""
    rows = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in tiny.comparisons()]
    tiny.write_rows(folder / "comparisons.jsonl", rows)


@pytest.fixture
def said(cli):
    """What a command of `rlhf` says, in this process, without its line breaks."""

    def call(*args: str | Path, fails: bool = False) -> str:
        code, out, err = cli(*args)
        assert code == (2 if fails else 0), out[-3000:] + err
        return " ".join((out + err).split())

    return call


def weights_of(folder: Path, stage: str, run_dir: str = "run") -> bytes:
    output = folder / run_dir / stage / "output"
    (file,) = [path for path in output.glob("*.safetensors") if path.stem in ("adapter_model", "model")]
    return file.read_bytes()


def logits(run_dir: Path, stage: str) -> torch.Tensor:
    """What a stage gives for a row, loaded by the code that `rlhf status` shows: logits, or a reward model's score."""
    recorded = manifest.read(run_dir)
    shown: dict[str, Any] = {}
    exec(results.snippet(run_dir, recorded, recorded.stages[stage]), shown)
    with torch.no_grad():
        return shown["model"].eval()(torch.tensor([[2, 40, 50, 60, 3, 77, 1]])).logits


@pytest.fixture(scope="module")
def first(tmp_path_factory) -> Path:
    """A folder with a finished run in `one/run`."""
    folder = tmp_path_factory.mktemp("first")
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "ppo": tiny.PPO, **DPO}
    run(make(folder / "one", stages), *stages)
    return folder


@pytest.fixture
def both(first, tmp_path) -> Path:
    """A copy of the finished run, which a test may change."""
    shutil.copytree(first / "one", tmp_path / "one", symlinks=True)
    return tmp_path


@pytest.mark.parametrize("name", DPO)
def test_dpo_in_a_second_run_is_dpo_in_the_first(first, tmp_path, name):
    """Byte for byte: the adapter trains on, is merged for another shape, or is merged for full weights."""
    taken = {"run": str(first / "one" / "run")}
    model = {"path": str(first / "one" / "model")}  # an adapter's config names it
    found = run(make(tmp_path / "two", {"sft": taken, name: DPO[name]}, model=model), "sft", name)
    before = manifest.read(first / "one" / "run")
    for stage in ("sft", name):
        assert weights_of(tmp_path / "two", stage) == weights_of(first / "one", stage)
        assert found.stages[stage].output == before.stages[stage].output
    assert found.stages[name].inputs == before.stages[name].inputs
    assert found.stages[name].metrics["initial_loss"] == before.stages[name].metrics["initial_loss"]
    assert found.stages["sft"].metrics == before.stages["sft"].metrics


@pytest.mark.parametrize("name", ["wide", "whole"])
def test_full_weights_of_the_other_run_come_with_what_is_taken(first, tmp_path, name):
    """An adapter on merged weights brings these, and a model of full weights is copied as it is."""
    taken = {"run": str(first / "one" / "run"), "stage": name}
    start = tiny.DPO | {"init": "policy", "lora": WIDE}
    found = run(make(tmp_path / "two", {"policy": taken, "dpo": start}), "policy", "dpo")
    merged, output = "policy/merged", "policy/output"
    expected = {"wide": ("adapter", merged, merged), "whole": ("full", None, output)}[name]
    policy = found.stages["policy"].output
    assert (policy.kind, policy.full, found.stages["dpo"].output.full) == expected
    assert found.stages["dpo"].metrics["initial_loss"] == pytest.approx(0.6931472, abs=1e-6)
    shutil.rmtree(tmp_path / "two" / "model")  # nothing but the run folder is needed
    assert torch.equal(logits(tmp_path / "two" / "run", "policy"), logits(first / "one" / "run", name))


def test_a_quantised_base(tmp_path):
    stages = {"sft": tiny.SFT, "dpo": tiny.DPO}
    before = run(make(tmp_path / "one", stages, quantization=QUANTISED), *stages)
    model = {"path": "../one/model"}
    found = run(make(tmp_path / "two", stages | {"sft": TAKEN}, quantization=QUANTISED, model=model), *stages)
    assert weights_of(tmp_path / "two", "dpo") == weights_of(tmp_path / "one", "dpo")
    assert found.stages["dpo"].inputs == before.stages["dpo"].inputs
    with pytest.raises(UserError, match=r"trained on a base with `quantization: {.*}`, this config has null"):
        plan(make(tmp_path / "three", {"sft": TAKEN, "dpo": tiny.DPO}))


def test_a_second_round_by_the_command(both, said, rlhf):
    """Reward model and PPO from the first run's PPO policy, on other comparisons, compared with that policy."""
    policy = TAKEN | {"stage": "ppo"}
    stages = {
        "round1": policy,
        "reward": tiny.REWARD,
        "ppo": tiny.PPO,
        "evaluate": {"data": "heldout", "max_new_tokens": 8},
    }
    config = make(both / "two", stages)
    other_comparisons(both / "two")
    tiny.write_rows(both / "two" / "heldout.jsonl", [{"prompt": f"What of {topic}?"} for topic in tiny.TOPICS])
    names = ("comparisons", "demonstrations", "heldout")
    tiny.edit(config, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    before = checksums(both / "one", [both / "one"])

    planned = said("plan", config)
    assert "ppo of ../one/run, copied" in planned and "adapter of round1, continued" in planned
    assert "frozen copy of round1" in planned
    assert not (both / "two" / "run").exists()
    done = rlhf("run", config)
    assert done.returncode == 0 and "win rates against round1" in done.stdout, done.stdout[-3000:] + done.stderr
    assert checksums(both / "one", [both / "one"]) == before

    run_dir = both / "two" / "run"
    found = manifest.read(run_dir).stages
    assert weights_of(both / "two", "round1") == weights_of(both / "one", "ppo")
    assert weights_of(both / "two", "ppo") != weights_of(both / "one", "ppo")
    assert found["ppo"].metrics["initial_kl"] == 0 and found["ppo"].parents["init"] == "round1"
    assert found["evaluate"].metrics["baseline"] == "round1"
    assert list(found["evaluate"].metrics["policies"]) == ["base", "round1", "ppo"]
    assert found["evaluate"].metrics["policies"]["round1"]["kl"] == 0
    origin = found["round1"].origin
    assert (origin.path, origin.name, origin.stage) == (str((both / "one" / "run").resolve()), "tiny", "ppo")
    assert list(origin.stages) == ["sft", "reward", "ppo"]
    assert origin.stages["ppo"] == manifest.read(both / "one" / "run").stages["ppo"]

    assert torch.equal(
        *(logits(run_dir, name) for run_dir, name in ((both / "one" / "run", "ppo"), (run_dir, "round1")))
    )

    shutil.rmtree(both / "one")  # the second run is whole without the first
    assert "taken from ppo of the run tiny, in" in said("status", run_dir)
    reasons = [(decision.run, decision.reason) for decision in plan(config)]
    assert reasons == [(False, "finished, cannot be compared: there is no run in ../one/run"), *3 * [CURRENT]]
    assert "cannot be compared" in said("run", config) and manifest.read(run_dir).stages == found
    page = reading.read(run_dir)
    assert ["ppo of ../one/run" in row for row in tables.chain(page).rows] == [True, False, False, False]
    assert not torch.equal(logits(run_dir, "ppo"), logits(run_dir, "round1"))
    said("export", run_dir, "ppo", "--to", both / "exported", "--as", "merged")
    text = (both / "exported" / "README.md").read_text()
    assert "taken from tiny/ppo" in text and "| tiny/reward | reward | init tiny/sft |" in text
    assert "stages.round1: there is no run in ../one/run" in said("run", config, "--redo", "round1", fails=True)
    assert manifest.read(run_dir).stages == found


def plan(config: Path) -> list[staleness.Decision]:
    """Decide and check as `rlhf plan` does before it looks at the data."""
    return planner.decide(load(config))[1]


def test_what_another_run_has_trained_on_is_not_evaluated_on_in_silence(both, said):
    """Unless it was held out there, and no more of it is held out here."""

    def warned(**top):
        tiny.edit(config, top)
        return list(earlier_data.warnings(load(config), recorded))

    recorded = manifest.Manifest(name="tiny")
    evaluate = {"data": "comparisons", "max_new_tokens": 8}
    stages = {"policy": TAKEN | {"stage": "ppo"}, "evaluate": evaluate}
    config = make(both / "two", stages)
    one = (both / "one" / "run").resolve()
    words = f"comparisons has prompts that were trained on in another run, by reward of {one}."
    mend = "name a dataset there that no run has trained on"
    (text,) = warned()
    assert text.startswith(f"stages.evaluate.data: {words}") and text.endswith(mend)
    assert f"warning: {text}" in said("plan", config)
    tiny.edit(config, {"stages": {"sft": TAKEN, "evaluate": evaluate}})
    assert warned() == []  # SFT has seen none of them
    # Split here, of a dataset that was not split there.
    split = stages | {"dpo": tiny.DPO | {"init": "policy"}}
    (text,) = warned(stages=split)
    assert text.endswith(mend)
    content = json.loads((one / manifest.FILE).read_text())
    content["stages"]["reward"]["inputs"]["data: held-out share"] = "0.2"
    (one / manifest.FILE).write_text(json.dumps(content))
    data = {"demonstrations": {"path": "demonstrations.jsonl"}, "comparisons": {"path": "comparisons.jsonl"}}
    data["comparisons"]["heldout"] = 0.2
    assert warned(data=data) == []
    data["comparisons"]["heldout"] = 0.3
    (text,) = warned(data=data)
    assert text.endswith("lower `data.comparisons.heldout` to 0.2, the share that was held out there")
    # What was copied knows it without the other run, unless the data are others.
    origin = other_run.origin_of(load(config), "policy", other_run.find(load(config), "policy"))
    recorded = manifest.Manifest(name="tiny", stages={"policy": tiny.make_record(type="ppo", origin=origin)})
    known = load(config)
    shutil.rmtree(one)
    assert list(earlier_data.warnings(known, recorded)) == [text]
    other_comparisons(both / "two")
    assert list(earlier_data.warnings(known, recorded)) == []


def test_a_smoke_run_of_what_is_taken_and_evaluated(both, said, monkeypatch):
    """Nothing trains in it. It cuts what is sampled by the size of the base model."""
    monkeypatch.setattr(process, "run_stage", in_this_process)
    evaluate = {"data": "demonstrations", "max_new_tokens": 24, "batch_size": 8}
    config = make(both / "two", {"policy": TAKEN | {"stage": "ppo"}, "evaluate": evaluate})
    before = checksums(both / "one", [both / "one"])
    text = said("run", config, "--smoke")
    assert "Every stage works." in text
    smoke_run = both / "two" / "run-smoke"
    found = manifest.read(smoke_run).stages
    assert found["evaluate"].config["max_new_tokens"] == 24  # of so small a model nothing is cut
    assert weights_of(both / "two", "policy", "run-smoke") == weights_of(both / "one", "ppo")
    assert list(forecast.read(smoke_run)) == ["evaluate"]  # a copy takes no time
    assert checksums(both / "one", [both / "one"]) == before and not (both / "two" / "run").exists()
    known = facts.look(load(config), manifest.Manifest(name="tiny"), ["policy", "evaluate"])
    assert list(known.sizes) == ["evaluate"] and 50_000 < known.sizes["evaluate"].parameters < 100_000
    monkeypatch.setattr(cuts, "READ", 1e6)
    monkeypatch.setattr(cuts, "OPERATIONS", 1e6)
    cut = cuts.of_stages(load(config), known.sizes, {"evaluate": CPU}, {"evaluate": 1})["evaluate"]
    assert (cut.batch, cut.new_tokens, cut.keys) == (cuts.FEWEST, cuts.SHORTEST, {"max_new_tokens": cuts.SHORTEST})
    slow = times.slow_cpu(load(config), known.sizes, {}, speed=1.0)
    assert slow is not None and "most of it: evaluate" in slow


def test_a_stage_that_ran_again_there_is_taken_again(both):
    config = make(both / "two", {"sft": TAKEN, "dpo": tiny.DPO})
    run(config, "sft", "dpo")
    assert not any(decision.run for decision in plan(config))
    one = both / "one" / "tiny.yaml"
    tiny.edit(one, {"run_dir": str(both / "one" / "run")})
    (both / "one" / "run").rename(both / "one" / "moved")
    tiny.edit(config, {"stages": {"sft": {"run": "../one/moved"}, "dpo": tiny.DPO}})
    assert not any(decision.run for decision in plan(config))  # its content is the same
    (both / "one" / "moved").rename(both / "one" / "run")
    tiny.edit(config, {"stages": {"sft": TAKEN, "dpo": tiny.DPO}})
    tiny.edit(one, {"seed": 5})
    run(one, "sft")
    decisions = {decision.stage: decision.reason for decision in plan(config) if decision.run}
    words = "sft of ../one/run has changed: it was run again there, or this config names another one"
    assert decisions == {"sft": words, "dpo": "sft runs again"}
    found = run(config, "sft", "dpo")
    assert found.stages["sft"].reason == words
    assert weights_of(both / "two", "sft") == weights_of(both / "one", "sft")


def test_a_config_that_was_checked_is_checked_again_when_the_other_run_changes(both):
    """The shape of the other run's adapter decides how weights follow in this one."""
    config = make(both / "two", {"sft": TAKEN, "dpo": tiny.DPO})
    assert load(config).stages["sft"].lora == tiny.LORA
    assert recall(config) == load(config)
    one = both / "one" / "tiny.yaml"
    tiny.edit(one, {"run_dir": str(both / "one" / "run"), "stages": {"sft": tiny.SFT | {"lora": WIDE}}})
    run(one, "sft")
    assert recall(config) is None
    assert load(config).stages["sft"].lora == WIDE


@pytest.mark.parametrize("shape", [tiny.LORA, WIDE, None], ids=["same", "wide", "full"])
def test_a_reward_model_goes_on_from_the_first_rounds(first, tmp_path, shape):
    """With its head: before it learns, its scores are those of the first run's reward model."""
    run_dir = str(first / "one" / "run")
    still = {"max_length": 64, "max_steps": 1, "learning_rate": 1e-12}
    stages = {
        "before": {"run": run_dir, "stage": "reward"},
        "reward": tiny.REWARD | {"init": "before", "lora": shape, "training": still},
    }
    run(make(tmp_path / "two", stages), *stages)
    score = logits(first / "one" / "run", "reward")
    assert score.abs() > 1e-3
    torch.testing.assert_close(logits(tmp_path / "two" / "run", "reward"), score, rtol=0, atol=1e-5)
    if shape == tiny.LORA:
        adapter = tmp_path / "two" / "run" / "reward" / "output" / "adapter_model.safetensors"
        inherited = load_file(first / "one" / "run" / "reward" / "output" / adapter.name)
        for key, weight in load_file(adapter).items():
            torch.testing.assert_close(weight, inherited[key], rtol=0, atol=1e-9)


def test_a_new_reward_model_is_reported_on_by_the_policy_that_it_comes_from(both):
    """Also where it comes from another run's reward model: by the policy that PPO starts from."""
    stages = {
        "policy": TAKEN | {"stage": "ppo"},
        "before": TAKEN | {"stage": "reward"},
        "reward": tiny.REWARD | {"init": "before", "eval_data": "comparisons"},
        "ppo": tiny.PPO | {"reward": "reward"},
    }
    path = make(both / "two", stages, gate="stop")
    config = load(path)
    assert config.stages["reward-shift"].policy == "policy"
    assert load(path, ("stages.reward-shift.seed=3",)).stages["reward-shift"].policy == "policy"
    assert config.stages["ppo"].init == "policy"
    assert config.stages["ppo"].shift == "reward-shift"


def test_a_report_on_a_reward_model_of_another_run(both):
    """It samples the policy from which RL against that reward model starts; without RL the only one that was taken."""
    report = {"type": "shift", "data": "demonstrations"}
    policy = TAKEN | {"stage": "ppo"}
    stages = {"policy": policy, "other": TAKEN | {"stage": "sft"}, "reward": TAKEN, "report": report}
    path = make(both / "two", stages | {"ppo": tiny.PPO | {"init": "policy"}})
    assert load(path).stages["report"].policy == "policy"
    tiny.edit(path, {"stages": {"policy": policy, "reward": TAKEN, "report": report}})
    assert load(path).stages["report"].policy == "policy"
    tiny.edit(path, {"stages": stages})
    assert load(path).stages["report"].policy == "base"


def test_a_run_from_scratch_goes_on_from_its_pretrained_model(tmp_path):
    """That model as the base: adapters on it are taken alone, and PPO shares its backbone."""
    one = tiny.write_config(tmp_path / "one", run_dir=str(tmp_path / "one" / "run"))
    run(one, "pretrain", "sft", "reward")
    taken = {"run": "../one/run"}
    stages = {"sft": taken, "reward": taken, "ppo": tiny.CHAIN["stages"]["ppo"]}
    base = {"path": "../one/run/pretrain/output"}
    two = tiny.write_config(tmp_path / "two", run_dir=str(tmp_path / "two" / "run"), model=base, stages=stages)
    assert load(two).stages["sft"].weights == "on base"
    assert shares_backbone(load(two), "ppo")
    assert all(decision.run for decision in plan(two))
    found = run(two, *stages)
    assert found.stages["ppo"].metrics["initial_kl"] == 0
    assert found.stages["ppo"].output.full is None
    # As a new model, whose weights are taken with the adapter.
    stages = {"pretrain": taken, "sft": taken, "dpo": tiny.CHAIN["stages"]["dpo"]}
    three = tiny.write_config(tmp_path / "three", run_dir=str(tmp_path / "three" / "run"), stages=stages)
    assert all(decision.run for decision in plan(three))
    found = run(three, *stages)
    assert found.stages["dpo"].output.full == "sft/merged"
    assert found.stages["dpo"].metrics["initial_loss"] == pytest.approx(0.6931472, abs=1e-6)
    alone = tiny.write_config(tmp_path / "four", stages={"sft": taken, "dpo": tiny.CHAIN["stages"]["dpo"]})
    with pytest.raises(UserError, match=r"model\.scratch: no stage makes the weights of this model"):
        load(alone)


def test_the_example_of_the_page_on_configs(both):
    """As it stands, beside a first run with its LoRA options."""
    (text,) = fences("config: second round")
    (both / "configs").mkdir()
    path = both / "configs" / "round2.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"round2\.yaml:8: stages\.round1\.run: there is no folder .*/runs/round1;"):
        load(path)
    (both / "runs").mkdir()
    (both / "one" / "run").rename(both / "runs" / "round1")
    config = load(path)
    assert list(config.stages) == ["round1", "reward", "reward-shift", "ppo", "evaluate"]
    assert config.stages["reward"].init == config.stages["ppo"].init == config.stages["evaluate"].baseline == "round1"
    assert config.stages["reward-shift"].policy == "round1"
    assert config.stages["round1"].weights == "on base"


def test_two_runs_at_once(first, tmp_path):
    """Both read the first run's folder, which has no lock of theirs."""
    taken = {"run": str(first / "one" / "run")}
    before = checksums(first / "one", [first / "one"])
    names = ("two", "three")
    configs = [make(tmp_path / name, {"sft": taken, "dpo": tiny.DPO}) for name in names]
    commands = [[sys.executable, "-m", "pipeline.stage", str(config), "sft"] for config in configs]
    at_work = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) for command in commands]
    for one in at_work:
        output, _ = one.communicate(timeout=600)
        assert one.returncode == 0, output
    for name in names:
        assert weights_of(tmp_path / name, "sft") == weights_of(first / "one", "sft")
    assert checksums(first / "one", [first / "one"]) == before


def damage(folder: Path, what: str) -> None:
    """Change the first run as a test asks."""
    run_dir = folder / "one" / "run"
    weights = run_dir / "sft" / "output" / "adapter_model.safetensors"
    if what == "no folder":
        run_dir.rename(folder / "elsewhere")
    elif what == "no manifest":
        (run_dir / manifest.FILE).unlink()
    elif what == "broken manifest":
        (run_dir / manifest.FILE).write_text("{")
    elif what == "odd manifest":
        content = json.loads((run_dir / manifest.FILE).read_text())
        content["stages"]["sft"]["duration"] = "long"
        (run_dir / manifest.FILE).write_text(json.dumps(content))
    elif what in ("not finished", "running"):
        manifest.drop(run_dir, ["sft"])
    elif what == "damaged":
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    elif what == "missing":
        weights.unlink()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("no folder", "stages.sft.run: there is no folder {run}; give a run folder, relative to the config's folder"),
        ("no manifest", "stages.sft.run: {run} is no run folder: there is no manifest.json in it"),
        ("broken manifest", "stages.sft.run: {run}/manifest.json: damaged: expected a manifest in JSON"),
        ("odd manifest", "{run}/manifest.json: damaged at stages.sft.duration"),
        ("not finished", "stages.sft.run: {run}: stage 'sft' is not finished; run it there first"),
        ("running", "stages.sft.run: {run}: stage 'sft' is being run right now; wait for it"),
        ("damaged", "stages.sft: {run}/sft/output/adapter_model.safetensors has changed since the stage finished"),
        ("missing", "stages.sft: {run}/sft/output/adapter_model.safetensors is missing"),
    ],
)
def test_what_cannot_be_taken(both, what, words):
    config = make(both / "two", {"sft": TAKEN, "dpo": tiny.DPO})
    damage(both, what)
    words = words.format(run=(both / "one" / "run").resolve())
    lock = FileLock(both / "one" / "run" / "sft" / LOCK)
    if what == "running":
        lock.acquire()
    try:
        with pytest.raises(UserError, match=re.escape(words)):
            plan(config)
    finally:
        lock.release()


def test_the_plan_says_it_in_one_message(first, tmp_path, said):
    config = make(tmp_path / "two", {"sft": {"run": str(first / "one" / "nothing")}, "dpo": tiny.DPO})
    message = said("plan", config, fails=True)
    assert message.startswith(f"error: {config}: 1 problem in the config {config}:")
    assert f"there is no folder {first / 'one' / 'nothing'}" in message and "Traceback" not in message


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({"sft": TAKEN | {"stage": "sfd"}}, "there is no finished stage 'sfd'; did you mean 'sft'?"),
        ({"sft": TAKEN | {"lora": None}}, "stages.sft.lora: a stage of another run is taken as it is"),
        ({"sft": {"run": 3}}, "stages.sft.run: expected a valid string, got 3"),
        ({"sft": {"run": "run"}}, "is the folder of this run itself"),
        ({"dpo": tiny.DPO | {"init": "r"}, "r": TAKEN | {"stage": "reward"}}, "stage 'r' is of type reward; expected"),
        ({"r": TAKEN | {"stage": "sft"}, "ppo": tiny.PPO | {"reward": "r"}}, "stage 'r' is of type sft; expected"),
        (
            {"a": TAKEN | {"stage": "sft"}, "b": TAKEN | {"stage": "ppo"}, "dpo": tiny.DPO | {"init": "c"}},
            "there is no stage 'c'",
        ),
    ],
)
def test_what_a_config_may_not_say(both, stages, words):
    (both / "two" / "run").mkdir(parents=True)
    with pytest.raises(UserError, match=re.escape(words)):
        load(make(both / "two", stages))


def test_an_evaluation_cannot_be_taken(both):
    path = both / "one" / "run" / manifest.FILE
    content = json.loads(path.read_text())
    content["stages"]["sft"]["type"] = "evaluate"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="a stage of type evaluate puts out no model"):
        load(make(both / "two", {"sft": TAKEN, "dpo": tiny.DPO}))


def test_another_tokenizer_is_refused(both):
    config = make(both / "two", {"sft": TAKEN, "dpo": tiny.DPO}, tokenizer={"chat_template": "plain"})
    with pytest.raises(UserError, match="has another tokenizer than this run: the chat template differs; give"):
        plan(config)


def test_another_base_model_is_refused(both):
    config = make(both / "two", {"sft": TAKEN, "dpo": tiny.DPO})
    tiny.make_model(both / "two" / "model", seed=1)
    with pytest.raises(UserError, match=r"it is an adapter on .*one/model, and not on this run's base model, model"):
        plan(config)
    whole = make(both / "three", {"sft": TAKEN | {"stage": "whole"}, "dpo": tiny.DPO})
    settings = json.loads((both / "three" / "model" / "config.json").read_text())
    tiny.make_model(both / "three" / "model", seed=1)
    assert [decision.run for decision in plan(whole)] == [True, True]  # of the same sizes: it brings its weights
    (both / "three" / "model" / "config.json").write_text(json.dumps(settings | {"num_hidden_layers": 1}))
    with pytest.raises(UserError, match="`num_hidden_layers` is 2 there and 1 here"):
        plan(whole)


def test_full_weights_beside_a_quantised_base_are_refused(both):
    stages = {"sft": TAKEN | {"stage": "whole"}, "dpo": tiny.DPO}
    with pytest.raises(UserError, match=r"stages\.sft\.run: brings full weights, beside a base that is quantised"):
        load(make(both / "two", stages, quantization=QUANTISED))


def test_files_that_change_while_they_are_copied_are_noticed(both, tmp_path):
    config = load(make(both / "two", {"sft": TAKEN, "dpo": tiny.DPO}))
    found = other_run.find(config, "sft")
    damage(both, "damaged")
    with pytest.raises(UserError, match="is not what its record says; its stage may be running again"):
        other_run.copy(found, tmp_path / "copy", None)


def test_a_third_round_knows_the_first(first, tmp_path):
    """The model card of an export has the whole lineage, without any other run."""
    taken = {"run": str(first / "one" / "run")}
    make(tmp_path / "two", {"sft": taken, "dpo": tiny.DPO}, name="second")
    run(tmp_path / "two" / "tiny.yaml", "sft", "dpo")
    run(make(tmp_path / "three", {"dpo": {"run": "../two/run"}}, name="third"), "dpo")
    shutil.rmtree(tmp_path / "two")
    lineage = ancestors.lineage(source.find(tmp_path / "three" / "run", "dpo"))
    assert list(lineage) == ["tiny/sft", "second/sft", "second/dpo", "dpo"]
    assert run_folder.open_run(load(tmp_path / "three" / "tiny.yaml")).stages["dpo"].origin.name == "second"


def test_two_other_runs_of_one_name_are_told_apart(tmp_path):
    """By their folders; and a stage that ran again there between two copies is another one."""

    def taken(folder, seed):
        sft = tiny.make_record(seed=seed)
        dpo = tiny.make_record(type="dpo", parents={"init": "sft"}, seed=seed)
        origin = manifest.Origin(run=folder, path=folder, name="tiny", stage="dpo", stages={"sft": sft, "dpo": dpo})
        return tiny.make_record(type="dpo", origin=origin)

    stages = {"a": taken("/a", 0), "again": taken("/a", 0), "b": taken("/b", 0), "later": taken("/a", 1)}
    parents = {f"policies.{name}": name for name in stages}
    stages["last"] = tiny.make_record(type="dpo", parents=parents)
    recorded = manifest.Manifest(name="tiny", stages=stages)
    lineage = ancestors.lineage(source.Source(tmp_path, recorded, "last"))
    of_others = [f"{run}/{name}" for run in ("tiny", "tiny (2)", "tiny (3)") for name in ("sft", "dpo")]
    assert [name for name in lineage if "/" in name] == of_others
    assert {name: lineage[name].made_from.removeprefix("taken from ") for name in parents.values()} == {
        "a": "tiny/dpo",
        "again": "tiny/dpo",
        "b": "tiny (2)/dpo",
        "later": "tiny (3)/dpo",
    }
    assert lineage["tiny (2)/dpo"].made_from == "init tiny (2)/sft"
    assert lineage["tiny (3)/sft"].record.seed == 1
