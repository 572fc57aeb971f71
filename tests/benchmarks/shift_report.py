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


def report(results: list[dict[str, Any]], figure: Path, shifts: Sequence[int], labels: dict[str, str]) -> None:
    """Print the table as markdown, and draw the figure."""
    cells = {(line["method"], line["shift"]): [] for line in results}
    for line in results:
        cells[line["method"], line["shift"]].append(line)
    print(
        "| method | shift (SD) | win rate against SFT | of its rate without shift | seeds better than SFT | KL (nats) |"
    )
    print("|---|---|---|---|---|---|")
    for method, label in labels.items():
        for shift in shifts:
            lines = cells.get((method, shift), [])
            if not lines:
                continue
            mean, low, high = mean_and_interval([line[MEASURE][0] for line in lines])
            start = np.mean([line[MEASURE][0] for line in cells.get((method, 0), lines)])
            better = sum(line[MEASURE][1] > 0.5 for line in lines)
            kl = np.mean([line["kl"] for line in lines])
            size = "-" if method == "dpo" else f"{shift}"
            print(
                f"| {label} | {size} | {mean:.2f} [{low:.2f}, {high:.2f}] | {mean / start:.0%} "
                f"| {better} of {len(lines)} | {kl:.1f} |"
            )
    _draw(cells, figure, shifts, labels)


def _draw(cells: dict[Any, list[Any]], path: Path, shifts: Sequence[int], labels: dict[str, str]) -> None:
    drawn = Figure(figsize=(9, 4.5), layout="constrained")
    axes = drawn.add_subplot()
    axes.axhline(0.5, color="grey", linestyle=":", label="SFT")
    for number, (method, label) in enumerate(labels.items()):
        there = [shift for shift in shifts if (method, shift) in cells]
        found = np.array([mean_and_interval([line[MEASURE][0] for line in cells[method, s]]) for s in there])
        if not there:
            continue
        if method == "dpo":
            axes.axhline(found[0, 0], color="black", linestyle="--", label=f"{label} (sees no score)")
            continue
        places = np.array([shifts.index(shift) for shift in there]) + 0.06 * (number - 2)
        ends = [found[:, 0] - found[:, 1], found[:, 2] - found[:, 0]]
        axes.errorbar(places, found[:, 0], yerr=ends, marker="o", capsize=3, label=label)
    axes.set_xticks(range(len(shifts)), [str(shift) for shift in shifts])
    axes.set_xlabel("SD of the offset added per prompt, in within-prompt SDs of the score")
    axes.set_ylabel("win rate against SFT (judge)")
    axes.set_title("RL on a shifted score: mean over seeds, 95 % interval")
    axes.set_ylim(0, 1)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    drawn.savefig(path, dpi=130)
