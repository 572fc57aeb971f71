"""What people read: the plan, the chain so far, the result. Nothing here imports torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.manifest import Manifest, Record
from pipeline.metrics import HEADLINES
from pipeline.screen import Cell, Table, say, show
from pipeline.streams import printable

if TYPE_CHECKING:
    from pipeline.data.audit import Audit
    from pipeline.plan import Decision
    from pipeline.preflight import Facts
    from pipeline.schema import RunConfig

MEASURES = {"judge": "judge", "score": "reward model"}


def _number(value: float | None, digits: int = 3) -> str:
    """A metric as people read it. The manifest holds NaN as null."""
    if value is None:
        return "nan"
    return f"{value:.3g}" if 0 < abs(value) < 1e-2 and digits == 3 else f"{value:.{digits}f}"


def _interval(values: list[float | None]) -> str:
    rate, low, high = (_number(value, 2) for value in values)
    return f"{rate} [{low}, {high}]"


def _estimate(found: dict[str, float | None] | None) -> str:
    """value [low, high], as far as they are known; `-` for what could not be measured."""
    if found is None:
        return "-"
    values = [value for value in found.values() if value is not None]
    return _interval(values) if len(values) == 3 else _number(values[0] if values else None, 2)


def count(value: int) -> str:
    """A number of rows, tokens or parameters in three digits."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(seconds, 0)), 60)  # a clock may have been put back
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02d}m"
    if minutes:
        return f"{minutes}m {rest:02d}s"
    return f"{rest}s"


def plan_table(config: "RunConfig", decisions: list["Decision"], facts: dict[str, "Facts"], console: Console) -> None:
    """The stages in order: start, reference, rows, tokens, steps, parameters, and what happens to each."""
    from pipeline.lineage import describe_reference, describe_start

    columns = ("stage", "type", "starts from", "reference", "data (rows, tokens)", "steps", "trains", "will")
    shown = Table(f"{config.name}: plan", columns)
    for decision in decisions:
        stage = config.stages[decision.stage]
        fact = facts.get(decision.stage)
        rows = stage.data
        steps = ""
        trains = ""
        if fact is not None:
            rows = "\n".join(map(_rows, fact.audits.values()))
            steps = str(fact.steps or "")
            if fact.parameters:
                trains = f"{count(fact.parameters['trainable'])} of {count(fact.parameters['total'])}"
        start = describe_start(config, decision.stage)
        reference = describe_reference(config, decision.stage)
        shown.add(decision.stage, stage.type, start, reference, rows, steps, trains, _will(decision))
    show(shown, console)


def _will(decision: "Decision") -> Cell:
    verb = ("run", "yellow") if decision.run else ("skip", "green")
    return [verb, (f": {decision.reason}", "")]


def _rows(audit: "Audit") -> str:
    dropped = f" ({count(audit.num_dropped)} left out)" if audit.num_dropped else ""
    counts = "streamed" if audit.streamed else f"{count(audit.rows)}, {count(audit.tokens)}"
    return f"{audit.dataset}: {counts}{dropped}"


def _headline(record: Record) -> str:
    metrics = record.metrics
    if record.type == "evaluate":
        policies = metrics["policies"].items()
        return "\n".join(f"{name}: {_wins(s)}" for name, s in policies if name not in ("base", metrics["baseline"]))
    if record.type == "shift":
        return ", ".join(f"{key} {_estimate(metrics[key])}" for key in ("icc", "within_sd", "length_correlation"))
    found = {key.replace("_", " "): metrics[key] for key in HEADLINES.get(record.type, ()) if key in metrics}
    resumed = f" (resumed at step {record.resumed_from_step})" if record.resumed_from_step else ""
    return ", ".join(f"{key} {_number(value)}" for key, value in found.items()) + resumed


def _wins(summary: dict[str, Any]) -> str:
    measure = "judge" if "judge_win_rate" in summary else "score"
    if f"{measure}_win_rate" not in summary:
        return f"length {_number(summary.get('length'), 1)}"
    return f"win rate {_interval(summary[f'{measure}_win_rate'])}"


