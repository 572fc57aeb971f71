"""What people read of a run: the chain so far, the result, how to load an output. Nothing here imports torch."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.type_row import Makes
from pipeline.records import manifest
from pipeline.records.manifest import Manifest, Record
from pipeline.shift.estimate import Estimate, EstimateJson, estimate
from pipeline.show.loading_code import Loading, loading_code
from pipeline.show.notes import Scale, notes
from pipeline.show.progress import show_unfinished
from pipeline.show.screen import Table, say, show
from pipeline.show.tables import duration, number
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject
from pipeline.system.streams import printable

MEASURES = {"judge": "judge", "score": "reward model"}
# What people call a metric, where its name in the record says less.
_WORDS = {
    "eval_loss": "held-out loss",
    "eval_accuracy": "held-out accuracy",
    "mean_token_accuracy": "token accuracy",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "initial_kl": "first KL",
    "kl": "KL",
    "icc": "ICC",
    "within_sd": "within-prompt SD",
    "length_correlation": "score and length",
}


def _makes(record: Record) -> Makes:
    return STAGE_TYPES[record.type].makes


def headline(record: Record) -> str:
    """Show the metrics of a stage that people read first."""
    metrics = record.metrics
    if _makes(record) == "evaluation":
        compared = [name for name in metrics["policies"] if name not in ("base", metrics["baseline"])]
        return "\n".join(f"{name}: {_wins(metrics['policies'][name])}" for name in compared)
    if _makes(record) == "shift report":
        return ", ".join(f"{_WORDS[key]} {_figure(metrics[key])}" for key in ("icc", "within_sd", "length_correlation"))
    present = [key for key in STAGE_TYPES[record.type].headline if key in metrics]
    if metrics.get("held_out") is not None and "eval_accuracy" in present:
        # The trainer's is a mean of batches, whatever their sizes.
        metrics = metrics | {"eval_accuracy": metrics["held_out"]["accuracy"]["value"]}
    figures = ", ".join(f"{_WORDS.get(key, key.replace('_', ' '))} {number(metrics[key])}" for key in present)
    resumed = f" (resumed at step {record.resumed_from_step})" if record.resumed_from_step else ""
    return figures + resumed


def _figure(figure: EstimateJson | None) -> str:
    """Show a figure with its interval; `-` for what could not be measured."""
    return str(estimate(figure) or "-")


def win_rate(values: Sequence[float | None]) -> str:
    """Show a win rate, which the manifest holds as [rate, low, high], with null for NaN."""
    return str(Estimate(*(math.nan if value is None else value for value in values)))


def _wins(summary: JsonObject) -> str:
    """Show the win rate of a policy in an evaluation, by the judge where there is one."""
    measure = "judge" if "judge_win_rate" in summary else "score"
    if f"{measure}_win_rate" not in summary:
        return f"length {number(summary.get('length'), 1)}"
    return f"win rate {win_rate(summary[f'{measure}_win_rate'])}"


def result_table(finished: Manifest, console: Console) -> None:
    """Show the policies side by side, from the run's evaluate stages."""
    for name, record in finished.stages.items():
        if _makes(record) == "evaluation":
            show(policies(f"{finished.name}: {name}", record), console)
            for note in notes_of(finished, record):
                say(console, f"- {note}")


def policies(name: str, record: Record) -> Table:
    """Put the policies of an evaluation side by side; `name` begins the title."""
    baseline = record.metrics["baseline"]
    summaries = record.metrics["policies"]
    measures = _measures(record)
    prompts = f"{summaries[baseline]['prompts']} held-out prompts"
    title = f"{name} on {prompts}, win rates against {baseline} with 95 % intervals"
    scores = [column for label in measures.values() for column in (label, f"win rate ({label})")]
    table = Table(title, ["policy", *scores, "KL (nats)", "length", "ended"], right=True)
    for policy, summary in summaries.items():
        cells = [policy]
        for measure in measures:
            wins = summary.get(f"{measure}_win_rate")
            cells.append(number(summary.get(measure)))
            cells.append("-" if policy == baseline or wins is None else win_rate(wins))
        ended = summary.get("ended")
        share = number(None if ended is None else 100 * ended, 0)
        table.add(*cells, number(summary.get("kl"), 2), number(summary.get("length"), 1), f"{share} %")
    return table


def notes_of(finished: Manifest, record: Record) -> list[str]:
    """Return what is to say below the table of an evaluation of a run."""
    metrics = record.metrics
    measures = list(_measures(record).items())
    return list(notes(metrics["baseline"], metrics["policies"], measures, scale_of(finished, record)))


