"""Run folders for tests of the report, written by hand: records, a plan, attempts, completions."""

import json
from pathlib import Path
from typing import Any

from pipeline.records import manifest
from pipeline.records.last_run import FILE, Attempt, LastRun, Planned
from pipeline.records.manifest import Manifest, Output, Record
from pipeline.shift.advice import advice
from pipeline.shift.calibration import calibration
from pipeline.shift.measure import measure

EARLY, STARTED, LATE = (f"2026-01-0{day}T00:00:00+00:00" for day in (1, 2, 3))
PARENTS = {
    "sft": {},
    "reward": {"init": "sft"},
    "reward-shift": {"reward": "reward", "policy": "sft"},
    "ppo": {"init": "sft", "reward": "reward", "shift": "reward-shift"},
    "dpo": {"init": "sft"},
    "evaluate": {"reward": "reward", "baseline": "sft", "policies.ppo": "ppo", "policies.dpo": "dpo"},
}
TYPES = {"reward-shift": "shift"}
POLICIES = ("base", "sft", "ppo", "dpo")


def summary(**changes: Any) -> dict[str, Any]:
    """The figures of a policy that wins by judge and reward model."""
    wins = [0.7, 0.65, 0.75]
    figures = {"prompts": 4, "kl": 2.0, "length": 9.0, "ended": 1.0, "score": 0.5, "score_win_rate": wins}
    return figures | {"judge": 0.6, "judge_win_rate": wins} | changes


def metrics_of(name: str) -> dict[str, Any]:
    """Metrics of a stage in which no rule finds anything to mend."""
    if name == "sft":
        return {"loss": 1.0, "initial_eval_loss": 2.0, "eval_loss": 1.1, "first_token": first_token(0.0)}
    if name == "reward":
        return {"loss": 0.5, "accuracy": 0.8, "held_out": calibration([1.0, 2.0, 0.5, 1.5] * 24 + [-1.0] * 4)}
    if name == "reward-shift":
        texts = [f"Tell me about thing {number}." for number in range(12)]
        prompts = [{"prompt": text, "tokens": 3, "scores": [0.0, 2.0, 1.0], "lengths": [3, 3, 4]} for text in texts]
        report = measure(prompts, calibration([1.0, 2.0, 0.5, 1.5] * 24 + [-1.0] * 4))
        return dict(report) | {"advice": advice(report)}
    if name == "evaluate":
        even = [0.5, 0.5, 0.5]
        sft = summary(score_win_rate=even, judge_win_rate=even)
        return {"baseline": "sft", "policies": {policy: summary() for policy in POLICIES} | {"sft": sft}}
    return {"loss": 0.5, "alarms": []} if name == "ppo" else {"loss": 0.5}


def first_token(special: float) -> dict[str, Any]:
    return {"special": special, "prompts": 32, "likeliest": "<eos>"}


def record(name: str, **changes: Any) -> Record:
    """A finished stage of the chain, started early."""
    parents = {role: parent for role, parent in PARENTS[name].items() if role != "shift"}
    kind = "full" if name in ("sft", "reward", "ppo", "dpo") else "report"
    dataset = {"dataset": "rows", "split": "train", "read": 100, "rows": 100, "tokens": 900, "dropped": {}}
    fields = {
        "type": TYPES.get(name, name),
        "parents": parents,
        "metrics": metrics_of(name),
        "output": Output(kind=kind, path=f"{name}/output", files={}),
        "datasets": {"data": dataset | {"noticed": {}}},
        "started": EARLY,
        "config": {"seed": 0},
        "config_digest": "0",
        "inputs": {"data": "1"},
        "tokenizer": "2",
        "parameters": {"trainable": 1, "total": 2},
        "seed": 0,
        "versions": {"trl": "1.12.0"},
        "world_size": 1,
        "duration": 61.0,
    }
    return Record(**(fields | changes))


def write(
    folder: Path,
    records: dict[str, Record] | None = None,
    attempts: dict[str, Attempt] | None = None,
    reasons: dict[str, str] | None = None,
    overrides: tuple[str, ...] = (),
) -> Path:
    """Write a run folder; by default all stages are finished. `reasons`: why the last run was to run stages."""
    records = {name: record(name) for name in PARENTS} if records is None else records
    folder.mkdir(parents=True, exist_ok=True)
    if records:
        manifest.write(folder, Manifest(name="tiny", model={"path": "some/base"}, stages=records))
    stages = {}
    for name, parents in PARENTS.items():
        stages[name] = Planned(type=TYPES.get(name, name), parents=parents, reason=(reasons or {}).get(name))
    last = LastRun(
        started=STARTED,
        command=["rlhf", "run", "my config.yaml", *overrides],
        folder="/somewhere/a b",
        config="name: tiny\n",
        stages=stages,
        attempts=attempts or {},
    )
    (folder / FILE).write_text(last.model_dump_json())
    return folder


def write_samples(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the completions of the evaluation."""
    output = folder / "evaluate" / "output"
    output.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (output / "samples.jsonl").write_text(text, encoding="utf-8")


def sample(prompt: str, completions: dict[str, str], **figures: dict[str, float]) -> dict[str, Any]:
    """A prompt with a completion of each policy; `figures` gives some policies other ones."""
    row: dict[str, Any] = {"prompt": [{"role": "user", "content": prompt}]}
    for policy, text in completions.items():
        entry = {"completion": text, "score": 0.0, "judge": 0.5, "kl": 1.0, "length": 3, "ended": True}
        row[policy] = entry | figures.get(policy, {})
    return row
