"""Every stage type on a real chat model with real data, from YAML alone, with TRL's default options.

LoRA on a plain and on a 4-bit base, and RLOO with all weights; then the SFT stage as a GGUF file. Without bf16
instructions a processor computes bf16 a hundred times slower than float32: there the same stages run in float32.

The model is SmolLM2-135M-Instruct with its tokenizer, template and tied embeddings, of which the first layers are left:
what is compared here must be equal at any depth, and all thirty layers take three times as long.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML
from test_chain import rlhf
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.records import manifest
from pipeline.show import results

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CONFIG = ROOT / "tests" / "smollm2.yaml"
FAST_BF16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
NUM_LAYERS = 4
NUM_POSITIONS = 200
LN_2 = pytest.approx(math.log(2), abs=1e-6)  # in every precision
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SHARED.is_dir(), reason="needs the real model and data, which are not part of the project"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    whole = tmp_path_factory.mktemp("smollm2") / "whole"
    maker = SHARED / "tools" / "make_smollm2.py"
    subprocess.run([sys.executable, str(maker), str(whole)], check=True, capture_output=True)
    folder = whole.with_name("model")
    loaded = AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=NUM_LAYERS)
    loaded.save_pretrained(folder)
    AutoTokenizer.from_pretrained(whole).save_pretrained(folder)
    return folder


def run(model: Path, folder: Path, config: Path, *arguments: str) -> dict[str, manifest.Record]:
    own = () if FAST_BF16 else ("training.bf16=false",)
    rlhf("run", config, f"model.path={model}", f"run_dir={folder / 'run'}", *own, *arguments)
    found = manifest.read(folder / "run").stages
    for name, record in found.items():
        manifest.verify(folder / "run", name, record)
    print({name: record.duration for name, record in found.items()})
    return found


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory) -> Path:
    """The folder of a finished run of all stages."""
    folder = tmp_path_factory.mktemp("finished")
    run(model, folder, CONFIG)
    return folder / "run"


def shown_reward_model(folder: Path) -> dict:
    """What the code that `rlhf status` prints for the reward model defines."""
    recorded = manifest.read(folder)
    shown: dict = {}
    exec(results.snippet(folder, recorded, recorded.stages["reward"]), shown)
    return shown


def score_of(shown: dict, prompt: list[dict[str, str]], sample: dict) -> float | None:
    """The score of a sampled completion, from its text alone; None: other tokens have the same text."""
    tokenizer = shown["tokenizer"]
    text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    completion = sample["completion"] + (tokenizer.eos_token if sample["ended"] else "")
    before, after = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in (text, completion))
    if "\ufffd" in completion or len(after) != sample["length"]:
        return None
    with torch.no_grad():
        return shown["model"].eval()(input_ids=torch.tensor([before + after])).logits.item()


def test_every_stage_type(finished):
    found = manifest.read(finished).stages
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
    lines = (finished / "evaluate" / "output" / "samples.jsonl").read_text().splitlines()
    shown = shown_reward_model(finished)
    num_compared = 0
    for line in map(json.loads, lines):
        for policy in policies:
            score = score_of(shown, line["prompt"], line[policy])
            num_compared += score is not None
            assert score is None or score == pytest.approx(line[policy]["score"], abs=1e-3), policy
    assert num_compared > len(lines) * len(policies) / 3
    # pad == eos as the model is shipped; the run has another one
    recorded = manifest.read(finished).tokenizer
    assert recorded.eos_token == "<|im_end|>" != recorded.pad_token


def test_four_bit_base(model, tmp_path):
    config = YAML(typ="safe").load(CONFIG)
    config["stages"] = {name: config["stages"][name] for name in ("sft", "reward", "ppo", "dpo")}
    config["data"] = {name: {**its, "path": str(CONFIG.parent / its["path"])} for name, its in config["data"].items()}
    path = tmp_path / "four_bit.yaml"
    YAML().dump(config, path)
    four_bit = (
        "model.dtype=bfloat16" if FAST_BF16 else "model.dtype=float32",
        "quantization.load_in_4bit=true",
        "quantization.bnb_4bit_quant_type=nf4",
        f"quantization.bnb_4bit_compute_dtype={'bfloat16' if FAST_BF16 else 'float32'}",
    )
    found = run(model, tmp_path, path, *four_bit)
    assert set(found) == {"sft", "reward", "dpo", "ppo"}
    assert all(record.output.kind == "adapter" and record.output.full is None for record in found.values())
    assert found["dpo"].metrics["initial_loss"] == LN_2
    assert found["ppo"].metrics["initial_kl"] == pytest.approx(0, abs=1e-6)
    assert not list((tmp_path / "run").rglob("merged"))


def test_its_gguf_file_gives_the_same_likeliest_tokens(finished, tmp_path):
    """By the command alone, and read back by transformers."""
    rlhf("export", finished, "sft", "--to", tmp_path / "policy", "--as", "gguf")
    exact = json.loads((tmp_path / "policy" / "rlhf_export.json").read_text())["figures"]["exact"]
    assert exact["positions"] >= NUM_POSITIONS
    assert exact["same_token"] == 1
    # Once more by what users are shown: the code of `rlhf status` and the code on the card.
    recorded = manifest.read(finished)
    stage: dict = {}
    exec(results.snippet(finished, recorded, recorded.stages["sft"]), stage)
    (code,) = (tmp_path / "policy" / "README.md").read_text().split("```python\n")[1:]
    exported: dict = {}
    folder = json.dumps(str(tmp_path / "policy"))
    exec(code.split("messages =")[0].replace('"policy"', folder), exported)
    rows = json.loads((SHARED / "data" / "alpaca_en_demo.json").read_text())[-6:]
    text = "\n".join(row["instruction"] + "\n" + row["output"] for row in rows)
    inputs = stage["tokenizer"](text, return_tensors="pt")
    assert inputs["input_ids"].tolist() == exported["tokenizer"](text, return_tensors="pt")["input_ids"].tolist()
    ids = inputs["input_ids"][:, : NUM_POSITIONS + 50]
    assert ids.shape[1] >= NUM_POSITIONS
    with torch.no_grad():
        ours, theirs = (loaded["model"].eval()(input_ids=ids).logits[0].float() for loaded in (exported, stage))
    assert (ours.argmax(-1) == theirs.argmax(-1)).all()
    assert (ours - theirs).abs().max() < 0.01
