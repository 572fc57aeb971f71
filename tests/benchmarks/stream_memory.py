"""Pretraining on a corpus larger than the memory the process may have, killed in the middle and resumed.

    python tests/benchmarks/stream_memory.py --folder /tmp/stream --corpus 3 --limit 2

A corpus of `--corpus` GiB is written; a small model pretrains on it by streaming, in processes that may not have more
than `--limit` GiB of private memory (RLIMIT_DATA): once without a break, once with `kill -9` half way. Reported are the
resident memory of the training process over the steps, and whether both runs end with equal weights.
"""

import argparse
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "tests"))
STEPS, SAVE = 2000, 200
NUM_FILES = 4


def write_corpus(folder: Path, size: int) -> None:
    """Random words; every document is another one."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(3000)]
    for number in range(NUM_FILES):
        path, i = folder / f"corpus-{number}.jsonl", 0
        if path.exists():
            continue
        with path.open("w") as file:
            while file.tell() < size // NUM_FILES:
                text = " ".join(rng.choices(words, k=400))
                lines = (json.dumps({"text": f"{number} {i + k} {text[k * 7 :]}"}) + "\n" for k in range(100))
                file.writelines(lines)
                i += 100


def make_config(folder: Path, name: str) -> Path:
    import tiny

    training = {
        "max_steps": STEPS,
        "max_length": 128,
        "per_device_train_batch_size": 16,
        "save_steps": SAVE,
        "save_strategy": "steps",
        "logging_steps": 100,
    }
    (folder / name).mkdir(exist_ok=True)
    path = tiny.make_run(folder / name, {"pretrain": {"data": "corpus", "training": training}})
    corpus = {"path": str(folder / "corpus-*.jsonl"), "streaming": True, "shuffle_buffer": 100}
    tiny.edit(path, {"data": {"corpus": corpus}})
    return path


def train(config: Path, limit: int, kill_at: int | None) -> list[tuple[float, float]]:
    """Run the stage; (seconds, GiB resident) of its process. With `kill_at`, kill all once that checkpoint is there."""
    log = (config.parent / "log.txt").open("a")
    process = subprocess.Popen(
        [sys.executable, "-m", "pipeline.stage", str(config), "pretrain"],
        stdout=log,
        stderr=log,
        start_new_session=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
    )
    start, seen = time.time(), []
    marker = config.parent / "run" / "pretrain" / "checkpoints" / f"checkpoint-{kill_at}" / "complete.json"
    while process.poll() is None:
        seen.append((time.time() - start, psutil.Process(process.pid).memory_info().rss / 2**30))
        if kill_at is not None and marker.exists():
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return seen
        time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"the stage ended with {process.returncode}; its output is in {log.name}")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--corpus", type=float, default=3, help="GiB")
    parser.add_argument("--limit", type=float, default=2, help="GiB")
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    os.environ["PYTHONPATH"] = str(REPO)
    write_corpus(folder, int(args.corpus * 2**30))
    limit = int(args.limit * 2**30)
    whole, parts = make_config(folder, "whole"), make_config(folder, "parts")
    seen = train(whole, limit, None)
    for share in (0.25, 0.5, 0.75, 1):
        part = [rss for _, rss in seen[int(len(seen) * (share - 0.25)) : int(len(seen) * share)]]
        print(f"{share - 0.25:.0%} to {share:.0%} of {seen[-1][0]:.0f} s: at most {max(part):.3f} GiB resident")
    train(parts, limit, STEPS // 2)
    train(parts, limit, None)

    from safetensors.torch import load_file

    from pipeline.records import manifest

    record = manifest.read(parts.parent / "run").stages["pretrain"]
    print(f"killed, resumed at step {record.resumed_from_step}; documents read: {record.datasets['data']['read']}")
    a, b = (load_file(c.parent / "run/pretrain/output/adapter_model.safetensors") for c in (whole, parts))
    print("equal weights:", all((a[key] == b[key]).all().item() for key in a))


if __name__ == "__main__":
    main()
