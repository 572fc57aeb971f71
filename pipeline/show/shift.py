"""A stored shift report as people read it. Nothing here imports torch, scipy or matplotlib."""

from pathlib import Path
from typing import cast

from rich.console import Console

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.records.manifest import Record
from pipeline.shift.advice import advice
from pipeline.shift.estimate import Estimate, EstimateJson, estimate
from pipeline.shift.report import Extreme, Report
from pipeline.show.results import recorded_in
from pipeline.show.screen import Table, say, show
from pipeline.system.errors import UserError
from pipeline.system.streams import either

NUM_CHARACTERS = 60  # of a prompt among the extremes
Row = tuple[str, str, str]  # the name of a figure, its value, what it means


def _cell(figure: EstimateJson | None) -> str:
    return str(estimate(figure) or "-")


def _share(figure: EstimateJson | None) -> str:
    share = estimate(figure)
    return "-" if share is None else share.percent()


def figures(report: Report) -> list[Row]:
    """Return the figures of a report with their intervals and meanings."""
    quantiles = report["score_quantiles"]
    score = Estimate(quantiles["0.5"], low=quantiles["0.05"], high=quantiles["0.95"])
    return [
        ("ICC", _cell(report["icc"]), "share of variance between prompts, arbitrary"),
        ("between-prompt SD", _cell(report["between_sd"]), "log-odds, the prompt shift"),
        ("within-prompt SD", _cell(report["within_sd"]), "log-odds, the signal"),
        ("flat prompts", _share(report["flat_prompts"]), f"within-prompt SD below {report['flat_below']:g}"),
        ("score and length", _cell(report["length_correlation"]), "correlation within prompts"),
        ("offset and prompt length", _cell(report["offset_prompt_length"]), "correlation over prompts"),
        ("score", str(score), "log-odds, median and 5 to 95 % of completions"),
        *_comparisons(report),
    ]


def _comparisons(report: Report) -> list[Row]:
    comparisons = report["comparisons"]
    if not comparisons:
        return []
    loss = comparisons["loss"]
    quarters = ", ".join(f"{100 * part['accuracy']['value']:.0f}" for part in comparisons["accuracy_by_margin"])
    return [
        ("accuracy", _share(comparisons["accuracy"]), f"of {comparisons['count']} held-out comparisons, a tie half"),
        ("accuracy by margin", f"{quarters} %", "quarters of |margin|, from the smallest"),
        ("loss", "-" if loss is None else f"{loss:.2f}", "nats, 0.69 is chance"),
        ("calibration error", f"{comparisons['ece']:.2f}", "distance of promised and observed share"),
    ]


def table(report: Report, console: Console, title: str) -> None:
    """Show a report of `pipeline.shift.measure`: figures with 95 % intervals, extreme prompts, and the advice."""
    sizes = f"{report['prompts']} held-out prompts, {report['completions']} completions, 95 % intervals"
    rows = Table(f"{title}: {sizes}", ("figure", "value", "meaning"))
    for row in figures(report):
        rows.add(*row)
    show(rows, console)
    offsets = Table("Largest and smallest offsets, log-odds", ("prompt", "offset", "within-prompt SD"), right=True)
    for extreme in extremes(report):
        spread = extreme["within_sd"]
        text = _short(extreme["prompt"], console)
        offsets.add(text, f"{extreme['offset']:+.2f}", "-" if spread is None else f"{spread:.2f}")
    show(offsets, console)
    say(console, advice(report))


def extremes(report: Report) -> list[Extreme]:
    """Return the extreme prompts from the largest offset to the smallest, each once."""
    extremes = list(report["largest"])
    if report["prompts"] >= len(report["largest"]) + len(report["smallest"]):  # else both name the same prompts
        extremes += report["smallest"][::-1]
    return extremes


def _short(prompt: str, console: Console) -> str:
    text = " ".join(prompt.split())
    if len(text) <= NUM_CHARACTERS:
        return text
    end = either("…", "...", console.encoding)
    return text[: NUM_CHARACTERS - len(end)] + end


def reports(run_dir: Path, stage: str | None, console: Console) -> None:
    """Show the shift reports of a run folder, or the one of `stage`: a stage of type shift, or a reward model."""
    recorded = recorded_in(run_dir)
    finished: dict[str, Record] = {}
    for name, record in recorded.stages.items():
        if STAGE_TYPES[record.type].makes == "shift report":
            finished[name] = record
    chosen = {name: record for name, record in finished.items() if stage in (None, name, record.parents["reward"])}
    if not chosen:
        instead = f"it has {', '.join(finished)}" if finished else "a stage of type shift makes one"
        raise UserError(f"{run_dir}: no shift report{f' of {stage!r}' if stage else ''} here; {instead}")
    for name, record in chosen.items():
        title = f"{name}: scores of {record.parents['reward']}"
        table(cast(Report, record.metrics), console, title)
        say(console, f"Plots, completions and the figures as JSON are in {run_dir / record.output.path}")
