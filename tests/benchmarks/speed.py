"""The same work bare in TRL and through the pipeline, stage by stage: seconds of training and of the process, memory.

    python tests/benchmarks/speed.py --model PATH --data ../shared/data                # all stages, 20 steps, 3 times
    python tests/benchmarks/speed.py --model PATH --data ../shared/data --stages ppo --steps 4 --repeats 1
    python tests/benchmarks/speed.py --model PATH --data ../shared/data --count             # operations, not seconds
    python tests/benchmarks/speed.py --model PATH --data ../shared/data --stages sft --peer "tool train {stage} {data}"

`--model` is a folder with a small model (SmolLM2-135M), `--data` one with `alpaca_en_demo.json`, `dpo_en_demo.json` and
`c4_demo.jsonl`. First the pipeline trains an SFT adapter and a reward model, from which both sides start. SFT goes once
over the demonstrations, so that the policy has learnt to end its completions. Then each stage runs bare, through the
pipeline and as the peer's command, each in a process of its own, again and again; every second time in the other order.
The table holds medians. Both sides train the same LoRA adapter on the same token ids
with the same options, which are TRL's defaults but for sizes; PPO is without gradient checkpointing, which PPOTrainer
does not switch on. The losses of the last step show whether it was the same work.

Seconds of training are those of `trainer.train()`; of the process, all from its start to its end. Memory is what torch
allocated at its peak on a GPU, and the largest resident set of the process on a CPU. `--peer` is a shell command, in
which {stage}, {model}, {data} (the folder of rows) and {steps} are replaced; its training time is the last
`train_runtime` that it prints.

Two runs of the same process differ by several percent where other programs share the machine. `--count` counts instead
the floating-point operations of all matrix products and attentions in `trainer.train()`, which do not depend on that.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPO = HERE.parents[1]
PPO = {"ppo": "ppo", "ppo-on-grpo": "grpo"}  # stages of type ppo, each with its `trainer`
NAMES = ("pretrain", "sft", "reward", "dpo", "kto", "rloo", "grpo", *PPO)
LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
LONGEST = 600  # characters of a text: no row is cut by any limit below
DATA = {
    "pretrain": "texts",
    "reward": "comparisons",
    "dpo": "comparisons",
    "kto": "unpaired",
}  # others: demonstrations
POLICY, REWARD = "start", "judge"  # the stages that both sides start from
START_STEPS = {POLICY: 62, REWARD: 20}
BATCH = 4
PPO_BATCH = 16
COUNT = "SPEED_COUNT"  # set in the environment of processes that count operations
RESPONSE_LENGTH = 128  # as the shipped config of this model


@dataclass(frozen=True)
class Times:
    """One process: seconds of training (None if unknown), of it all, of its CPU; peak GiB; losses; operations."""

    train: float | None
    process: float
    cpu: float
    memory: float
    losses: list[float]
    operations: int


def options_of(stage: str, steps: int) -> dict[str, Any]:
    """The options of TRL that a stage has on both sides."""
    import torch

    common = {"per_device_train_batch_size": BATCH, "learning_rate": 1e-4, "logging_steps": 1}
    common["use_cpu"] = not torch.cuda.is_available()
    if stage in PPO:
        sizes = {"total_episodes": PPO_BATCH * steps, "gradient_accumulation_steps": PPO_BATCH // BATCH}
        lengths = {"response_length": RESPONSE_LENGTH, "local_rollout_forward_batch_size": PPO_BATCH}
        return common | sizes | lengths | {"gradient_checkpointing": False}
    common |= {"max_steps": steps, "bf16": True}  # TRL's default; by itself the pipeline leaves it off on some devices
    if stage in ("rloo", "grpo"):
        return common | {"max_completion_length": 32, "num_generations": 4, "beta": 0.04}
    return common | {"max_length": 256 if stage == "pretrain" else 1024}


def write_rows(data: Path, folder: Path) -> None:
    """Write short rows of the real data, in the simplest forms."""
    alpaca = json.loads((data / "alpaca_en_demo.json").read_text(encoding="utf-8"))
    demonstrations = [{"prompt": row["instruction"], "completion": row["output"]} for row in alpaca if not row["input"]]
    comparisons = []
    unpaired = []
    for row in json.loads((data / "dpo_en_demo.json").read_text(encoding="utf-8")):
        if [turn["from"] for turn in row["conversations"]] != ["human"]:
            continue
        pair = {"prompt": row["conversations"][0]["value"]}
        pair |= {side: row[side]["value"] for side in ("chosen", "rejected")}
        comparisons.append(pair)
    comparisons = _short(comparisons)
    for pair in comparisons:
        unpaired.append({"prompt": pair["prompt"], "completion": pair["chosen"], "label": True})
        unpaired.append({"prompt": pair["prompt"], "completion": pair["rejected"], "label": False})
    texts = [json.loads(line) for line in (data / "c4_demo.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = {
        "demonstrations": _short(demonstrations),
        "comparisons": comparisons,
        "unpaired": unpaired,
        "texts": [{"text": row["text"]} for row in texts],
    }
    for name, content in rows.items():
        lines = [json.dumps(row) + "\n" for row in content]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def _short(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return [row for row in rows if all(0 < len(text.strip()) < LONGEST for text in row.values())]


def write_config(folder: Path, model: Path, steps: int) -> Path:
    """Write the pipeline's config of all stages; those that start from an adapter are given none of their own."""
    stages: dict[str, Any] = {}
    for name, kind in ((POLICY, "sft"), (REWARD, "reward")):
        data = DATA.get(kind, "demonstrations")
        stages[name] = {"type": kind, "init": "base", "data": data, "training": options_of(kind, START_STEPS[name])}
    stages[POLICY]["training"]["lr_scheduler_type"] = "cosine"
    for name in NAMES:
        stages[name] = {"data": DATA.get(name, "demonstrations"), "training": options_of(name, steps)}
        stages[name]["init"] = "base" if name in ("pretrain", "sft", "reward") else POLICY
        if name in (*PPO, "rloo", "grpo"):
            stages[name]["reward"] = REWARD
    for name, trainer in PPO.items():
        stages[name] |= {"type": "ppo", "trainer": trainer}
    config = {
        "name": "speed",
        "gate": "off",
        "run_dir": str(folder / "run"),
        "model": {"path": str(model.resolve())},
        "lora": LORA,
        "data": {name: {"path": f"{name}.jsonl"} for name in ("demonstrations", "comparisons", "unpaired", "texts")},
        "stages": stages,
    }
    path = folder / "speed.yaml"
    path.write_text(json.dumps(config, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def measure(side: str, stage: str, config_path: Path, run_dir: Path) -> None:
    """Run one stage in this process, and print what its training took."""
    import torch
    from transformers import Trainer
    from trl.experimental.ppo import PPOTrainer

    watched: dict[str, Any] = {}
    for trainer_class in (Trainer, PPOTrainer):
        _time_training(trainer_class, watched)
    if side == "ours":
        from pipeline import stage as stage_process
        from pipeline.config.load import load

        stage_process.run(load(config_path, (f"run_dir={run_dir}",)), stage)
    else:
        _run_bare(stage, config_path, run_dir)
    losses = [entry[key] for entry in watched["log"] for key in ("loss", "loss/policy_avg") if key in entry]
    memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    result = {"train": watched["seconds"], "memory": memory, "losses": losses, "operations": watched["operations"]}
    print("RESULT " + json.dumps(result), flush=True)


def _time_training(trainer_class: type, watched: dict[str, Any]) -> None:
    """Let a trainer's `train` leave its seconds and its log in `watched`, with the same random numbers on all sides."""
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import set_seed

    original = trainer_class.train
    counter = FlopCounterMode(display=False)

    def train(self: Any, *args: Any, **options: Any) -> Any:
        set_seed(0)
        started = time.perf_counter()
        with counter if COUNT in os.environ else contextlib.nullcontext():
            output = original(self, *args, **options)
        watched["seconds"] = time.perf_counter() - started
        watched["operations"] = counter.get_total_flops()
        watched["log"] = self.state.log_history
        return output

    trainer_class.train = train


def _run_bare(stage: str, config_path: Path, run_dir: Path) -> None:
    from speed_bare import STAGES, Bare
    from transformers import set_seed

    config = json.loads(config_path.read_text(encoding="utf-8"))
    dtype = json.loads((run_dir / "manifest.json").read_text(encoding="utf-8"))["model"]["dtype"]
    bare = Bare(config["model"]["path"], dtype, run_dir, config_path.parent, run_dir / "bare", LORA)
    set_seed(0)
    trainer = STAGES[stage](bare, config["stages"][stage]["training"])
    trainer.train()
    trainer.save_model(str(run_dir / "bare" / "output"))


def environment() -> dict[str, str]:
    """The variables of all processes."""
    folders = [str(REPO), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(folders), "HF_HUB_OFFLINE": "1"}


def timed(command: list[str] | str) -> Times:
    """Run a process and say what it took; its last words are shown if it fails."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, shell=isinstance(command, str), stdout=output, stderr=subprocess.STDOUT, env=environment()
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        output.seek(0)
        text = output.read()
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {command}\n{text[-4000:]}")
    found = re.findall(r"^RESULT (.*)$", text, re.MULTILINE)
    result = json.loads(found[-1]) if found else {}
    if not found and (runtimes := re.findall(r"train_runtime\W+([\d.]+)", text)):
        result["train"] = float(runtimes[-1])
    memory = result.get("memory") or usage.ru_maxrss / 2**20
    cpu = usage.ru_utime + usage.ru_stime
    operations = result.get("operations", 0)
    return Times(result.get("train"), seconds, cpu, memory, result.get("losses", []), operations)


def compare(stage: str, config: Path, arguments: argparse.Namespace) -> dict[str, list[Times]]:
    """Run a stage on all sides, again and again; every second time in the other order."""
    sides = ["bare", "ours", *(["peer"] if arguments.peer else [])]
    times: dict[str, list[Times]] = {side: [] for side in sides}
    for repeat in range(arguments.repeats):
        for side in sides[:: -1 if repeat % 2 else 1]:
            copy = config.parent / "copy"
            shutil.rmtree(copy, ignore_errors=True)  # an earlier call may have been stopped
            shutil.copytree(config.parent / "run", copy)
            command: list[str] | str = [sys.executable, __file__, "--measure", side, stage, str(config), str(copy)]
            if side == "peer":
                names = {"stage": stage, "model": arguments.model, "data": config.parent, "steps": arguments.steps}
                command = arguments.peer.format(**names)
            times[side].append(timed(command))
            print(stage, side, times[side][-1], flush=True)
            shutil.rmtree(copy)
    return times


def row(stage: str, times: dict[str, list[Times]], steps: int) -> str:
    """A line of the table: medians of each side, and of the ratio of ours to bare in the same repeat."""
    cells = [stage]
    for key in ("train", "process", "cpu", "memory"):
        for taken in times.values():
            values = [getattr(one, key) for one in taken]
            cells.append("-" if None in values else f"{statistics.median(values):.2f}")
        pairs = zip(times["ours"], times["bare"], strict=True)
        cells.append(f"{statistics.median(getattr(ours, key) / getattr(bare, key) for ours, bare in pairs):.2f}")
    if stage in PPO:
        bare, ours = (PPO_BATCH * steps / statistics.median(one.train for one in times[s]) for s in ("bare", "ours"))
        cells.append(f"{bare:.2f}, {ours:.2f} episodes/s: {ours / bare:.2f}")
    else:
        cells.append("")
    cells.append(
        "; ".join(
            f"{side} {taken[-1].losses[0]:.4f}, {taken[-1].losses[-1]:.4f}"
            for side, taken in times.items()
            if taken[-1].losses
        )
    )
    return f"| {' | '.join(cells)} |"


def count_row(stage: str, times: dict[str, list[Times]]) -> str:
    """A line of the table of operations."""
    bare, ours = (times[side][0].operations for side in ("bare", "ours"))
    return f"| {stage} | {bare / 1e12:.3f} | {ours / 1e12:.3f} | {ours / bare:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="the folder of the base model")
    parser.add_argument("--data", type=Path, help="the folder with the three data files")
    parser.add_argument("--stages", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a stage; of PPO, updates")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--folder", type=Path, help="keep the start there, and take it from there if it is there already"
    )
    parser.add_argument("--count", action="store_true", help="count floating-point operations, once on each side")
    parser.add_argument("--peer", help="another tool's command")
    parser.add_argument("--measure", nargs=4, metavar=("SIDE", "STAGE", "CONFIG", "RUN_DIR"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        side, stage, config, run_dir = arguments.measure
        return measure(side, stage, Path(config), Path(run_dir))
    if arguments.count:
        os.environ[COUNT] = "1"
        arguments.repeats = 1
    if arguments.model is None or arguments.data is None:
        parser.error("--model and --data are required")
    with tempfile.TemporaryDirectory(prefix="speed-") as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        report(folder, arguments)


def report(folder: Path, arguments: argparse.Namespace) -> None:
    """Train what both sides start from, measure all stages, and print the table."""
    write_rows(arguments.data, folder)
    config = write_config(folder, arguments.model, arguments.steps)
    for name in START_STEPS:
        command = [sys.executable, "-m", "pipeline", "run", str(config), "--only", name]
        subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    sides = ["bare", "ours", *(["peer"] if arguments.peer else [])]
    heads = [f"{what}, {side}" for what in ("training s", "process s", "CPU s", "GiB") for side in (*sides, "ratio")]
    lines = [f"| stage | {' | '.join(heads)} | PPO | first and last loss |", f"|{'---|' * (len(heads) + 3)}"]
    if arguments.count:
        lines = ["| stage | 10^12 operations, bare | ours | ratio |", "|---|---|---|---|"]
    for stage in arguments.stages:
        times = compare(stage, config, arguments)
        lines.append(count_row(stage, times) if arguments.count else row(stage, times, arguments.steps))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
