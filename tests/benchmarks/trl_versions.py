"""The same small chain under several versions of TRL: which stages run, and how far their metrics are from 1.12's.

    python tests/benchmarks/trl_versions.py --folder /tmp/trl                        # all versions
    python tests/benchmarks/trl_versions.py --folder /tmp/trl --versions 1.16.0      # some of them

For each version `pip` installs TRL alone into an environment of its own below the folder; all other packages are those
of the Python that runs this script. The chain has a stage of every type, on a random model of 30,000 parameters, with
TRL's default options (bf16 autocast and gradient checkpointing among them). A stage of ppo has a config of its own,
since a version without PPOTrainer refuses the whole config. The table is written to `trl_versions.md` beside this file.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import shutil
import site
import subprocess
import sys
import venv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPO = HERE.parents[1]
TABLE = HERE / "trl_versions.md"
PINNED = "1.12.0"
VERSIONS = (PINNED, "1.13.0", "1.14.0", "1.15.0", "1.16.0")
ON_GRPO = "ppo-on-grpo"  # a stage of ppo with the other trainer
TYPES = ("pretrain", "sft", "reward", "shift", "ppo", ON_GRPO, "rloo", "grpo", "dpo", "kto", "evaluate")
TIMES = ("runtime", "per_second", "duration", "time")  # parts of the names of metrics that differ from run to run
OTHERS = ("torch", "transformers", "peft", "accelerate", "datasets")


@dataclass
class Outcome:
    """What the chain did under one version: the metrics of each finished stage, and why the others are not."""

    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)


def make_environment(folder: Path, version: str) -> Path:
    """Make an environment with this version of TRL, unless it is there; returns its Python."""
    place = folder / "environments" / version
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        [packages] = place.glob("lib/python*/site-packages")
        # Looked in after the environment's own packages, so that its TRL hides the other one.
        (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
        install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--ignore-installed", f"trl=={version}"]
        subprocess.run(install, check=True)
    return python


def write_chain(folder: Path) -> tuple[Path, Path]:
    """Write the chain's model, data and two configs of one run: without ppo, and with it."""
    import tiny

    online = {"max_completion_length": 8, "num_generations": 4, "beta": 0.04}
    stages: dict[str, Any] = {
        "pretrain": {"data": "texts", "lora": None, "training": {"max_length": 32}},
        "sft": tiny.SFT,
        "reward": tiny.REWARD | {"eval_data": "held_out"},
        "shift": {"data": "held_out", "policy": "sft", "max_new_tokens": 8},
        ON_GRPO: tiny.PPO | {"type": "ppo", "trainer": "grpo"},
        "rloo": {"data": "demonstrations", "training": online},
        "grpo": {"data": "demonstrations", "training": online},
        "dpo": tiny.DPO,
        "kto": {"data": "unpaired"},
        "evaluate": {"data": "held_out", "max_new_tokens": 8, "policies": [ON_GRPO, "rloo", "grpo", "dpo", "kto"]},
    }
    training = {"use_cpu": True, "max_steps": 4, "learning_rate": 1e-3, "logging_steps": 1}
    folder.mkdir(parents=True)
    path = tiny.make_run(folder, stages, training=training | {"per_device_train_batch_size": 4})
    rows = tiny.comparisons()
    tiny.write_rows(folder / "texts.jsonl", [{"text": row["chosen"]} for row in rows])
    tiny.write_rows(folder / "held_out.jsonl", [row | {"prompt": f"Once more: {row['prompt']}"} for row in rows])
    good = [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in rows]
    bad = [{"prompt": row["prompt"], "completion": row["rejected"], "label": False} for row in rows]
    tiny.write_rows(folder / "unpaired.jsonl", [*good, *bad])
    names = ("comparisons", "demonstrations", "unpaired", "texts", "held_out")
    tiny.edit(path, {"data": {name: {"path": f"{name}.jsonl"} for name in names}})
    with_ppo = path.with_name("with_ppo.yaml")
    shutil.copy(path, with_ppo)
    tiny.edit(with_ppo, {"stages": stages | {"ppo": tiny.PPO}})
    return path, with_ppo


def run_chain(python: Path, folder: Path) -> Outcome:
    """Run the chain under one version; a stage that fails does not keep the others from running."""
    shutil.rmtree(folder, ignore_errors=True)
    path, with_ppo = write_chain(folder)
    outcome = Outcome()
    _rlhf(python, path)
    finished = _metrics(folder)
    for name in TYPES:
        if name in finished:
            continue
        own = with_ppo if name == "ppo" else path
        fault = _rlhf(python, own, "--only", name)
        if fault is not None:
            outcome.faults[name] = fault
    outcome.metrics = _metrics(folder)
    return outcome


