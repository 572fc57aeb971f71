"""Pictures of a shift report, as PNG files."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipeline.shift.measure import Scored
from pipeline.shift.variance import deviations

# Colours that people with any colour vision tell apart. Source: Okabe & Ito (2008).
POINT, BETWEEN, WITHIN = "#0072B2", "#E69F00", "#D55E00"


def draw(
    report: dict[str, Any], prompts: Sequence[Scored], margins: Sequence[float] | None, folder: Path
) -> list[Path]:
    """Write offsets.png, length.png and, with margins, reliability.png into a folder; return their paths.

    `report` is that of `pipeline.shift.measure` on the same prompts and margins. The first two show prompts with
    several completions.
    """
    several = [prompt for prompt in prompts if len(prompt["scores"]) > 1]
    figures = {"offsets": _offsets(report, prompts), "length": _length(report, several)}
    if margins is not None and len(margins):
        figures["reliability"] = _reliability(report["comparisons"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=120)
    return paths


def _figure(height: float = 4.8) -> Figure:
    return Figure(figsize=(7, height), layout="constrained")


def _known(found: dict[str, float | None] | None) -> str:
    """An estimate in a legend."""
    if found is None:
        return "unknown"
    return f"{found['value']:.2f}" + ("" if found["low"] is None else f" [{found['low']:.2f}, {found['high']:.2f}]")


def _offsets(report: dict[str, Any], prompts: Sequence[Scored]) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    means = np.array([np.mean(prompt["scores"]) for prompt in prompts])
    points = [
        (offset, np.std(prompt["scores"], ddof=1))
        for offset, prompt in zip(means - means.mean(), prompts, strict=True)
        if len(prompt["scores"]) > 1
    ]
    axes.scatter(*zip(*points, strict=True) if points else ((), ()), s=18, color=POINT, alpha=0.6, linewidths=0)
    if (between := report["between_sd"]) is not None:
        label = f"± between-prompt SD {_known(between)}"
        axes.axvspan(-between["value"], between["value"], color=BETWEEN, alpha=0.2, linewidth=0, zorder=0, label=label)
    if (within := report["within_sd"]) is not None:
        axes.axhline(within["value"], color=WITHIN, label=f"within-prompt SD {_known(within)}")
    flat = f"flat: below {report['flat_below']:g}"
    axes.axhline(report["flat_below"], color="grey", linestyle=":", label=flat)
    axes.set_ylim(bottom=0)
    axes.set_title(f"Prompt shift: one point per prompt, ICC {_known(report['icc'])}")
    axes.set_xlabel("prompt's mean score less that of all prompts (log-odds)")
    axes.set_ylabel("SD of scores within the prompt (log-odds)")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def _length(report: dict[str, Any], prompts: Sequence[Scored]) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    lengths, scores = (
        np.concatenate([deviations(prompt[key]) for prompt in prompts] or [np.zeros(0)])
        for key in ("lengths", "scores")
    )
    axes.scatter(lengths, scores, s=14, color=POINT, alpha=0.5, linewidths=0)
    if report["length_correlation"] is not None:
        ends, slope = np.array([lengths.min(), lengths.max()]), (lengths @ scores) / (lengths @ lengths)
        axes.plot(ends, slope * ends, color=WITHIN, label=f"{slope:+.2g} log-odds per token")
        axes.legend(frameon=False, fontsize="small")
    axes.set_title(f"Score and length within prompts: r = {_known(report['length_correlation'])}")
    axes.set_xlabel("completion's length less the prompt's mean (tokens)")
    axes.set_ylabel("score less the prompt's mean (log-odds)")
    return figure


def _reliability(found: dict[str, Any]) -> Figure:
    figure = _figure(6)
    axes, counts = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    bins = found["reliability"]
    predicted, observed = [b["predicted"] for b in bins], [b["observed"] for b in bins]
    ends = [[abs(o[end] - o["value"]) for o in observed] for end in ("low", "high")]
    axes.plot((0.5, 1), (0.5, 1), color="grey", linestyle=":", label="calibrated")
    values = [o["value"] for o in observed]
    axes.errorbar(predicted, values, ends, fmt="o-", color=POINT, capsize=3, label="observed, 95 % interval")
    axes.set_ylim(min([0.45, *(o["low"] - 0.05 for o in observed)]), 1.02)
    axes.set_title(f"Reliability: {found['count']} held-out comparisons, calibration error {found['ece']:.2f}")
    axes.set_ylabel("share whose preferred side was chosen")
    axes.legend(frameon=False)
    starts, sizes = [b["low"] for b in bins], [b["count"] for b in bins]
    width = bins[0]["high"] - bins[0]["low"]
    bars = counts.bar(starts, sizes, width, align="edge", color=POINT, alpha=0.4, edgecolor="white")
    counts.bar_label(bars, fontsize="small", padding=1)
    counts.set_yticks([])
    counts.margins(y=0.3)
    counts.set_xlim(0.48, 1.02)
    counts.set_xlabel("promised share, sigma(|margin|)")
    counts.set_ylabel("comparisons")
    return figure
