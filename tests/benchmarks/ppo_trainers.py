"""PPO by TRL's PPOTrainer and by its GRPOTrainer with a value model: win rates, time and memory, on the quickstart.

    python tests/benchmarks/ppo_trainers.py --folder /tmp/trainers --seeds 0 1 2 3 4
    python tests/benchmarks/ppo_trainers.py --folder /tmp/trainers --seeds 0 1 2 3 4 --corners
    python tests/benchmarks/ppo_trainers.py --folder /tmp/trainers --report

For each seed the quickstart's chain is trained up to its reward model, and from it one policy with each `trainer`; all
else is equal. With `--corners` also the corners of the experiment in shift.py: an offset per prompt of 0 and 10
within-prompt SDs, without a baseline and with `sft_mean`. Every policy is judged by the quickstart's rubric against SFT
on held-out prompts.

Each PPO stage runs alone in a process of its own, with one thread. Seconds are the stage's, CPU seconds and the largest
resident set are the process's with all that it imports. It can be stopped and started again: finished stages are
skipped, and what was measured of them is kept.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

REPO = Path(__file__).resolve().parents[2]
QUICKSTART = REPO / "configs" / "quickstart.yaml"
SIZE = 10  # SD of the shift, in within-prompt SDs
TRAINERS = ("ppo", "grpo")
PLAIN = [("none", 0)]
CORNERS = [("none", 0), ("none", SIZE), ("sft_mean", 0), ("sft_mean", SIZE)]
RESULTS = "results.jsonl"


def name_of(trainer: str, baseline: str, shift: int) -> str:
    return f"{trainer}-{baseline}-{shift}"


def config(cells: list[tuple[str, int]], within_sd: float | None) -> dict[str, Any]:
    """The quickstart's chain up to its reward model; with `within_sd` also the policies and their evaluation."""
    raw = YAML().load(QUICKSTART)
    stages = raw["stages"]
    ppo, _, evaluate = (stages.pop(name) for name in ("ppo", "dpo", "evaluate"))
    for data in raw["data"].values():
        data["path"] = str(QUICKSTART.parent / data["path"])
    stages["reward-shift"] = {
        "type": "shift",
        "data": "heldout_prompts",
        "max_new_tokens": evaluate["max_new_tokens"],
        "batch_size": evaluate["batch_size"],
    }
    if within_sd is not None:
        policies = {}
        for trainer in TRAINERS:
            for baseline, shift in cells:
                own = {"type": "ppo", "trainer": trainer, "prompt_baseline": baseline, "added_shift": shift * within_sd}
                policies[name_of(trainer, baseline, shift)] = dict(ppo) | own
        stages |= policies | {"evaluate": dict(evaluate) | {"policies": [*policies]}}
    return raw | {"name": "trainers"}


def run_stage(place: Path, seed: int, *options: str) -> dict[str, float]:
    """Give one command of the pipeline; returns what its processes took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pipeline", "run", str(place / "run.yaml"), f"run_dir={place / 'run'}"]
    with (place / "log.txt").open("a") as log:
        process = subprocess.Popen([*command, f"seed={seed}", *options], stdout=log, stderr=log, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, f"see {place / 'log.txt'}"
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_gib": usage.ru_maxrss / 2**20}


def run_seed(folder: Path, seed: int, cells: list[tuple[str, int]]) -> None:
    """One seed's policies; what was found of each is written to a file of the seed."""
    place = folder / f"seed{seed}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "quickstart").unlink(missing_ok=True)
    (place / "quickstart").symlink_to(QUICKSTART.parent / "quickstart")  # the judge is looked up beside it
    kept = place / "usage.json"
    usage = json.loads(kept.read_text()) if kept.exists() else {}
    write(place, config(cells, None))
    run_stage(place, seed)
    within_sd = records(place)["reward-shift"]["metrics"]["within_sd"]["value"]
    write(place, config(cells, within_sd))
    for baseline, shift in cells:
        for trainer in TRAINERS:
            name = name_of(trainer, baseline, shift)
            if name not in records(place):
                usage[name] = run_stage(place, seed, "--only", name)
                kept.write_text(json.dumps(usage))
    run_stage(place, seed)
    stages = records(place)
    table = stages["evaluate"]["metrics"]["policies"]
    rows = []
    for baseline, shift in cells:
        for trainer in TRAINERS:
            name = name_of(trainer, baseline, shift)
            own = {"seed": seed, "trainer": trainer, "baseline": baseline, "shift": shift}
            measured = {"seconds": stages[name]["duration"]} | usage[name]
            rows.append(own | measured | {"evaluation": table[name], "metrics": stages[name]["metrics"]})
    (place / RESULTS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def write(place: Path, raw: dict[str, Any]) -> None:
    with (place / "run.yaml").open("w") as file:
        YAML().dump(raw, file)


def records(place: Path) -> dict[str, Any]:
    return json.loads((place / "run" / "manifest.json").read_text())["stages"]


def report(folder: Path) -> None:
    """Print a row for each seed and policy."""
    print("| seed | trainer | baseline | shift, SDs | win rate | KL | seconds | CPU seconds | peak, GiB |")
    print("|---|---|---|---|---|---|---|---|---|")
    for file in sorted(folder.glob(f"seed*/{RESULTS}")):
        for row in map(json.loads, file.read_text().splitlines()):
            found = row["evaluation"]
            rate = found["judge_win_rate"]
            cells = [row["seed"], row["trainer"], row["baseline"], row["shift"], interval(rate), f"{found['kl']:.1f}"]
            cells += [f"{row['seconds']:.0f}", f"{row['cpu_seconds']:.0f}", f"{row['peak_gib']:.2f}"]
            print("| " + " | ".join(map(str, cells)) + " |")


def interval(rate: list[float]) -> str:
    value, low, high = rate
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--corners", action="store_true", help="the corners of the shift's experiment too")
    parser.add_argument("--report", action="store_true", help="print what is there")
    args = parser.parse_args()
    if not args.report:
        for seed in args.seeds:
            run_seed(args.folder.resolve(), seed, CORNERS if args.corners else PLAIN)
    report(args.folder)


if __name__ == "__main__":
    main()