def result_table(finished: Manifest, console: Console) -> None:
    """The policies side by side, from the run's evaluate stages."""
    for name, record in finished.stages.items():
        if record.type != "evaluate":
            continue
        baseline, policies = record.metrics["baseline"], record.metrics["policies"]
        measures = {measure: label for measure, label in MEASURES.items() if measure in policies[baseline]}
        prompts = f"{policies[baseline]['prompts']} held-out prompts"
        title = f"{finished.name}: {name} on {prompts}, win rates against {baseline} with 95 % intervals"
        scores = [column for label in measures.values() for column in (label, f"win rate ({label})")]
        shown = Table(title, ["policy", *scores, "KL (nats)", "length", "ended"], right=True)
        for policy, summary in policies.items():
            cells = [policy]
            for measure in measures:
                wins = summary.get(f"{measure}_win_rate")
                cells.append(_number(summary.get(measure)))
                cells.append("-" if policy == baseline or wins is None else _interval(wins))
            ended = summary.get("ended")
            share = _number(None if ended is None else 100 * ended, 0)
            shown.add(*cells, _number(summary.get("kl"), 2), _number(summary.get("length"), 1), f"{share} %")
        show(shown, console)


def shift_table(finished: Manifest, console: Console) -> None:
    """What the shift reports of the reward models found, in two lines each."""
    for name, record in finished.stages.items():
        if record.type != "shift":
            continue
        metrics, held_out = record.metrics, record.metrics["comparisons"] or {"accuracy": None}
        figures = {"ICC": metrics["icc"], "within-prompt SD": metrics["within_sd"]}
        figures |= {"score and length": metrics["length_correlation"], "accuracy": held_out["accuracy"]}
        told = ", ".join(f"{label} {_estimate(found)}" for label, found in figures.items())
        say(console, [(name, "bold"), (f": {told}", "")])
        where = f"(`rlhf shift` shows the report; plots are in {record.output.path})"
        say(console, f"{metrics['advice']} {where}")


def snippet(run_dir: Path, recorded: Manifest, record: Record) -> str:
    """Python that loads a stage's output with transformers and peft alone."""
    folder = run_dir / record.output.path
    if record.output.kind == "report":
        figures = "report.json: the figures, *.png: plots" if record.type == "shift" else "table.json: the table"
        return f"# {folder}/samples.jsonl: all completions side by side; {folder}/{figures}"
    scores = record.type == "reward"
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
    if full is None and (revision := model.get("commit") or model.get("revision")):
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
    """A path or name as a Python string, whatever characters it has: JSON's strings are Python's too."""
    return json.dumps(str(value), ensure_ascii=False)


def recorded_in(run_dir: Path) -> Manifest:
    """The manifest of a run folder that a user named."""
    recorded = manifest.read(run_dir)
    if recorded is None:
        expected = "expected a run folder, as `rlhf run` prints it at its end"
        raise UserError(f"{run_dir}: no {manifest.FILE} here; {expected}")
    return recorded


def status(run_dir: Path, console: Console) -> None:
    """The chain so far: stage, parents, duration, headline metrics, output, and how to load it."""
    recorded = recorded_in(run_dir)
    shown = Table(f"{recorded.name}: {run_dir}", ("stage", "type", "from", "took", "metrics", "output"))
    for name, record in recorded.stages.items():
        parents = ", ".join(dict.fromkeys(record.parents.values())) or "-"
        took = _duration(record.duration)
        shown.add(name, record.type, parents, took, _headline(record), record.output.path)
    show(shown, console)
    shift_table(recorded, console)
    result_table(recorded, console)
    for name, record in recorded.stages.items():
        say(console, f"\n{name}", "bold")
        code = printable(snippet(run_dir, recorded, record), console.encoding)
        console.print(code, highlight=False, markup=False, emoji=False, soft_wrap=True)  # to be copied: never wrapped
