"""Write the model card of an export from the manifest: what it is, what it was made from, how good it is, how to load.

All names and values of a user are escaped: a card is rendered on pages of others.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from pipeline import __version__
from pipeline.config.stage_types import STAGE_TYPES
from pipeline.export import limits, snippets
from pipeline.export.ancestors import lineage
from pipeline.export.job import Job
from pipeline.export.source import Source
from pipeline.shift.estimate import estimate
from pipeline.show.results import MEASURES, headline, notes_of, win_rate
from pipeline.show.tables import duration, number
from pipeline.system.json_object import JsonObject

_FORMS = {
    "adapter": "a LoRA adapter, as it was trained",
    "merged": "whole weights",
    "gguf": "one GGUF file of whole weights, with its tokenizer and chat template",
}


def write(source: Source, job: Job, target: Path, figures: JsonObject, about: JsonObject) -> str:
    """Return the card as Markdown. `target` is the export's folder, of which the code on the card says the name."""
    sections = [
        _head(source, job),
        _use(job, target.name),
        _comparison(job, figures, about),
        _lineage(source),
        _results(source),
        _shift(source),
        _limits(source, job),
        _settings(source),
    ]
    return "\n".join(filter(None, sections))


def cell(value: object) -> str:
    """Return a value as one line of text for a table or a sentence, with what Markdown and HTML would read escaped."""
    text = " ".join(str(value).split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#])", r"\\\1", text)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    lines += [" | ".join(cell(value) for value in row) for row in rows]
    return "\n".join(f"| {line} |" for line in lines) + "\n"


def _base(source: Source) -> str | None:
    """Return the base model as others know it: its hub id, or the name of its folder; None for a model from scratch."""
    path = source.recorded.model.get("path")
    if not path:
        return None
    return Path(path).name if Path(path).is_absolute() else path


def _head(source: Source, job: Job) -> str:
    record = source.record
    path = source.recorded.model.get("path")
    on_hub = bool(path) and not Path(path).is_absolute()
    tags = ["rlhf-pipeline", record.type, "reward-model" if job.scores else "text-generation"]
    library = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}[job.form]
    data = ModelCardData(
        base_model=path if on_hub else None,
        library_name=library,
        pipeline_tag="text-classification" if job.scores else "text-generation",
        tags=list(dict.fromkeys(tags)),
    )
    base = _base(source)
    made = f"made from {cell(base)}" if base else "made from scratch"
    kind = "A reward model" if job.scores else "A language model"
    weights = "" if job.form == "adapter" else f" in {job.dtype}"
    sentence = f"{kind} {made}, by the stage {cell(job.stage)} of the run {cell(source.recorded.name)}. This is "
    return (
        f"---\n{data.to_yaml()}\n---\n\n# {cell(source.recorded.name)}: {cell(job.stage)}\n\n"
        f"{sentence}{_FORMS[job.form]}{weights}.\n"
    )


def _use(job: Job, folder: str) -> str:
    name = f"Here `{folder}` is this folder; put its place there, or its id on the hub."
    lines = ["## Use", "", "```python", snippets.code(job, folder), "```", "", name, ""]
    if job.form == "adapter" and Path(job.full).is_absolute():
        lines += ["The base is a folder of the machine that it was made on. Elsewhere, put its place there.", ""]
    if job.form == "gguf":
        lines += [f"Or with llama.cpp: `llama-cli -m {folder}/{job.file}`.", ""]
    return "\n".join(lines)


def _comparison(job: Job, figures: JsonObject, about: JsonObject) -> str:
    """Say how far the files are from the stage, with the limits."""
    unit = "rows" if job.scores else "positions"
    columns = [("computed in float32", figures["exact"], limits.LIMITS[job.dtype])]
    if "as_used" in figures:
        columns.append(("as used", figures["as_used"], limits.AS_USED))
    rows = []
    for key, label in limits.NAMES.items():
        if key not in figures["exact"]:
            continue
        row = [label]
        for _, values, limit in columns:
            row += [f"{values[key]:.3g}", limits.in_words(limit, key)]
        rows.append(row)
    head = ["", *(name for label, _, _ in columns for name in (label, "limit"))]
    text = f"It was read back in a new process and compared with the stage on {figures['exact'][unit]} {unit}: "
    lines = ["## Compared with the trained model", "", f"{text}{cell(about['origin'])}.", "", _table(head, rows)]
    if about["effect"] is not None:
        lines += [
            f"For scale: the adapter itself moves log-probabilities by {about['effect']:.3g} nats on average.",
            "",
        ]
    if job.scores:
        lines += [f"The SD of the scores is {figures['exact']['sd']:.3g} log-odds.", ""]
    return "\n".join(lines)


