"""Every stage type on a real chat model with real data, LoRA on a plain and on a 4-bit base, from YAML alone."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from test_chain import rlhf

from pipeline import manifest

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CONFIG = ROOT / "tests" / "smollm2.yaml"
LN_2 = pytest.approx(math.log(2), abs=1e-6)  # in every precision
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real model and data, which are not part of the project"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    maker = SHARED / "tools" / "make_smollm2.py"
    subprocess.run([sys.executable, str(maker), str(folder)], check=True, capture_output=True)
    return folder


def run(model: Path, folder: Path, *arguments: str) -> dict[str, manifest.Record]:
    rlhf("run", CONFIG, f"model.path={model}", f"run_dir={folder / 'run'}", *arguments)
    found = manifest.read(folder / "run").stages
    for name, record in found.items():
        manifest.verify(folder / "run", name, record)
    print({name: record.duration for name, record in found.items()})
    return found


def test_every_stage_type(model, tmp_path):
    found = run(model, tmp_path)
    assert set(found) == {"pretrain", "sft", "reward", "ppo", "rloo", "grpo", "dpo", "evaluate"}
    for name, record in found.items():
        kind = "report" if name == "evaluate" else "adapter"
        assert (record.output.kind, record.output.full) == (kind, None), name
    for name in ("ppo", "rloo", "grpo"):
        assert found[name].metrics["initial_kl"] == pytest.approx(0, abs=1e-6)
    assert found["dpo"].metrics["initial_loss"] == LN_2
    policies = found["evaluate"].metrics["policies"]
    assert set(policies) == {"base", "sft", "ppo", "rloo", "grpo", "dpo"}
    assert policies["sft"]["kl"] == pytest.approx(0, abs=1e-6)
    lines = (tmp_path / "run" / "evaluate" / "output" / "samples.jsonl").read_text().splitlines()
    assert all(json.loads(line)["sft"]["completion"] for line in lines)
    # pad == eos as the model is shipped; the run has another one
    recorded = manifest.read(tmp_path / "run").tokenizer
    assert recorded.eos_token == "<|im_end|>" != recorded.pad_token


def test_four_bit_base(model, tmp_path):
    four_bit = (
        "quantization.load_in_4bit=true",
        "quantization.bnb_4bit_quant_type=nf4",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
        "stages.sft.init=base",
    )
    for until in ("ppo", "dpo"):
        found = run(model, tmp_path, *four_bit, "--until", until)
    assert set(found) == {"sft", "reward", "dpo", "ppo"}
    assert all(record.output.kind == "adapter" and record.output.full is None for record in found.values())
    assert found["dpo"].metrics["initial_loss"] == LN_2
    assert found["ppo"].metrics["initial_kl"] == pytest.approx(0, abs=1e-6)
    assert not list((tmp_path / "run").rglob("merged"))
