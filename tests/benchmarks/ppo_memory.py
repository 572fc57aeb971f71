"""PPO on one shared backbone against four separate models: peak memory and seconds per update, in one run.

    python tests/benchmarks/ppo_memory.py                       # 1.5B, bf16, LoRA: one GPU of 40 GB or more
    python tests/benchmarks/ppo_memory.py --four-bit            # the same on a 4-bit base
    python tests/benchmarks/ppo_memory.py --size 135m           # small enough for a CPU

A Qwen2-shaped model with random weights goes through sft, reward and dpo for a few steps; then PPO runs twice from the
same parents, each time in a process of its own. Memory is what torch allocated at its peak on a GPU, and the growth of
the process's resident set on a CPU (the four models' weights, adapters, optimizer and activations, less the libraries).
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
SIZES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12},
}
VOCABULARY = {"135m": 49152, "1.5b": 151936}
UPDATES = 4


def make_run(folder: Path, size: str, four_bit: bool) -> Path:
    """The tiny tests' run with a larger model."""
    import tiny
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    on_gpu = torch.cuda.is_available()
    training = {"use_cpu": not on_gpu, "bf16": False, "max_steps": 3, "gradient_checkpointing": False}
    ppo = {
        "total_episodes": 16 * UPDATES,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_ppo_epochs": 1,
        "response_length": 64 if on_gpu else 16,
        "local_rollout_forward_batch_size": 8,
        "logging_steps": 1,
    }
    stages = {"sft": tiny.SFT, "reward": tiny.REWARD, "dpo": tiny.DPO, "ppo": {"data": "comparisons", "training": ppo}}
    path = tiny.make_run(
        folder,
        stages,
        model={"path": "model", "dtype": "bfloat16"},
        lora={"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"},
        training=tiny.TRAINING | training,
        **({"quantization": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}} if four_bit else {}),
    )
    tiny.write_rows(folder / "comparisons.jsonl", tiny.comparisons() * 4)
    shapes = SIZES[size] | {"num_key_value_heads": SIZES[size]["num_attention_heads"] // 3}
    config = Qwen2Config(vocab_size=VOCABULARY[size], max_position_embeddings=1024, tie_word_embeddings=True, **shapes)
    model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.0f}M parameters", flush=True)
    model.save_pretrained(folder / "model")
    return path


def measure(config_path: str, mode: str) -> None:
    """Run the ppo stage in this process, shared or separate, and print what it took as JSON."""
    import torch

    from pipeline import stage
    from pipeline.config.load import load
    from pipeline.stages import ppo

    if mode == "separate":
        ppo.shares_backbone = lambda *_: False
    config = load(config_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.time()
    stage.run(config, "ppo")
    seconds = time.time() - started
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    history = json.loads((config.run_path / "ppo" / "log_history.json").read_text())
    metrics = {key: history[-1][key] for key in ("objective/kl", "objective/scores", "loss/value_avg")}
    found = {"mode": mode, "peak_gib": (peak or grown) / 2**30, "seconds_per_update": seconds / UPDATES, **metrics}
    print("RESULT " + json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.5b")
    parser.add_argument("--four-bit", action="store_true")
    parser.add_argument("--measure", nargs=2, metavar=("CONFIG", "MODE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        return measure(*arguments.measure)
    folder = Path(tempfile.mkdtemp(prefix="ppo-memory-"))
    path = make_run(folder, arguments.size, arguments.four_bit)
    for until in ("reward", "dpo"):
        subprocess.run([sys.executable, "-m", "pipeline", "run", str(path), "--until", until], check=True)
    results = {}
    for mode in ("separate", "shared"):
        copy = folder / mode
        shutil.copytree(folder / "run", copy)
        config = path.with_name(f"{mode}.yaml")
        config.write_text(path.read_text().replace(str(folder / "run"), str(copy)))
        command = [sys.executable, __file__, "--measure", str(config), mode]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        line = next(line for line in output.splitlines() if line.startswith("RESULT "))
        results[mode] = json.loads(line.removeprefix("RESULT "))
        print(results[mode], flush=True)
    for key in ("peak_gib", "seconds_per_update"):
        print(f"{key}: shared / separate = {results['shared'][key] / results['separate'][key]:.2f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