def scale_of(finished: Manifest, record: Record) -> Scale:
    """Return what the scores of an evaluation can be worth, as far as the run's records tell."""
    dtype = finished.model.get("dtype")
    reward = record.parents.get("reward", "")
    held_out = finished.stages[reward].metrics.get("held_out") if reward in finished.stages else None
    if held_out is None:
        return Scale(dtype)
    return Scale(dtype, reward, Estimate(**held_out["accuracy"]), held_out["count"])


def _measures(record: Record) -> dict[str, str]:
    """Return the scores that an evaluation has, with their labels."""
    scored = record.metrics["policies"][record.metrics["baseline"]]
    return {measure: label for measure, label in MEASURES.items() if measure in scored}


def shift_table(finished: Manifest, console: Console) -> None:
    """Show what the shift reports say of the reward models, in two lines each."""
    for name, record in finished.stages.items():
        if _makes(record) != "shift report":
            continue
        metrics = record.metrics
        comparisons = metrics["comparisons"]
        figures = {
            "ICC": metrics["icc"],
            "within-prompt SD": metrics["within_sd"],
            "score and length": metrics["length_correlation"],
            "accuracy": comparisons["accuracy"] if comparisons else None,
        }
        text = ", ".join(f"{label} {_figure(figure)}" for label, figure in figures.items())
        say(console, [(name, "bold"), (f": {text}", "")])
        where = f"(`rlhf shift` shows the report; plots are in {record.output.path})"
        say(console, f"{metrics['advice']} {where}")


def snippet(run_dir: Path, recorded: Manifest, record: Record) -> str:
    """Write the Python that loads a stage's output with transformers and peft alone."""
    folder = run_dir / record.output.path
    if record.output.kind == "report":
        figures = "table.json: the table"
        if _makes(record) == "shift report":
            figures = "report.json: the figures, *.png: plots"
        return f"# {folder}/samples.jsonl: all completions side by side; {folder}/{figures}"
    model = recorded.model
    loading = Loading(
        folder=str(folder),
        scores=_makes(record) == "reward model",
        trust_remote_code=model.get("trust_remote_code", False),
    )
    if record.output.kind == "full":
        return loading_code(loading)
    full = record.output.full
    on_base = full is None
    loading = dataclasses.replace(
        loading,
        dtype=model.get("dtype", "float32"),
        base=str(model.get("path") if full is None else run_dir / full),
        revision=(model.get("commit") or model.get("revision")) if on_base else None,
        quantization=model.get("quantization") if on_base else None,
    )
    return loading_code(loading)


def recorded_in(run_dir: Path) -> Manifest:
    """Read the manifest of a run folder that a user named.

    Raises:
        UserError: if there is none, or it is damaged.
    """
    recorded = manifest.read(run_dir)
    if recorded is None:
        expected = "expected a run folder, as `rlhf run` prints it at its end"
        raise UserError(f"{run_dir}: no {manifest.FILE} here; {expected}")
    return recorded


def status(run_dir: Path, console: Console) -> None:
    """Show how to load each output, then the chain so far (stage, parents, duration, headline metrics, output), the
    results, and what is left: what people read first comes last, where a terminal shows it.
    """
    recorded = manifest.read(run_dir)
    if recorded is None and show_unfinished(run_dir, {}, console):
        return
    recorded = recorded_in(run_dir)
    for name, record in recorded.stages.items():
        _show_output(run_dir, recorded, name, record, console)
    table = Table(f"{recorded.name}: {run_dir}", ("stage", "type", "from", "took", "metrics", "output"))
    for name, record in recorded.stages.items():
        parents = ", ".join(dict.fromkeys(record.parents.values())) or "-"
        source = parents if record.origin is None else str(record.origin)
        took = duration(record.duration)
        table.add(name, record.type, source, took, headline(record), record.output.path)
    show(table, console)
    shift_table(recorded, console)
    result_table(recorded, console)
    show_unfinished(run_dir, {name: record.started for name, record in recorded.stages.items()}, console)


def _show_output(run_dir: Path, recorded: Manifest, name: str, record: Record, console: Console) -> None:
    """Show how to load a stage's output, where it was taken from, and why it ran again."""
    say(console, name, "bold")
    if record.origin is not None:
        say(console, f"taken from {record.origin.stage} of the run {record.origin.name}, in {record.origin.path}")
    if record.reason not in (None, manifest.NOT_FINISHED):  # of a first run there is nothing to tell
        say(console, f"why it ran: {record.reason}")
    code = printable(snippet(run_dir, recorded, record), console.encoding)
    console.print(code, "", sep="\n", highlight=False, markup=False, emoji=False, soft_wrap=True)  # never wrapped
