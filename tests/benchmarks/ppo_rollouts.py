"""Memory of one PPO update at two batch sizes, with the pipeline's rollouts and with PPOTrainer's own.

    python tests/benchmarks/ppo_rollouts.py --model MODEL_FOLDER    # a chat model, for example SmolLM2-135M-Instruct
    python tests/benchmarks/ppo_rollouts.py                         # a random one of the same size

Counted are the storages that operations make in `trainer.train()`, so not the weights. Each measurement runs in a
process of its own, from the same parents. At last come the sizes of a rollout's logits on paper, for larger models.
"""

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
LENGTH = 24  # of completions
CHUNK = 4  # local_rollout_forward_batch_size, and rows of a micro-batch
PAPER = {"Qwen2.5-0.5B": 151936, "Llama-3.1-8B": 128256}


def make_run(folder: Path, model: Path | None) -> Path:
    """The tiny tests' run with another model, and with prompts enough for the largest batch."""
    import ppo_memory
    import tiny

    path = ppo_memory.make_run(folder, "135m", four_bit=False)
    rows = [{"prompt": f"Tell me something about {number}.", "completion": "It is good."} for number in range(200)]
    tiny.write_rows(folder / "demonstrations.jsonl", rows)
    tiny.edit(path, {"model": {"path": str(model) if model else "model", "dtype": "float32"}})
    return path


def measure(config_path: str, mode: str, batch: int) -> None:
    """Run the ppo stage in this process and print the peak of its storages as JSON."""
    from storages import Storages
    from trl.experimental.ppo import PPOTrainer

    from pipeline import stage
    from pipeline.config.load import load
    from pipeline.training import trainers

    if mode == "PPOTrainer's own":
        trainers.lean = lambda *_: contextlib.nullcontext()
    train = PPOTrainer.train
    count = Storages()
    seconds = []

    def counted(self):
        started = time.time()
        with count:
            train(self)
        seconds.append(time.time() - started)

    PPOTrainer.train = counted
    sizes = {
        "total_episodes": batch,
        "per_device_train_batch_size": CHUNK,
        "gradient_accumulation_steps": batch // CHUNK,
        "num_ppo_epochs": 1,
        "response_length": LENGTH,
        "local_rollout_forward_batch_size": CHUNK,
    }
    overrides = [f"stages.ppo.training.{name}={value}" for name, value in sizes.items()]
    config = load(config_path, (*overrides, "stages.ppo.data=demonstrations"))
    stage.run(config, "ppo")
    found = {"rollouts": mode, "batch": batch, "peak_gib": count.peak / 2**30, "largest_gib": count.largest / 2**30}
    print("RESULT " + json.dumps(found | {"seconds": seconds[0]}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a folder with a chat model")
    parser.add_argument("--batches", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--measure", nargs=3, metavar=("CONFIG", "ROLLOUTS", "BATCH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure[0], options.measure[1], int(options.measure[2]))
    with tempfile.TemporaryDirectory(prefix="ppo-rollouts-") as folder:
        path = make_run(Path(folder), options.model and options.model.resolve())
        subprocess.run([sys.executable, "-m", "pipeline", "run", str(path), "--until", "reward"], check=True)
        for mode in ("the pipeline's", "PPOTrainer's own"):
            for batch in options.batches:
                command = [sys.executable, __file__, "--measure", str(path), mode, str(batch)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                print(next(line for line in output.splitlines() if line.startswith("RESULT ")), flush=True)
    for name, vocabulary in PAPER.items():
        logits = 512 * 128 * vocabulary * 4 / 2**30
        print(f"{name}: the logits of 512 completions of 128 tokens take {logits:.1f} GiB")


if __name__ == "__main__":
    main()