def _lineage(source: Source) -> str:
    stages = []
    datasets = []
    for name, ancestor in lineage(source).items():
        record = ancestor.record
        stages.append((name, record.type, ancestor.made_from, headline(record), duration(record.duration)))
        own = record.datasets if record.origin is None else {}  # those of a stage that was taken are told above it
        for role, data in own.items():
            used = data.get("used", data.get("rows", "-"))
            datasets.append((name, role, data.get("dataset", "-"), used, str(data.get("fingerprint", "-"))[:16]))
    model = source.recorded.model
    base = _base(source)
    commit = model.get("commit") or model.get("revision")
    what = f"base model {cell(base)}{f', commit {cell(commit)}' if commit else ''}" if base else "from scratch"
    fingerprint = source.record.inputs.get("base model")
    if fingerprint:
        what += f", fingerprint {fingerprint[:16]}"
    lines = ["## Lineage", "", f"The run started with: {what}.", ""]
    lines += [_table(("stage", "type", "from", "metrics", "took"), stages)]
    if datasets:
        lines += ["Data, with the first 16 digits of the SHA-256 of their content:", ""]
        lines += [_table(("stage", "as", "dataset", "rows used", "digest"), datasets)]
    return "\n".join(lines)


def _results(source: Source) -> str:
    lines = []
    for name, record in source.recorded.stages.items():
        if STAGE_TYPES[record.type].makes != "evaluation":
            continue
        policies: JsonObject = record.metrics["policies"]
        baseline = record.metrics["baseline"]
        if source.stage not in policies and not source.scores:
            continue
        measures = {key: label for key, label in MEASURES.items() if key in policies[baseline]}
        head = ["policy", *(column for label in measures.values() for column in (label, f"win rate ({label})"))]
        rows = []
        for policy, summary in policies.items():
            row = [policy]
            for key in measures:
                wins = summary.get(f"{key}_win_rate")
                row += [number(summary.get(key)), "-" if policy == baseline or wins is None else win_rate(wins)]
            ended = summary.get("ended")
            share = "nan" if ended is None else f"{100 * ended:.0f} %"
            rows.append((*row, number(summary.get("kl"), 2), number(summary.get("length"), 1), share))
        count = policies[baseline]["prompts"]
        lines += [
            f"{cell(name)}: {count} held-out prompts, win rates against {cell(baseline)} with 95 % intervals.",
            "",
        ]
        lines += [_table((*head, "KL (nats)", "length", "ended"), rows)]
        lines += [f"- {cell(note)}" for note in notes_of(source.recorded, record)] + [""]
    return "\n".join(["## Results", "", *lines]) if lines else ""


def _shift(source: Source) -> str:
    """Say what the shift reports say of the reward models that it was made with, or of itself."""
    ancestors = lineage(source)
    lines = []
    for name, record in source.recorded.stages.items():
        if STAGE_TYPES[record.type].makes != "shift report" or record.parents["reward"] not in ancestors:
            continue
        metrics = record.metrics
        comparisons = metrics["comparisons"]
        rows = [
            ("ICC: share of the scores' variance between prompts, which comparisons leave open", metrics["icc"]),
            ("within-prompt SD of the scores (log-odds)", metrics["within_sd"]),
            ("correlation of score and length within prompts", metrics["length_correlation"]),
            ("accuracy on held-out comparisons", comparisons["accuracy"] if comparisons else None),
        ]
        lines += [f"{cell(name)}, of the reward model {cell(record.parents['reward'])}, with 95 % intervals:", ""]
        lines += [_table(("figure", "value"), [(label, estimate(figure) or "-") for label, figure in rows])]
        lines += [cell(metrics["advice"]), ""]
    return "\n".join(["## Shift report", "", *lines]) if lines else ""


def _limits(source: Source, job: Job) -> str:
    points = []
    if job.scores:
        points.append(
            "It has learnt from comparisons of completions of one prompt. So only differences of scores within a "
            "prompt mean anything; the level of a prompt's scores is arbitrary."
        )
    is_evaluated = any(
        source.stage in record.metrics["policies"]
        for record in source.recorded.stages.values()
        if STAGE_TYPES[record.type].makes == "evaluation"
    )
    if not job.scores and not is_evaluated:
        points.append("No evaluation of this run has measured it.")
    if not job.scores and len(lineage(source)) > 1:
        points.append("Win rates are those of the run's own held-out prompts, and hold for prompts like them.")
    points.append("Nothing here measures whether it is truthful, safe or fair.")
    points.append("The licences of its base model and of its data hold for it too.")
    if job.dtype != "float32" and job.form != "adapter":
        points.append(f"Its weights are rounded to {job.dtype}; the table above says what that changes.")
    return "\n".join(["## Limits", "", *(f"- {point}" for point in points), ""])


def _settings(source: Source) -> str:
    record = source.record
    rows = [(key, value) for key, value in sorted(record.config.items())]
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    tokenizer = source.recorded.tokenizer
    eos = [f"Eos is {cell(tokenizer.eos_token)}, pad is {cell(tokenizer.pad_token)}.", ""] if tokenizer else []
    about = f"Seed {record.seed}, {record.world_size} process{'es' if record.world_size > 1 else ''}, started "
    return "\n".join(
        [
            "## Settings",
            "",
            f"{about}{cell(record.started)}, with {cell(versions)}. Exported by rlhf-pipeline {__version__}.",
            "",
            *eos,
            _table(("key", "value"), rows),
        ]
    )
