"""What a shift of the reward model's score does to RL, on the quickstart's task; PPO with and without a baseline.

    python tests/benchmarks/shift.py --folder /tmp/shift --seeds 0 1 2 3 4

For each seed the quickstart's chain is trained up to its reward model. Its score is shifted per prompt in two ways:

- added: an offset is added to the score, normal with an SD of 10 times the within-prompt SD that the chain's shift
  report found. The value model, which starts from the reward model, knows nothing of it.
- inside: the reward model itself is refitted to its own score and a level per prompt of the same SD (levels.py), so
  that the value model starts with the level too. This is where the shift of a real reward model lies.

Without a shift and with each of the two: PPO plain, with `sft_mean` and with `leave_one_out`, and RLOO, all of the same
number of episodes. RLOO has no value model and compares completions of one prompt, so that what it loses to a level
inside is what the refit itself cost. Every policy is judged by the quickstart's rubric against SFT on its held-out
prompts.

Two seeds run at a time with one thread each. It can be stopped and started again: finished stages are skipped, results
are appended to `--results` as they come. `--report` draws the figure and prints the table of what is there so far.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

REPO = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).with_name("shift_results.jsonl")
QUICKSTART = REPO / "configs" / "quickstart.yaml"
SIZE = 10  # SD of the shift, in within-prompt SDs
SHIFTS = {"none": "none", "added": f"{SIZE} SD added", "inside": f"{SIZE} SD inside"}
NUM_COMPLETIONS = 4  # of a prompt: for the baselines and RLOO
METHODS = {
    "ppo": {"type": "ppo"},
    "ppo-sft_mean": {"type": "ppo", "prompt_baseline": "sft_mean", "baseline_completions": NUM_COMPLETIONS},
    "ppo-leave_one_out": {"type": "ppo", "prompt_baseline": "leave_one_out", "baseline_completions": NUM_COMPLETIONS},
    "rloo": {"type": "rloo"},
}
LABELS = {
    "ppo": "PPO",
    "ppo-sft_mean": "PPO, sft_mean",
    "ppo-leave_one_out": "PPO, leave_one_out",
    "rloo": "RLOO",
}


def online_options(ppo: dict[str, Any]) -> dict[str, Any]:
    """RLOO's options: PPO's rollouts, minibatches, epochs, learning rate and KL coefficient."""
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


def config(shift: str, within_sd: float | None) -> dict[str, Any]:
    """The quickstart's chain up to the reward model; with `within_sd` also the policies, for one kind of shift."""
    raw = YAML().load(QUICKSTART)
    stages = raw["stages"]
    ppo, _, evaluate = (stages.pop(name) for name in ("ppo", "dpo", "evaluate"))
    for data in raw["data"].values():
        data["path"] = str(QUICKSTART.parent / data["path"])
    stages["shift"] = {
        "data": "heldout_prompts",
        "max_new_tokens": evaluate["max_new_tokens"],
        "batch_size": evaluate["batch_size"],
    }
    if within_sd is None:
        return raw | {"name": "shift"}
    policies = {}
    for method, options in METHODS.items():
        training = dict(ppo["training"]) if options["type"] == "ppo" else online_options(ppo["training"])
        same = {"data": ppo["data"], "training": training}
        offset = SIZE * within_sd if shift == "added" else 0.0
        policies[f"{method}-{shift}"] = same | options | {"added_shift": offset}
    stages |= policies | {f"evaluate-{shift}": dict(evaluate) | {"type": "evaluate", "policies": [*policies]}}
    return raw | {"name": "shift"}


class Seed:
    """The runs of one seed: one for no shift and an added one, a copy of it for the shift inside the reward model."""

    def __init__(self, folder: Path, seed: int):
        self.seed, self.place = seed, folder / f"seed{seed}"
        self.place.mkdir(parents=True, exist_ok=True)
        (self.place / "quickstart").unlink(missing_ok=True)
        (self.place / "quickstart").symlink_to(QUICKSTART.parent / "quickstart")  # the judge is looked up beside it

    def _call(self, *command: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1"}
        with (self.place / "log.txt").open("a") as log:
            done = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, stderr=log, env=environment)
            log.write(done.stdout.decode())
        done.check_returncode()
        return done.stdout.decode()

    def run(self, shift: str, within_sd: float | None, until: str) -> dict[str, Any]:
        """Run the chain for one kind of shift; returns the stages on record."""
        path, run_dir = self.place / f"{shift}.yaml", self.place / ("inside" if shift == "inside" else "run")
        with path.open("w") as file:
            YAML().dump(config(shift, within_sd), file)
        options = (f"run_dir={run_dir}", f"seed={self.seed}", "--until", until)
        self._call("-m", "pipeline", "run", str(path), *options)
        return json.loads((run_dir / "manifest.json").read_text())["stages"]

    def refit(self) -> dict[str, float]:
        """Make the run whose reward model has levels inside, from the one that has the chain; what it has learnt."""
        learnt = self.place / "levels.json"
        if not learnt.exists():
            shutil.rmtree(self.place / "inside", ignore_errors=True)
            shutil.copytree(self.place / "run", self.place / "inside")
            script = str(Path(__file__).with_name("levels.py"))
            command = (str(self.place / "none.yaml"), str(self.place / "inside"), "--size", str(SIZE))
            said = self._call(script, *command, "--seed", str(self.seed))
            learnt.write_text(said.splitlines()[-1])
        return json.loads(learnt.read_text())


def run_seed(folder: Path, seed: int, results: Path) -> None:
    """One seed's policies; appends a line per policy to `results`."""
    runs = Seed(folder, seed)
    within_sd = runs.run("none", None, "shift")["shift"]["metrics"]["within_sd"]["value"]
    for shift in SHIFTS:
        learnt = runs.refit() if shift == "inside" else None
        stages = runs.run(shift, within_sd, f"evaluate-{shift}")
        report = stages["shift"]["metrics"]
        measured = {"icc": report["icc"]["value"], "within_sd": report["within_sd"]["value"], "levels": learnt}
        for policy, summary in stages[f"evaluate-{shift}"]["metrics"]["policies"].items():
            method = policy.removesuffix(f"-{shift}")
            if method in LABELS:
                line = {"seed": seed, "shift": shift, "method": method} | measured | summary
                line |= {"seconds": stages[policy]["duration"], "alarms": stages[policy]["metrics"].get("alarms", [])}
                append(results, line | {"explained_variance": explained_variance(runs.place, shift, policy)})


def explained_variance(place: Path, shift: str, policy: str) -> list[float]:
    """Of PPO's value model at the first and at the last update; nothing for other methods."""
    folder = place / ("inside" if shift == "inside" else "run") / policy
    history = json.loads((folder / "log_history.json").read_text())
    found = [entry["value/explained_variance"] for entry in history if "value/explained_variance" in entry]
    return [found[0], found[-1]] if found else []


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