def _rlhf(python: Path, config: Path, *options: str) -> str | None:
    """Call `rlhf run`; returns None, or the last line with an error of what it said when it failed."""
    environment = os.environ | {"PYTHONPATH": str(REPO), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [python, "-m", "pipeline", "run", config, *options]
    done = subprocess.run(command, env=environment, cwd=config.parent, capture_output=True, text=True)
    with (config.parent / "output.txt").open("a") as file:
        file.write(done.stdout + done.stderr)
    if done.returncode == 0:
        return None
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if "Error: " in line or "error: " in line or "stages." in line]
    words = (errors or lines)[-1].replace(f"{config.parent}/", "")
    return f"exit code {done.returncode}: {words}"


def _metrics(folder: Path) -> dict[str, dict[str, float]]:
    """Read the metrics of the run's finished stages."""
    manifest = folder / "run" / "manifest.json"
    if not manifest.exists():
        return {}
    stages = json.loads(manifest.read_text())["stages"]
    return {name: _numbers(record["metrics"]) for name, record in stages.items()}


def _numbers(node: object, name: str = "") -> dict[str, float]:
    """Return all numbers of nested metrics, by dotted names, but for times."""
    if isinstance(node, dict):
        children = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    else:
        is_number = isinstance(node, (int, float)) and not isinstance(node, bool)
        return {name: float(node)} if is_number and not any(part in name for part in TIMES) else {}
    numbers = {}
    for key, child in children:
        numbers |= _numbers(child, f"{name}.{key}".strip("."))
    return numbers


def cell(name: str, outcome: Outcome, pinned: Outcome) -> str:
    """Say what a stage did under a version, compared with the pinned one."""
    if name not in outcome.metrics:
        return "refused" if outcome.faults.get(name, "").startswith("exit code 2:") else "failed"
    if name not in pinned.metrics:
        return "runs"
    ours = outcome.metrics[name]
    theirs = pinned.metrics[name]
    differences = {key: abs(ours[key] - theirs[key]) for key in ours.keys() & theirs.keys()}
    words = "0"
    if any(differences.values()):
        largest = max(differences, key=lambda key: differences[key])
        words = f"{differences[largest]:.1e} ({largest})"
    lacking = sorted(theirs.keys() ^ ours.keys())
    return f"{words}; not in both: {', '.join(lacking)}" if lacking else words


def write_table(outcomes: dict[str, Outcome], place: Path) -> None:
    """Write the table of stages and versions, with the date and the other packages."""
    pinned = outcomes[PINNED]
    others = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in OTHERS)
    lines = [
        "# Versions of TRL",
        "",
        f"Written by `tests/benchmarks/trl_versions.py` on {datetime.date.today()}. Beside TRL: {others}.",
        "",
        f"Each cell is the largest difference of a metric from TRL {PINNED}, and the metric's name. 0: every metric is",
        "the same to the last digit.",
        "",
        f"| stage | {' | '.join(outcomes)} |",
        f"|---|{'---|' * len(outcomes)}",
    ]
    for name in TYPES:
        cells = [cell(name, outcome, pinned) for outcome in outcomes.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    faults: dict[str, list[str]] = {}
    for version, outcome in outcomes.items():
        for name, fault in outcome.faults.items():
            faults.setdefault(f"`{name}`: {fault}", []).append(version)
    if faults:
        lines += ["", "What the stages said that did not run:", ""]
        lines += [f"- {', '.join(versions)}: {fault}" for fault, versions in faults.items()]
    place.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for the environments and the runs")
    parser.add_argument("--versions", nargs="+", default=VERSIONS, help="of TRL; the pinned one always runs first")
    parser.add_argument("--table", type=Path, default=TABLE, help="the file to write")
    arguments = parser.parse_args()
    sys.path.insert(0, str(HERE.parent))
    outcomes: dict[str, Outcome] = {}
    for version in dict.fromkeys((PINNED, *arguments.versions)):
        python = make_environment(arguments.folder, version)
        outcomes[version] = run_chain(python, arguments.folder / "runs" / version)
        print(version, {name: cell(name, outcomes[version], outcomes[PINNED]) for name in TYPES}, flush=True)
        write_table(outcomes, arguments.table)
    print(arguments.table.read_text())


if __name__ == "__main__":
    main()
