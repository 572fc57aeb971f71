"""Preparing comparisons for a reward stage at scale, against a bare `datasets.map` that only tokenises the same rows.

    python tests/benchmarks/data_scale.py --folder /tmp/scale --rows 100000 1000000

For each size: rows are generated (about 200 tokens each side), loaded, tokenised bare, prepared by the pipeline
(converted, split by prompt, tokenised, checked), and prepared once more from the cache. Every step runs in a process of
its own; reported are seconds inside it, rows per second, and the peak of the resident memory summed over its tree.
At the end the first size is prepared once more, from an empty cache: it tells how the machine's speed has changed.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil

REPO = Path(__file__).resolve().parents[2]
NUM_WORDS, WORDS_PER_SIDE, WORDS_PER_PROMPT = 5000, 165, 25
STEPS = ("load", "bare", "prepare", "again")
CONFIG = """\
name: scale
model:
  scratch:
    architecture: {{model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 1}}
    tokenizer: {{vocab_size: 6000, data: [sample]}}
data:
  sample: {{path: sample.jsonl}}
  comparisons: {{path: {rows}.jsonl, heldout: 0.01}}
stages:
  pretrain: {{data: sample, lora: null}}
  sft: {{data: comparisons, training: {{max_length: 1024}}}}
  reward: {{data: comparisons, eval_data: comparisons, training: {{max_length: 1024}}}}
"""


def generate(folder: Path, rows: int) -> None:
    """Random comparisons; one prompt in ten occurs twice."""
    path = folder / f"{rows}.jsonl"
    if path.exists():
        return
    rng = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["".join(rng.choices(letters, k=rng.randint(2, 8))) for _ in range(NUM_WORDS)]

    def text(length: int) -> str:
        return " ".join(rng.choices(words, k=length))

    with path.open("w") as file:
        prompt = ""
        for row in range(rows):
            prompt = prompt if prompt and row % 10 == 9 else text(WORDS_PER_PROMPT)
            sides = [text(rng.randint(WORDS_PER_SIDE - 50, WORDS_PER_SIDE + 50)) for _ in range(2)]
            file.write(json.dumps({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]}) + "\n")
    with (folder / "sample.jsonl").open("w") as file:
        file.writelines(json.dumps({"text": text(WORDS_PER_SIDE)}) + "\n" for _ in range(2000))


def step(name: str, folder: Path, rows: int) -> None:
    """One step, in this process; prints its seconds and counts as JSON."""
    from pipeline.config.load import load
    from pipeline.config.requests import request, run_data
    from pipeline.data import places, prepare, run_tokenizer, sources

    config = load(folder / f"{rows}.yaml")
    (part,) = places.find("comparisons", config.data["comparisons"], config.folder)
    saved = folder / "tokenizer"
    if not saved.is_dir():
        run_tokenizer.build(config).save_pretrained(saved)
    tokenizer = run_tokenizer.open_saved(saved)
    start = time.perf_counter()
    result = {}
    if name == "load":
        result["rows"] = len(sources.load(part))
    elif name == "bare":
        raw = sources.load(part)
        start = time.perf_counter()

        def tokenise(batch):
            options = {"add_special_tokens": False, "return_attention_mask": False}
            return {f"{side}_ids": tokenizer(texts, **options)["input_ids"] for side, texts in batch.items()}

        done = raw.map(tokenise, batched=True, num_proc=os.cpu_count(), remove_columns=raw.column_names)
        result["rows"] = len(done)
    else:
        read = prepare.Datasets(run_data(config), tokenizer, run_tokenizer.fingerprint(tokenizer))
        for role in ("data", "eval_data"):
            audit = read.prepare(request(config, "reward", role)).audit
            result[role] = audit.record()
            assert not audit.problems(config.checks.model_dump())
    print(json.dumps({"seconds": time.perf_counter() - start} | result))


def measured(command: list[str]) -> dict:
    """Run a command; its JSON result, with the peak of the resident memory of its process tree in GiB."""
    process = psutil.Popen(command, stdout=subprocess.PIPE, text=True)
    peak = {"rss": 0, "pss": 0}

    def watch() -> None:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            found = {"rss": 0, "pss": 0}
            for member in [process, *process.children(recursive=True)]:
                try:
                    memory = member.memory_full_info()
                except psutil.NoSuchProcess:
                    continue
                for kind in found:
                    found[kind] += getattr(memory, kind)
            for kind, value in found.items():
                peak[kind] = max(peak[kind], value)
            time.sleep(0.3)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{command} ended with {process.returncode}")
    return json.loads(output.splitlines()[-1]) | {kind: value / 2**30 for kind, value in peak.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--step", choices=STEPS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.folder.resolve()
    if args.step:
        step(args.step, folder, args.rows[0])
        return
    folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {"HF_HOME": str(folder / "cache"), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = str(REPO)
    seconds = {}

    def run(rows: int, name: str) -> dict:
        result = measured([sys.executable, __file__, "--folder", str(folder), "--rows", str(rows), "--step", name])
        rate = f"{rows / result['seconds']:,.0f} rows/s"
        memory = f"peak RSS {result['rss']:.2f} GiB (PSS {result['pss']:.2f})"
        print(f"{rows:>9,} rows  {name:<8} {result['seconds']:7.1f} s  {rate:>16}  {memory}", flush=True)
        return result

    for rows in args.rows:
        generate(folder, rows)
        (folder / f"{rows}.yaml").write_text(CONFIG.format(rows=rows))
    os.sync()  # what was just written is not to be written back while something is measured
    for rows in args.rows:
        for name in args.steps:
            result = run(rows, name)
            seconds[rows, name] = result["seconds"]
        if "bare" in args.steps:
            ratio = seconds[rows, "prepare"] / seconds[rows, "bare"]
            print(f"{rows:>9,} rows  prepare / bare = {ratio:.2f}", flush=True)
        print(f"{rows:>9,} rows  {result.get('data')}", flush=True)
    first, last = args.rows[0], args.rows[-1]
    if first != last:
        os.environ["HF_HOME"] = str(folder / "cache-again")
        run(first, "load")
        after = run(first, "prepare")["seconds"]
        before, million = seconds[first, "prepare"], seconds[last, "prepare"]
        ratios = [million / small for small in ((before + after) / 2, before, after)]
        told = "{:,} rows take {:.1f}x what {:,} take ({:.1f}x before, {:.1f}x after)"
        print(told.format(last, ratios[0], first, *ratios[1:]))


if __name__ == "__main__":
    main()
