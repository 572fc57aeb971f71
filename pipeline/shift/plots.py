"""Pictures of a shift report, as PNG files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.shift.estimate import EstimateJson, estimate
from pipeline.shift.report import Comparisons, Report, Scored
from pipeline.shift.variance import deviations

# Colours that people with any colour vision tell apart. Source: Okabe & Ito (2008).
POINT = "#0072B2"
BETWEEN = "#E69F00"
WITHIN = "#D55E00"


def draw(report: Report, prompts: Sequence[Scored], folder: Path) -> list[Path]:
    """Write offsets.png, length.png and, where the report has comparisons, reliability.png; return their paths.

    `report` is that of `pipeline.shift.measure` on the same prompts. The first two show prompts with several
    completions.
    """
    several = [prompt for prompt in prompts if len(prompt["scores"]) > 1]
    figures = {"offsets": _offsets(report, prompts), "length": _length(report, several)}
    if report["comparisons"] is not None:
        figures["reliability"] = _reliability(report["comparisons"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in figures]
    for path, figure in zip(paths, figures.values(), strict=True):
        figure.savefig(path, dpi=120)
    return paths


def _figure(height: float = 4.8) -> Figure:
    return Figure(figsize=(7, height), layout="constrained")


def _words(figure: EstimateJson | None) -> str:
    """Show an estimate in a legend."""
    return str(estimate(figure) or "unknown")


def _offsets(report: Report, prompts: Sequence[Scored]) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    means = np.array([np.mean(prompt["scores"]) for prompt in prompts])
    offsets = []
    spreads = []
    for offset, prompt in zip(means - means.mean(), prompts, strict=True):
        if len(prompt["scores"]) > 1:
            offsets.append(offset)
            spreads.append(np.std(prompt["scores"], ddof=1))
    axes.scatter(offsets, spreads, s=18, color=POINT, alpha=0.6, linewidths=0)
    between = report["between_sd"]
    if between is not None:
        label = f"± between-prompt SD {_words(between)}"
        axes.axvspan(-between["value"], between["value"], color=BETWEEN, alpha=0.2, linewidth=0, zorder=0, label=label)
    within = report["within_sd"]
    if within is not None:
        axes.axhline(within["value"], color=WITHIN, label=f"within-prompt SD {_words(within)}")
    flat = f"flat: below {report['flat_below']:g}"
    axes.axhline(report["flat_below"], color="grey", linestyle=":", label=flat)
    axes.set_ylim(bottom=0)
    axes.set_title(f"Prompt shift: one point per prompt, ICC {_words(report['icc'])}")
    axes.set_xlabel("prompt's mean score less that of all prompts (log-odds)")
    axes.set_ylabel("SD of scores within the prompt (log-odds)")
    figure.legend(loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    return figure


def _length(report: Report, prompts: Sequence[Scored]) -> Figure:
    figure = _figure()
    axes = figure.subplots()
    # Where no prompt has several completions, there is nothing to concatenate and the picture stays empty.
    lengths = np.concatenate([deviations(prompt["lengths"]) for prompt in prompts] or [np.zeros(0)])
    scores = np.concatenate([deviations(prompt["scores"]) for prompt in prompts] or [np.zeros(0)])
    axes.scatter(lengths, scores, s=14, color=POINT, alpha=0.5, linewidths=0)
    if report["length_correlation"] is not None:
        ends = np.array([lengths.min(), lengths.max()])
        slope = (lengths @ scores) / (lengths @ lengths)
        axes.plot(ends, slope * ends, color=WITHIN, label=f"{slope:+.2g} log-odds per token")
        axes.legend(frameon=False, fontsize="small")
    axes.set_title(f"Score and length within prompts: r = {_words(report['length_correlation'])}")
    axes.set_xlabel("completion's length less the prompt's mean (tokens)")
    axes.set_ylabel("score less the prompt's mean (log-odds)")
    return figure


def _reliability(comparisons: Comparisons) -> Figure:
    figure = _figure(6)
    axes, counts = figure.subplots(2, sharex=True, height_ratios=(4, 1))
    _shares(axes, comparisons)
    _counts(counts, comparisons)
    return figure


def _shares(axes: Axes, comparisons: Comparisons) -> None:
    """Draw what margins promise against what labels hold."""
    bins = comparisons["reliability"]
    predicted = [b["predicted"] for b in bins]
    values = np.array([b["observed"]["value"] for b in bins])
    lows = np.array([b["observed"]["low"] for b in bins], float)
    highs = np.array([b["observed"]["high"] for b in bins], float)
    lengths = [np.abs(lows - values), np.abs(highs - values)]  # of the bars below and above a point
    axes.plot((0.5, 1), (0.5, 1), color="grey", linestyle=":", label="calibrated")
    axes.errorbar(predicted, values, lengths, fmt="o-", color=POINT, capsize=3, label="observed, 95 % interval")
    axes.set_ylim(min([0.45, *(lows - 0.05)]), 1.02)
    title = f"{comparisons['count']} held-out comparisons, calibration error {comparisons['ece']:.2f}"
    axes.set_title(f"Reliability: {title}")
    axes.set_ylabel("share whose preferred side was chosen")
    axes.legend(frameon=False)


def _counts(axes: Axes, comparisons: Comparisons) -> None:
    """Draw how many comparisons stand behind each share."""
    bins = comparisons["reliability"]
    starts = [b["low"] for b in bins]
    sizes = [b["count"] for b in bins]
    width = bins[0]["high"] - bins[0]["low"]
    bars = axes.bar(starts, sizes, width, align="edge", color=POINT, alpha=0.4, edgecolor="white")
    axes.bar_label(bars, fontsize="small", padding=1)
    axes.set_yticks([])
    axes.margins(y=0.3)
    axes.set_xlim(0.48, 1.02)
    axes.set_xlabel("promised share, sigma(|margin|)")
    axes.set_ylabel("comparisons")
