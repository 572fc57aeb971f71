"""Time what happens before and around the training: `rlhf run`, `rlhf plan`, and a short stage beside bare TRL.

    python tests/benchmarks/startup.py --folder /tmp/startup [--smollm2 MODEL --rows ROWS.json] [--only quickstart]

quickstart: the whole of configs/quickstart.yaml with empty caches, the same command again, then `rlhf plan` of a config
that was validated before and of one with a changed override. sft: one SFT stage of 8 steps on a model in a folder, as
`rlhf run` of a config that is validated, in turns with a script that does the same with TRL alone; both in a process of
their own, imports included. Of every command wall seconds and CPU seconds (user + system, of all its processes) are
printed. Only ratios of one run mean anything on a machine that does other work too.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
RLHF = [sys.executable, "-m", "pipeline"]
TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 8,
    "max_length": 256,
    "learning_rate": 1e-4,
    "use_cpu": True,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "logging_steps": 1,
}
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BARE = """
import json, sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
model, rows, folder, training, lora, template = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer.chat_template = template
tokenizer.pad_token = "<|endoftext|>"
tokenizer.eos_token = "<|im_end|>"
data = Dataset.from_list([json.loads(line) for line in open(rows)])
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(model),
    SFTConfig(output_dir=folder, **training),
    train_dataset=data,
    processing_class=tokenizer,
    peft_config=LoraConfig(task_type="CAUSAL_LM", **lora),
)
trainer.train()
trainer.save_model(folder)
"""


def timed(command: list[str], folder: Path) -> tuple[float, float]:
    """Wall and CPU seconds of a command in `folder`, with the caches that lie there."""
    variables = {"HF_HOME": str(folder / "hf"), "HF_DATASETS_CACHE": str(folder / "hf" / "datasets")}
    variables |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=os.environ | variables, capture_output=True, text=True)
    wall = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def show(what: str, times: tuple[float, float]) -> None:
    print(f"{what:60s} {times[0]:7.2f} s wall {times[1]:7.2f} s CPU", flush=True)


def quickstart(folder: Path) -> None:
    run = [*RLHF, "run", str(QUICKSTART)]
    plan = [*RLHF, "plan", str(QUICKSTART)]
    show("quickstart", timed(run, folder))
    show("quickstart, run again", timed(run, folder))
    show("plan", timed(plan, folder))
    show("plan, unchanged", timed(plan, folder))
    show(
        "import trl and its trainers",
        timed([sys.executable, "-c", "import trl, peft; from trl import SFTTrainer"], folder),
    )
    show("plan, changed", timed([*plan, "stages.dpo.training.beta=0.2"], folder))


def sft(folder: Path, model: Path, rows: Path, repeats: int) -> None:
    pairs = [(row["instruction"] + row.get("input", ""), row["output"]) for row in json.loads(rows.read_text())]
    dialogues = [{"prompt": [_said("user", a)], "completion": [_said("assistant", b)]} for a, b in pairs if a and b]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    config = {
        "name": "startup",
        "model": {"path": str(model)},
        "tokenizer": {"chat_template": "chatml", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "lora": LORA,
        "data": {"rows": {"path": "rows.jsonl"}},
        "stages": {"sft": {"data": "rows", "training": TRAINING}},
    }
    (folder / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    given = json.dumps([str(model), "rows.jsonl", "bare", TRAINING, LORA, TEMPLATE])
    commands = {
        "bare TRL": [sys.executable, "-c", BARE, given],
        "rlhf run": [*RLHF, "run", "config.yaml", "--redo", "sft"],
    }
    timed([*RLHF, "run", "config.yaml"], folder)  # the data is prepared and the config validated
    seen: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            times = timed(command, folder)
            seen[name].append(times[0])
            show(f"sft of 8 steps, {name}", times)
    bare, ours = (statistics.median(seen[name]) for name in commands)
    print(f"medians: {ours:.1f} s against {bare:.1f} s; 1.05 x bare + 4 s is {1.05 * bare + 4:.1f} s")


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="a new folder")
    parser.add_argument("--smollm2", type=Path, help="a folder with SmolLM2-135M, or a model of its shape")
    parser.add_argument("--rows", type=Path, help="instructions and outputs, as Alpaca has them, in JSON")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=["quickstart", "sft"])
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True)
    if options.only != "sft":
        quickstart(folder)
    if options.only != "quickstart" and options.smollm2 and options.rows:
        sft(folder, options.smollm2.resolve(), options.rows.resolve(), options.repeats)
    shutil.rmtree(folder / "hf", ignore_errors=True)


if __name__ == "__main__":
    main()
