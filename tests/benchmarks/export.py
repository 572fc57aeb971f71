"""How far exports of a real model are from their stages: SmolLM2 on a float32, a bfloat16 and a 4-bit base.

    python tests/benchmarks/export.py --folder /tmp/export --model MODEL_FOLDER --data ../shared/data

Trains a policy and a reward model on each base for a few steps, with a learning rate that moves them far, and exports
each in every form. The table is made from what the exports say of themselves. Finished runs and exports are kept.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from ruamel.yaml import YAML

FOUR_BIT = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
BASES = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "4-bit": {"dtype": "bfloat16", "quantization": FOUR_BIT},
}
EXPORTS = (
    ("sft", "adapter", None),
    ("sft", "merged", "float32"),
    ("sft", "merged", "bfloat16"),
    ("sft", "gguf", "float32"),
    ("sft", "gguf", "bfloat16"),
    ("reward", "adapter", None),
    ("reward", "merged", "float32"),
    ("reward", "merged", "bfloat16"),
)
TRAINING = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "per_device_train_batch_size": 2,
    "max_steps": 12,
    "logging_steps": 4,
    "learning_rate": 1e-3,
}
SAMPLED = {"data": "instructions", "num_prompts": 8, "max_new_tokens": 32, "max_prompt_length": 128}


def config(model: Path, data: Path, dtype: str, quantization: dict | None = None) -> dict:
    reward = {"max_length": 448, "per_device_train_batch_size": 1}
    return {
        "name": "smol",
        "gate": "off",  # a reward model of a few steps would not pass
        "model": {"path": str(model), "dtype": dtype},
        "quantization": quantization,
        "lora": {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"},
        "training": TRAINING,
        "data": {
            "instructions": {"path": str(data / "alpaca_en_demo.json"), "limit": 100, "heldout": 0.1},
            "comparisons": {"path": str(data / "dpo_en_demo.json"), "limit": 60, "heldout": 0.3},
        },
        "checks": {"too_long": None},
        "stages": {
            "sft": {"data": "instructions", "training": {"max_length": 128}},
            "reward": {"data": "comparisons", "eval_data": "comparisons", "training": reward},
            "shift": SAMPLED | {"reward": "reward", "num_completions": 2},
            "evaluate": SAMPLED | {"batch_size": 8},
        },
    }


def rlhf(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "pipeline", *map(str, arguments)], check=True)


def export(run_dir: Path, stage: str, form: str, dtype: str | None, target: Path) -> float:
    """Return the seconds that it took; 0 for one that is there already."""
    if target.exists():
        return 0.0
    start = time.time()
    own = ("--dtype", dtype) if dtype else ()
    rlhf("export", run_dir, stage, "--to", target, "--as", form, *own)
    return time.time() - start


def row(base: str, stage: str, form: str, dtype: str | None, target: Path) -> str:
    about = json.loads((target / "rlhf_export.json").read_text())
    exact = about["figures"]["exact"]
    used = about["figures"].get("as_used", {})
    keys = ("score", "mean_score") if stage == "reward" else ("logit", "log_prob", "mean_log_prob", "same_token")
    cells = [f"{exact[key]:.2g}" if key != "same_token" else f"{exact[key]:.3f}" for key in keys]
    cells += ["-"] * (4 - len(cells))
    mean = used.get("mean_score", used.get("mean_log_prob"))
    same = used.get("same_token")
    cells += ["-" if mean is None else f"{mean:.2g}", "-" if same is None else f"{same:.3f}"]
    return f"| {base} | {stage} | {form} | {dtype or '-'} | {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for base, settings in BASES.items():
        path = folder / f"{base}.yaml"
        YAML().dump(config(options.model.resolve(), options.data.resolve(), **settings), path)
        run_dir = folder / "runs" / base
        rlhf("run", path, f"run_dir={run_dir}")
        for stage, form, dtype in EXPORTS:
            target = folder / "exports" / f"{base}-{stage}-{form}-{dtype}"
            seconds = export(run_dir, stage, form, dtype, target)
            lines.append(row(base, stage, form, dtype, target))
            print(f"{lines[-1]} {seconds:.0f} s", flush=True)
    print("| base | stage | as | dtype | logit, or score | log-prob., or mean score | mean log-prob. | same token |")
    print("\n".join(lines))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    print(f"largest resident set of a process: {peak:.2f} GiB")


if __name__ == "__main__":
    main()
