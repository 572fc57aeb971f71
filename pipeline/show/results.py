"""What people read of a run: the chain so far, the result, how to load an output. Nothing here imports torch."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.config.type_row import Makes
from pipeline.records import manifest
from pipeline.records.manifest import Manifest, Record
from pipeline.shift.estimate import Estimate, EstimateJson, estimate
from pipeline.show.progress import show_unfinished
from pipeline.show.screen import Table, say, show
from pipeline.show.tables import duration, number
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject
from pipeline.system.streams import printable

MEASURES = {"judge": "judge", "score": "reward model"}


def _makes(record: Record) -> Makes:
    return STAGE_TYPES[record.type].makes


def _headline(record: Record) -> str:
    """Show the metrics of a stage that people read first."""
    metrics = record.metrics
    if _makes(record) == "evaluation":
        compared = [name for name in metrics["policies"] if name not in ("base", metrics["baseline"])]
        return "\n".join(f"{name}: {_wins(metrics['policies'][name])}" for name in compared)
    if _makes(record) == "shift report":
        return ", ".join(f"{key} {_figure(metrics[key])}" for key in ("icc", "within_sd", "length_correlation"))
    present = [key for key in STAGE_TYPES[record.type].headline if key in metrics]
    figures = ", ".join(f"{key.replace('_', ' ')} {number(metrics[key])}" for key in present)
    resumed = f" (resumed at step {record.resumed_from_step})" if record.resumed_from_step else ""
    return figures + resumed


def _figure(figure: EstimateJson | None) -> str:
    """Show a figure with its interval; `-` for what could not be measured."""
    return str(estimate(figure) or "-")


def _win_rate(values: Sequence[float | None]) -> str:
    """Show a win rate, which the manifest holds as [rate, low, high], with null for NaN."""
    return str(Estimate(*(math.nan if value is None else value for value in values)))


def _wins(summary: JsonObject) -> str:
    """Show the win rate of a policy in an evaluation, by the judge where there is one."""
    measure = "judge" if "judge_win_rate" in summary else "score"
    if f"{measure}_win_rate" not in summary:
        return f"length {number(summary.get('length'), 1)}"
    return f"win rate {_win_rate(summary[f'{measure}_win_rate'])}"


def result_table(finished: Manifest, console: Console) -> None:
    """Show the policies side by side, from the run's evaluate stages."""
    for name, record in finished.stages.items():
        if _makes(record) != "evaluation":
            continue
        baseline = record.metrics["baseline"]
        policies = record.metrics["policies"]
        measures = {measure: label for measure, label in MEASURES.items() if measure in policies[baseline]}
        prompts = f"{policies[baseline]['prompts']} held-out prompts"
        title = f"{finished.name}: {name} on {prompts}, win rates against {baseline} with 95 % intervals"
        scores = [column for label in measures.values() for column in (label, f"win rate ({label})")]
        table = Table(title, ["policy", *scores, "KL (nats)", "length", "ended"], right=True)
        for policy, summary in policies.items():
            cells = [policy]
            for measure in measures:
                wins = summary.get(f"{measure}_win_rate")
                cells.append(number(summary.get(measure)))
                cells.append("-" if policy == baseline or wins is None else _win_rate(wins))
            ended = summary.get("ended")
            share = number(None if ended is None else 100 * ended, 0)
            table.add(*cells, number(summary.get("kl"), 2), number(summary.get("length"), 1), f"{share} %")
        show(table, console)


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
    scores = _makes(record) == "reward model"
    model = recorded.model
    dtype = model.get("dtype", "float32")
    auto = "AutoModelForCausalLM"
    padding = ""
    options = ""
    if scores:
        auto = "AutoModelForSequenceClassification"
        padding = ', padding_side="right"'
        options = ", num_labels=1"
    if model.get("trust_remote_code"):
        options += ", trust_remote_code=True"
    lines = [f"from transformers import AutoTokenizer, {auto}"]
    lines.append(f"tokenizer = AutoTokenizer.from_pretrained({_quoted(folder)}{padding})")
    if record.output.kind == "full":
        return "\n".join([*lines, f"model = {auto}.from_pretrained({_quoted(folder)}{options})"])
    full = record.output.full
    base = model.get("path") if full is None else run_dir / full
    revision = model.get("commit") or model.get("revision")
    if full is None and revision:
        options += f", revision={_quoted(revision)}"
    if full is None and model.get("quantization"):
        lines[0] += ", BitsAndBytesConfig"
        options += f", quantization_config=BitsAndBytesConfig(**{model['quantization']})"
    lines.insert(1, "from peft import PeftModel")
    lines.append(f'base = {auto}.from_pretrained({_quoted(base)}, dtype="{dtype}"{options})')
    if scores:  # a score is read at the last token that is not pad, and the base may have another pad token, or none
        lines.append("base.config.pad_token_id = tokenizer.pad_token_id")
    if scores and dtype != "float32":  # as the run computes it
        lines.append("base.score.float().register_forward_pre_hook(lambda head, hidden: hidden[0].float())")
    return "\n".join([*lines, f"model = PeftModel.from_pretrained(base, {_quoted(folder)})"])


def _quoted(value: str | Path | None) -> str:
    """Write a path or name as a Python string, whatever characters it has: JSON's strings are Python's too."""
    return json.dumps(str(value), ensure_ascii=False)


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
    """Show the chain so far: stage, parents, duration, headline metrics, output, how to load it; then what is left."""
    recorded = manifest.read(run_dir)
    if recorded is None and show_unfinished(run_dir, (), console):
        return
    recorded = recorded_in(run_dir)
    table = Table(f"{recorded.name}: {run_dir}", ("stage", "type", "from", "took", "metrics", "output"))
    for name, record in recorded.stages.items():
        parents = ", ".join(dict.fromkeys(record.parents.values())) or "-"
        took = duration(record.duration)
        table.add(name, record.type, parents, took, _headline(record), record.output.path)
    show(table, console)
    shift_table(recorded, console)
    result_table(recorded, console)
    for name, record in recorded.stages.items():
        say(console, f"\n{name}", "bold")
        if record.reason not in (None, manifest.NOT_FINISHED):  # of a first run there is nothing to tell
            say(console, f"why it ran: {record.reason}")
        code = printable(snippet(run_dir, recorded, record), console.encoding)
        console.print(code, highlight=False, markup=False, emoji=False, soft_wrap=True)  # to be copied: never wrapped
    show_unfinished(run_dir, recorded.stages, console)
