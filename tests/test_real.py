"""Every stage type on a real chat model with real data, from YAML alone, with TRL's default options.

LoRA on a plain and on a 4-bit base, and RLOO with all weights. Without bf16 instructions a processor computes bf16 a
hundred times slower than float32: there the same stages run in float32.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_chain import rlhf

from pipeline.records import manifest
from pipeline.show import results

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CONFIG = ROOT / "tests" / "smollm2.yaml"
FAST_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
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
    own = () if FAST_BF16 else ("training.bf16=false",)
    rlhf("run", CONFIG, f"model.path={model}", f"run_dir={folder / 'run'}", *own, *arguments)
    found = manifest.read(folder / "run").stages
    for name, record in found.items():
        manifest.verify(folder / "run", name, record)
    print({name: record.duration for name, record in found.items()})
    return found


def shown_reward_model(folder: Path) -> dict:
    """What the code that `rlhf status` prints for the reward model defines."""
    recorded = manifest.read(folder)
    shown: dict = {}
    exec(results.snippet(folder, recorded, recorded.stages["reward"]), shown)
    return shown


def score_of(shown: dict, prompt: list[dict[str, str]], completion: str, ended: bool) -> float:
    """The score of a sampled completion, from its text alone."""
    tokenizer = shown["tokenizer"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False) + completion
    text += tokenizer.eos_token if ended else ""
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        return shown["model"].eval()(**inputs).logits.item()


def test_every_stage_type(model, tmp_path):
    found = run(model, tmp_path)
    assert set(found) == {"pretrain", "sft", "reward", "ppo", "rloo", "rloo_full", "grpo", "dpo", "evaluate"}
    kinds = dict.fromkeys(found, ("adapter", None))
    kinds |= {"evaluate": ("report", None), "rloo_full": ("full", None)}
    assert {name: (record.output.kind, record.output.full) for name, record in found.items()} == kinds
    for name in ("ppo", "rloo", "rloo_full", "grpo"):
        assert found[name].metrics["initial_kl"] == 0, name
    assert found["dpo"].metrics["initial_loss"] == LN_2
    assert found["reward"].metrics["reload_difference"] == 0
    policies = found["evaluate"].metrics["policies"]
    assert set(policies) == {"base", "sft", "ppo", "rloo", "rloo_full", "grpo", "dpo"}
    assert policies["sft"]["kl"] == 0
    lines = (tmp_path / "run" / "evaluate" / "output" / "samples.jsonl").read_text().splitlines()
    shown = shown_reward_model(tmp_path / "run")
    for line in map(json.loads, lines):
        for policy in policies:
            sample = line[policy]
            score = score_of(shown, line["prompt"], sample["completion"], sample["ended"])
            assert score == pytest.approx(sample["score"], abs=1e-3), policy
    # pad == eos as the model is shipped; the run has another one
    recorded = manifest.read(tmp_path / "run").tokenizer
    assert recorded.eos_token == "<|im_end|>" != recorded.pad_token


def test_four_bit_base(model, tmp_path):
    four_bit = (
        "model.dtype=bfloat16" if FAST_BF16 else "model.dtype=float32",
        "quantization.load_in_4bit=true",
        "quantization.bnb_4bit_quant_type=nf4",
        f"quantization.bnb_4bit_compute_dtype={'bfloat16' if FAST_BF16 else 'float32'}",
        "stages.sft.init=base",
        # A quantised base is not trained in full; this stage does not run here.
        "stages.rloo_full.lora={r: 8, lora_alpha: 16, lora_dropout: 0.0, target_modules: all-linear}",
    )
    for until in ("ppo", "dpo"):
        found = run(model, tmp_path, *four_bit, "--until", until)
    assert set(found) == {"sft", "reward", "dpo", "ppo"}
    assert all(record.output.kind == "adapter" and record.output.full is None for record in found.values())
    assert found["dpo"].metrics["initial_loss"] == LN_2
    assert found["ppo"].metrics["initial_kl"] == pytest.approx(0, abs=1e-6)
    assert not list((tmp_path / "run").rglob("merged"))
