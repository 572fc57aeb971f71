"""A stored shift report as people read it. Nothing here imports torch, scipy or matplotlib."""

from pathlib import Path
from typing import Any

from rich.console import Console

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.shift.advice import advice
from pipeline.show.results import recorded_in
from pipeline.show.screen import Table, say, show
from pipeline.system.errors import UserError
from pipeline.system.streams import either

NUM_CHARACTERS = 60  # of a prompt among the extremes


def _cell(found: dict[str, float | None] | float | None, percent: bool = False) -> str:
    """value [low, high], as far as they are known."""
    if found is None:
        return "-"
    found = found if isinstance(found, dict) else {"value": found}
    texts = {k: f"{100 * v:.0f}" if percent else f"{v:.2f}" for k, v in found.items() if v is not None}
    unit = " %" if percent else ""
    interval = f" [{texts['low']}, {texts['high']}]" if "low" in texts else ""
    return texts["value"] + unit + interval


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    flat, quantiles = report["flat_below"], report["score_quantiles"]
    score = {"value": quantiles["0.5"], "low": quantiles["0.05"], "high": quantiles["0.95"]}
    rows = [
        ("ICC", _cell(report["icc"]), "share of variance between prompts, arbitrary"),
        ("between-prompt SD", _cell(report["between_sd"]), "log-odds, the prompt shift"),
        ("within-prompt SD", _cell(report["within_sd"]), "log-odds, the signal"),
        ("flat prompts", _cell(report["flat_prompts"], True), f"within-prompt SD below {flat:g}"),
        ("score and length", _cell(report["length_correlation"]), "correlation within prompts"),
        ("offset and prompt length", _cell(report["offset_prompt_length"]), "correlation over prompts"),
        ("score", _cell(score), "log-odds, median and 5 to 95 % of completions"),
    ]
    if found := report["comparisons"]:
        quarters = ", ".join(f"{100 * part['accuracy']['value']:.0f}" for part in found["accuracy_by_margin"])
        rows += [
            ("accuracy", _cell(found["accuracy"], True), f"of {found['count']} held-out comparisons, a tie half"),
            ("accuracy by margin", f"{quarters} %", "quarters of |margin|, from the smallest"),
            ("loss", _cell(found["loss"]), "nats, 0.69 is chance"),
            ("calibration error", _cell(found["ece"]), "distance of promised and observed share"),
        ]
    return rows


def table(report: dict[str, Any], console: Console, title: str) -> None:
    """A report of `pipeline.shift.measure`: its figures with 95 % intervals, its extreme prompts, and the advice."""
    sizes = f"{report['prompts']} held-out prompts, {report['completions']} completions, 95 % intervals"
    shown = Table(f"{title}: {sizes}", ("figure", "value", "meaning"))
    for row in _rows(report):
        shown.add(*row)
    show(shown, console)
    shown = Table("Largest and smallest offsets, log-odds", ("prompt", "offset", "within-prompt SD"), right=True)
    entries = list(report["largest"])
    if report["prompts"] >= len(report["largest"]) + len(report["smallest"]):  # else both name the same prompts
        entries += report["smallest"][::-1]
    end = either("…", "...", console.encoding)
    for entry in entries:
        text = " ".join(entry["prompt"].split())
        if len(text) > NUM_CHARACTERS:
            text = text[: NUM_CHARACTERS - len(end)] + end
        shown.add(text, f"{entry['offset']:+.2f}", _cell(entry["within_sd"]))
    show(shown, console)
    say(console, advice(report))


def reports(run_dir: Path, stage: str | None, console: Console) -> None:
    """The full shift reports of a run folder, or the one of `stage`: a stage of type shift, or a reward model."""
    recorded = recorded_in(run_dir)
    found = {
        name: record for name, record in recorded.stages.items() if STAGE_TYPES[record.type].makes == "shift report"
    }
    chosen = {name: record for name, record in found.items() if stage in (None, name, record.parents["reward"])}
    if not chosen:
        seen = f"it has {', '.join(found)}" if found else "a stage of type shift makes one"
        raise UserError(f"{run_dir}: no shift report{f' of {stage!r}' if stage else ''} here; {seen}")
    for name, record in chosen.items():
        title = f"{name}: scores of {record.parents['reward']}"
        table(record.metrics, console, title)
        say(console, f"Plots, completions and the figures as JSON are in {run_dir / record.output.path}")
