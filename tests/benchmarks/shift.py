"""What a shift of the reward model's score does to RL, on the quickstart's task; PPO with and without a baseline.

    python tests/benchmarks/shift.py --folder /tmp/shift --seeds 0 1 2 3 4

For each seed the quickstart's chain is trained up to its reward model. To its score an offset per prompt is added,
normal with an SD of 0, 1, 3 and 10 times the within-prompt SD that the chain's shift report found, and for each: PPO
plain, with `sft_mean` and with `leave_one_out`, RLOO and GRPO, all of the same number of episodes; DPO, which sees no
score, once. Every policy is judged by the quickstart's rubric against SFT on its held-out prompts.

Two seeds run at a time with one thread each. It can be stopped and started again: finished stages are skipped, results
are appended to `--results` as they come. `--report` draws the figure and prints the table of what is there so far.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

REPO = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("shift_results.jsonl")
QUICKSTART = REPO / "configs" / "quickstart.yaml"
SHIFTS = (0, 1, 3, 10)  # SDs of the offset, in within-prompt SDs
NUM_COMPLETIONS = 4  # of a prompt: for the baselines, RLOO and GRPO
METHODS = {
    "ppo": {"type": "ppo"},
    "ppo-sft_mean": {"type": "ppo", "prompt_baseline": "sft_mean", "baseline_completions": NUM_COMPLETIONS},
    "ppo-leave_one_out": {"type": "ppo", "prompt_baseline": "leave_one_out", "baseline_completions": NUM_COMPLETIONS},
    "rloo": {"type": "rloo"},
    "grpo": {"type": "grpo"},
}
LABELS = {"ppo": "PPO", "ppo-sft_mean": "PPO, sft_mean", "ppo-leave_one_out": "PPO, leave_one_out"}
LABELS |= {"rloo": "RLOO", "grpo": "GRPO", "dpo": "DPO"}


def online_options(ppo: dict[str, Any]) -> dict[str, Any]:
    """RLOO's and GRPO's options: PPO's rollouts, minibatches, epochs, learning rate and KL coefficient."""
    batch, minibatches, epochs = ppo["per_device_train_batch_size"], ppo["num_mini_batches"], ppo["num_ppo_epochs"]
    return {
        "per_device_train_batch_size": batch // minibatches,
        "steps_per_generation": minibatches,
        "num_iterations": epochs,
        "num_generations": NUM_COMPLETIONS,
        "max_steps": ppo["total_episodes"] // batch * minibatches * epochs,
        "max_completion_length": ppo["response_length"],
        "temperature": ppo["temperature"],
        "beta": ppo["kl_coef"],
        "learning_rate": ppo["learning_rate"],
        "logging_steps": minibatches * epochs,
    }


def config(within_sd: float | None) -> dict[str, Any]:
    """The quickstart's chain up to the reward model; with `within_sd` also the policies for every shift."""
    raw = YAML().load(QUICKSTART)
    stages = raw["stages"]
    ppo, dpo, evaluate = (stages.pop(name) for name in ("ppo", "dpo", "evaluate"))
    for data in raw["data"].values():
        data["path"] = str(QUICKSTART.parent / data["path"])
    own = {
        "data": "heldout_prompts",
        "max_new_tokens": evaluate["max_new_tokens"],
        "batch_size": evaluate["batch_size"],
    }
    stages["shift"] = own
    stages["dpo"] = dpo
    for shift in SHIFTS if within_sd is not None else ():
        policies = {}
        for method, options in METHODS.items():
            training = dict(ppo["training"]) if options["type"] == "ppo" else online_options(ppo["training"])
            same = {key: ppo[key] for key in ("init", "reward", "data")}
            policies[f"{method}-s{shift}"] = same | options | {"added_shift": shift * within_sd, "training": training}
        judged = {"type": "evaluate", "policies": [*policies, *(["dpo"] if shift == 0 else [])]}
        stages |= policies | {f"evaluate-s{shift}": dict(evaluate) | judged}
    return raw | {"name": "shift"}


def run_seed(folder: Path, seed: int, results: Path) -> None:
    """One seed's policies; appends a line per policy to `results`."""
    place = folder / f"seed{seed}"
    place.mkdir(parents=True, exist_ok=True)
    (place / "quickstart").unlink(missing_ok=True)
    (place / "quickstart").symlink_to(QUICKSTART.parent / "quickstart")  # the judge is looked up beside the config
    path, manifest = place / "shift.yaml", place / "run" / "manifest.json"

    def rlhf(within_sd: float | None, until: str) -> dict[str, Any]:
        with path.open("w") as file:
            YAML().dump(config(within_sd), file)
        command = [sys.executable, "-m", "pipeline", "run", str(path), f"run_dir={place / 'run'}", f"seed={seed}"]
        with (place / "log.txt").open("a") as log:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
            subprocess.run([*command, "--until", until], check=True, stdout=log, stderr=log, env=environment)
        return json.loads(manifest.read_text())["stages"]

    within_sd = rlhf(None, "shift")["shift"]["metrics"]["within_sd"]["value"]
    rlhf(within_sd, "dpo")
    for shift in SHIFTS:
        stages = rlhf(within_sd, f"evaluate-s{shift}")
        for policy, summary in stages[f"evaluate-s{shift}"]["metrics"]["policies"].items():
            method = policy.removesuffix(f"-s{shift}")
            if method in LABELS:
                line = {"seed": seed, "shift": shift, "method": method, "within_sd": within_sd} | summary
                line |= {"seconds": stages[policy]["duration"], "alarms": stages[policy]["metrics"].get("alarms", [])}
                append(results, line)


def append(results: Path, line: dict[str, Any]) -> None:
    """Add a result unless its policy's is there already."""
    key = ("seed", "shift", "method")
    if [line[k] for k in key] not in [[other[k] for k in key] for other in read(results)]:
        with results.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs go")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--jobs", type=int, default=2, help="seeds that run at a time")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="only report what is there")
    args = parser.parse_args()
    if not args.report:
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda seed: run_seed(args.folder.resolve(), seed, args.results), args.seeds))
    from shift_report import report

    report(read(args.results), args.results.with_suffix(".png"), SHIFTS, LABELS)


if __name__ == "__main__":
    main()
