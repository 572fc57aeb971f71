"""The figure and the table of tests/benchmarks/shift.py's results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from scipy import stats

MEASURE = "judge_win_rate"  # value, low and high of a policy's win rate against SFT


def mean_and_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean over seeds with its 95 % t-interval; one seed has none."""
    mean = float(np.mean(values))
    if len(values) < 2 or np.ptp(values) == 0:
        return mean, mean, mean
    low, high = stats.t.interval(0.95, len(values) - 1, mean, stats.sem(values))
    return mean, float(low), float(high)


def report(results: list[dict[str, Any]], figure: Path, shifts: dict[str, str], labels: dict[str, str]) -> None:
    """Print the table as markdown, and draw the figure. `shifts` and `labels` name the shifts and the methods."""
    cells: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in results:
        cells.setdefault((line["method"], line["shift"]), []).append(line)
    columns = ["method", "shift", "win rate against SFT", "of its rate without shift", "seeds better than SFT"]
    columns += ["KL (nats)", "explained variance, first and last update"]
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns))
    for method, label in labels.items():
        for shift, shown in shifts.items():
            if lines := cells.get((method, shift)):
                without = cells.get((method, "none"), lines)
                row = [label, shown, *_figures(lines, without)]
                print(f"| {' | '.join(row)} |")
    _draw(cells, figure, shifts, labels)


def _figures(lines: list[dict[str, Any]], without: list[dict[str, Any]]) -> list[str]:
    """What the table says of one method and shift, from a result per seed."""
    mean, low, high = mean_and_interval([line[MEASURE][0] for line in lines])
    start = np.mean([line[MEASURE][0] for line in without])
    better = sum(line[MEASURE][1] > 0.5 for line in lines)
    kl = np.mean([line["kl"] for line in lines])
    explained = [line["explained_variance"] for line in lines if line["explained_variance"]]
    first_and_last = (
        " to ".join(f"{value.round(2) + 0:.2f}" for value in np.mean(explained, axis=0)) if explained else "-"
    )
    return [
        f"{mean:.2f} [{low:.2f}, {high:.2f}]",
        f"{mean / start:.0%}",
        f"{better} of {len(lines)}",
        f"{kl:.1f}",
        first_and_last,
    ]


def _draw(cells: dict[Any, list[Any]], path: Path, shifts: dict[str, str], labels: dict[str, str]) -> None:
    drawn = Figure(figsize=(9, 4.5), layout="constrained")
    axes = drawn.add_subplot()
    axes.axhline(0.5, color="grey", linestyle=":", label="SFT")
    for number, (method, label) in enumerate(labels.items()):
        there = [shift for shift in shifts if (method, shift) in cells]
        found = np.array([mean_and_interval([line[MEASURE][0] for line in cells[method, s]]) for s in there])
        if not there:
            continue
        places = np.array([list(shifts).index(shift) for shift in there]) + 0.08 * (number - 1.5)
        ends = [found[:, 0] - found[:, 1], found[:, 2] - found[:, 0]]
        axes.errorbar(places, found[:, 0], yerr=ends, marker="o", capsize=3, linestyle="none", label=label)
    names = {"none": "no shift", "added": "10 SD added to the score", "inside": "10 SD inside the reward model"}
    axes.set_xticks(range(len(shifts)), [names[shift] for shift in shifts])
    axes.set_ylabel("win rate against SFT (judge)")
    axes.set_title("RL on a score shifted per prompt: mean over seeds, 95 % interval")
    axes.set_ylim(0, 1)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    drawn.savefig(path, dpi=130)
