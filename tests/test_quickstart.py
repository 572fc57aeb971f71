"""The README's first command, word for word, in a fresh clone and a fresh virtual environment; and the gate on what
it trained: its own reward model is let pass, two on spoilt labels are not."""

import json
import os
import random
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm
from ruamel.yaml import YAML
from test_readme import fences

from pipeline.records import manifest

ROOT = Path(__file__).parents[1]
SPOILT = ("coin", "longer")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The clone in which the command was run, and what it said."""
    clone = tmp_path_factory.mktemp("quickstart") / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    (line,) = fences("command: quickstart")
    # As a user's shell has it: none of the variables that this test run was started with.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST", "VIRTUAL_ENV"))
    }
    result = subprocess.run(["bash", "-c", line], cwd=clone, env=environment, capture_output=True, text=True)
    return SimpleNamespace(result=result, clone=clone, run_dir=clone / "runs" / "quickstart")


def test_the_quickstart_command(quickstart):
    result, run = quickstart.result, quickstart.run_dir
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    finished = manifest.read(run)
    print(result.stdout[-2500:], {name: record.duration for name, record in finished.stages.items()})
    assert list(finished.stages) == ["pretrain", "sft", "reward", "reward-shift", "ppo", "dpo", "evaluate"]
    for figure in ("held-out accuracy", "within-prompt SD", "score and length"):
        assert f"ppo: gate: reward: {figure}: passed" in result.stdout
    shift = finished.stages["reward-shift"]
    assert f"{shift.metrics['icc']['value']:.2f}" in result.stdout and shift.metrics["advice"] in result.stdout
    assert {"offsets.png", "length.png", "reliability.png"} <= {
        path.name for path in (run / "reward-shift/output").iterdir()
    }
    policies = finished.stages["evaluate"].metrics["policies"]
    for name in ("ppo", "dpo"):
        _, low, _ = policies[name]["judge_win_rate"]
        assert low > 0.60, name
        assert policies[name]["kl"] < 10 and policies[name]["length"] < 40 and policies[name]["ended"] > 0.9
    assert f"{policies['ppo']['judge_win_rate'][0]:.2f}" in result.stdout
    assert "Traceback" not in result.stdout + result.stderr
    lines = (run / "evaluate" / "output" / "samples.jsonl").read_text().splitlines()
    assert len(lines) == policies["ppo"]["prompts"]
    assert all(json.loads(line)["sft"]["completion"] is not None for line in lines)


def relabelled(rows, labels, seed):
    """Comparisons with other labels: `coin` swaps the sides by seeded flips, `longer` prefers the longer side."""
    flip = random.Random(seed)
    for row in rows:
        sides = row["chosen"], row["rejected"]
        if labels == "coin" and flip.random() < 0.5:
            sides = sides[::-1]
        elif labels == "longer":
            sides = sorted(sides, key=len, reverse=True)
        if labels != "longer" or len(sides[0]) > len(sides[1]):
            yield {"prompt": row["prompt"], "chosen": sides[0], "rejected": sides[1]}


def make_spoilt(folder, quickstart, write_rows):
    """A run that takes the quickstart's SFT and trains two reward models on spoilt labels, and a short PPO on each."""
    config = YAML(typ="safe").load(quickstart.clone / "configs" / "quickstart.yaml")
    source, stages = quickstart.clone / "configs" / "quickstart", config["stages"]
    data = {name: {"path": str(source / f"{name}.jsonl")} for name in ("prompts", "heldout_prompts")}
    made = {"sft": {"run": str(quickstart.run_dir), "stage": "sft"}}
    short = stages["ppo"]["training"] | {"total_episodes": 128}
    for number, labels in enumerate(SPOILT):
        for seed, split in ((number, "comparisons"), (number + 10, "heldout_comparisons")):
            rows = [json.loads(line) for line in (source / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
            path = folder / f"{labels}-{split}.jsonl"
            write_rows(path, relabelled(rows, labels, seed))
            data[f"{labels}-{split}"] = {"path": str(path)}
        own = {"type": "reward", "data": f"{labels}-comparisons", "eval_data": f"{labels}-heldout_comparisons"}
        made[labels] = stages["reward"] | own
        made[f"ppo-{labels}"] = stages["ppo"] | {"type": "ppo", "reward": labels, "training": short}
    own = {"policies": ["ppo-coin"], "reward": "coin", "judge": None, "num_prompts": 200}
    made["evaluate"] = stages["evaluate"] | own
    config |= {"data": data, "stages": made, "run_dir": str(folder / "run")}
    config["model"] = {"path": str(quickstart.run_dir / "pretrain" / "output")}
    path = folder / "spoilt.yaml"
    YAML().dump(config, path)
    return path


@pytest.fixture(scope="module")
def spoilt(quickstart, tmp_path_factory, write_rows):
    """The run on spoilt labels: its run folder, and what `rlhf run --until` says of PPO on each reward model."""
    folder = tmp_path_factory.mktemp("spoilt")
    path = make_spoilt(folder, quickstart, write_rows)
    results = {labels: warm.rlhf("run", path, "--until", f"ppo-{labels}") for labels in SPOILT}
    return SimpleNamespace(config=path, run_dir=folder / "run", results=results)


def stopped_by(result, stage, what):
    """A stage did not start, for this one reason, and the message is all that is said."""
    said = result.stdout + result.stderr
    assert result.returncode == 2, said[-3000:]
    assert f"{stage} does not start, the gate failed" in said and "Traceback" not in said
    failed = {line.strip() for line in said.splitlines() if ": FAILED: " in line}
    assert len(failed) == 1 and what in failed.pop(), said[-3000:]
    return True


def test_three_reward_models_from_one_sft(quickstart, spoilt):
    """The quickstart's own, one on labels of a coin, one on labels that prefer the longer side."""
    good, recorded = manifest.read(quickstart.run_dir).stages, manifest.read(spoilt.run_dir).stages
    reports = {labels: recorded[f"{labels}-shift"].metrics for labels in SPOILT}
    reports["good"] = good["reward-shift"].metrics
    for labels, report in reports.items():
        found = {key: report[key] for key in ("icc", "within_sd", "length_correlation")}
        found |= {"accuracy": report["comparisons"]["accuracy"]}
        print(labels, {key: [round(value, 3) for value in ends.values()] for key, ends in found.items()})

    assert stopped_by(spoilt.results["coin"], "ppo-coin", "coin: held-out accuracy")
    assert stopped_by(spoilt.results["longer"], "ppo-longer", "longer: score and length")
    assert set(recorded) == {"sft", *SPOILT, *(f"{labels}-shift" for labels in SPOILT)}
    log = (quickstart.run_dir / "ppo" / "log.txt").read_text()
    assert log.count("ppo: gate: reward: ") == 3 and log.count(": passed: ") == 4
    assert "ppo: gate: sft: first token: passed" in log
    # Well on either side of the limits, not just so.
    assert reports["good"]["length_correlation"]["high"] < 0.85 < reports["longer"]["length_correlation"]["low"]
    assert reports["good"]["comparisons"]["accuracy"]["low"] > 0.65
    assert reports["coin"]["within_sd"]["value"] < reports["good"]["within_sd"]["value"] / 3


def test_warn_names_what_failed_and_goes_on(spoilt):
    result = warm.rlhf("run", spoilt.config, "gate=warn", "--until", "ppo-coin")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert "ppo-coin: gate: coin: held-out accuracy: FAILED" in result.stdout
    assert manifest.read(spoilt.run_dir).stages["ppo-coin"].metrics["episodes"] == 128


def test_the_quickstart_data_is_what_its_generator_writes(tmp_path):
    """Held-out prompts are nowhere in what is trained on, and the files are the generator's, byte for byte."""
    source = ROOT / "configs" / "quickstart"
    copy = tmp_path / "quickstart"
    copy.mkdir()
    for name in ("generate.py", "judge.py", "facts.json"):
        (copy / name).write_bytes((source / name).read_bytes())
    subprocess.run(["python3", str(copy / "generate.py")], check=True, capture_output=True)
    written = sorted(path.name for path in copy.glob("*.jsonl"))
    assert len(written) == 6
    for name in written:
        assert (copy / name).read_bytes() == (source / name).read_bytes(), name

    def prompts(name):
        return {json.loads(line)["prompt"] for line in (source / name).read_text().splitlines()}

    held_out = prompts("heldout_prompts.jsonl") | prompts("heldout_comparisons.jsonl")
    trained = prompts("demonstrations.jsonl") | prompts("comparisons.jsonl") | prompts("prompts.jsonl")
    assert held_out and not held_out & trained
