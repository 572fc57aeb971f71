"""The README's first command, word for word, in a fresh clone and a fresh virtual environment."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from test_readme import fences

from pipeline.records import manifest

ROOT = Path(__file__).parents[1]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]


def test_the_quickstart_command(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    (command,) = fences("command: quickstart")
    # As a user's shell has it: none of the variables that this test run was started with.
    environment = {
        key: value for key, value in os.environ.items() if not key.startswith(("HF_", "PYTEST", "VIRTUAL_ENV"))
    }
    result = subprocess.run(["bash", "-c", command], cwd=clone, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]

    run = clone / "runs" / "quickstart"
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
