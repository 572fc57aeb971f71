"""Labels without training: a run folder with a record, pairs written by hand, and the real command at work on them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import tiny

from pipeline.label import folder, pairs, run
from pipeline.label.pairs import Completion, Pair
from pipeline.records import manifest
from pipeline.records.manifest import Manifest


def made(number: int, **scores: float) -> list[Pair]:
    """Pairs of the policies a and b, whose second completion is longer in every other one."""
    found = []
    for i in range(number):
        texts = (f"answer {i}", f"another {'long ' * (i % 2)}")
        first, second = (
            Completion(policy, text, 3, True, scores.get(policy, float(i % 3)))
            for policy, text in zip(("a", "b"), texts, strict=True)
        )
        found.append(Pair([{"role": "user", "content": f"prompt {i}"}], (first, second)))
    return found


def write(place: Path, sampled: list[Pair], twice: float) -> tuple[Path, Path]:
    """Write a run folder and labels of its policy, begun and not answered; returns both."""
    run_dir = place / "run"
    labels = place / "ann"
    record = tiny.make_record()
    manifest.write(run_dir, Manifest(name="tiny", stages={"sft": record}))
    labels.mkdir()
    settings = {
        "policies": ["sft"],
        "prompts": "demos",
        "pairs": len(sampled),
        "order": "random",
        "twice": twice,
        "temperature": 1.0,
        "max_new_tokens": 8,
        "seed": 0,
        "by": "ann",
        "judge": None,
    }
    about = {"settings": settings, "policies": [{"stage": "sft", "identity": run.identity_of(record)}]}
    folder.begin(labels, about, pairs.arranged(sampled, twice, 0))
    return run_dir, labels


def rows_of(place: Path) -> list[dict]:
    return [json.loads(line) for line in (place / folder.COMPARISONS).read_text().split("\n") if line]


def about(place: Path) -> dict:
    return json.loads((place / folder.FILE).read_text())


def start(run_dir: Path, cwd: Path, *options: object) -> tuple[subprocess.Popen, int, str]:
    """The real command at work: its process, its port and the secret path."""
    words = [sys.executable, "-m", "pipeline", "label", run_dir, *options]
    process = subprocess.Popen(list(map(str, words)), cwd=cwd, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if match := re.fullmatch(r"http://127\.0\.0\.1:(\d+)(/.*/)", line.strip()):
            return process, int(match[1]), match[2]
    raise AssertionError(f"no address was shown; exit code {process.wait()}")
