"""What people read: the plan, the chain so far, the result. Nothing here imports torch."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.manifest import Manifest, Record

if TYPE_CHECKING:
    from pipeline.data.audit import Audit
    from pipeline.plan import Decision
    from pipeline.preflight import Facts
    from pipeline.schema import RunConfig

HEADLINES = {
    "pretrain": ("first_loss", "loss", "eval_loss"),
    "sft": ("first_loss", "loss", "eval_loss", "mean_token_accuracy"),
    "reward": ("loss", "accuracy", "eval_accuracy", "margin"),
    "dpo": ("initial_loss", "loss", "rewards/accuracies", "rewards/margins"),
    "ppo": ("initial_kl", "kl", "first_score", "score"),
    "rloo": ("initial_kl", "kl", "first_reward", "reward"),
    "grpo": ("initial_kl", "kl", "first_reward", "reward"),
}
MEASURES = {"judge": "judge", "score": "reward model"}


def _number(value: float | None, digits: int = 3) -> str:
    """A metric as people read it. The manifest holds NaN as null."""
    if value is None:
        return "nan"
    return f"{value:.3g}" if 0 < abs(value) < 1e-2 and digits == 3 else f"{value:.{digits}f}"


def _interval(values: list[float | None]) -> str:
    rate, low, high = (_number(value, 2) for value in values)
    return escape(f"{rate} [{low}, {high}]")


def _estimate(found: dict[str, float | None] | None) -> str:
    """value [low, high], as far as they are known; `-` for what could not be measured."""
    if found is None:
        return "-"
    values = [value for value in found.values() if value is not None]
    return _interval(values) if len(values) == 3 else _number(values[0] if values else None, 2)


def table(title: str, columns: Iterable[str], right: bool = False) -> Table:
    """A table in the style of all reports."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, overflow="fold", justify="right" if right and number else "left")
    return made


def count(value: int) -> str:
    """A number of rows, tokens or parameters in three digits."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"


def plan_table(config: "RunConfig", decisions: list["Decision"], facts: dict[str, "Facts"], console: Console) -> None:
    """The stages in order: start, reference, rows, tokens, steps, parameters, and what happens to each."""
    from pipeline.lineage import describe_reference, describe_start

    columns = ("stage", "type", "starts from", "reference", "data: rows, tokens", "steps", "trains", "will")
    shown = table(f"{config.name}: plan", columns)
    for decision in decisions:
        stage, fact = config.stages[decision.stage], facts.get(decision.stage)
        rows, steps, trains = stage.data, "", ""
        if fact is not None:
            rows, steps = "\n".join(map(_rows, fact.audits.values())), str(fact.steps or "")
            if fact.parameters:
                trains = f"{count(fact.parameters['trainable'])} of {count(fact.parameters['total'])}"
        will = f"[yellow]run[/]: {decision.reason}" if decision.run else f"[green]skip[/]: {decision.reason}"
        start, reference = describe_start(config, decision.stage), describe_reference(config, decision.stage)
        shown.add_row(decision.stage, stage.type, start, reference, rows, steps, trains, will)
    console.print(shown)


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
    found = {key.replace("_", " "): metrics[key] for key in HEADLINES[record.type] if key in metrics}
    resumed = f" (resumed at step {record.resumed_from_step})" if record.resumed_from_step else ""
    return ", ".join(f"{key} {_number(value)}" for key, value in found.items()) + resumed


def _wins(summary: dict[str, Any]) -> str:
    measure = "judge" if "judge_win_rate" in summary else "score"
    if f"{measure}_win_rate" not in summary:
        return f"length {_number(summary['length'], 1)}"
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
        shown = table(title, ["policy", *scores, "KL (nats)", "length", "ended"], right=True)
        for policy, summary in policies.items():
            cells = [policy]
            for measure in measures:
                wins = "-" if policy == baseline else _interval(summary[f"{measure}_win_rate"])
                cells += [_number(summary[measure]), wins]
            ended = _number(summary["ended"] and 100 * summary["ended"], 0)
            shown.add_row(*cells, _number(summary["kl"], 2), _number(summary["length"], 1), f"{ended} %")
        console.print(shown)


def shift_table(finished: Manifest, console: Console) -> None:
    """What the shift reports of the reward models found, in two lines each."""
    for name, record in finished.stages.items():
        if record.type != "shift":
            continue
        metrics, held_out = record.metrics, record.metrics["comparisons"] or {"accuracy": None}
        figures = {"ICC": metrics["icc"], "within-prompt SD": metrics["within_sd"]}
        figures |= {"score and length": metrics["length_correlation"], "accuracy": held_out["accuracy"]}
        told = ", ".join(f"{label} {_estimate(found)}" for label, found in figures.items())
        console.print(f"[bold]{name}[/]: {told}", soft_wrap=True)
        where = f"(`rlhf shift` shows the report; plots are in {record.output.path})"
        console.print(f"{metrics['advice']} {where}", soft_wrap=True)


def snippet(run_dir: Path, recorded: Manifest, record: Record) -> str:
    """Python that loads a stage's output with transformers and peft alone."""
    folder = run_dir / record.output.path
    if record.output.kind == "report":
        figures = "report.json: the figures, *.png: plots" if record.type == "shift" else "table.json: the table"
        return f"# {folder}/samples.jsonl: all completions side by side; {folder}/{figures}"
    scores = record.type == "reward"
    auto = "AutoModelForCausalLM"
    padding = ""
    options = ""
    if scores:
        auto = "AutoModelForSequenceClassification"
        padding = ', padding_side="right"'
        options = ", num_labels=1"
    if recorded.model.get("trust_remote_code"):
        options += ", trust_remote_code=True"
    lines = [f"from transformers import AutoTokenizer, {auto}"]
    lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{folder}"{padding})')
    if record.output.kind == "full":
        return "\n".join([*lines, f'model = {auto}.from_pretrained("{folder}"{options})'])
    full, dtype = record.output.full, recorded.model["dtype"]
    base = recorded.model["path"] if full is None else run_dir / full
    if full is None and (revision := recorded.model.get("commit") or recorded.model["revision"]):
        options += f', revision="{revision}"'
    if full is None and recorded.model.get("quantization"):
        lines[0] += ", BitsAndBytesConfig"
        options += f", quantization_config=BitsAndBytesConfig(**{recorded.model['quantization']})"
    lines.insert(1, "from peft import PeftModel")
    lines.append(f'base = {auto}.from_pretrained("{base}", dtype="{dtype}"{options})')
    if scores:  # a score is read at the last token that is not pad, and the base may have another pad token, or none
        lines.append("base.config.pad_token_id = tokenizer.pad_token_id")
    if scores and dtype != "float32":  # as the run computes it
        lines.append("base.score.float().register_forward_pre_hook(lambda head, hidden: hidden[0].float())")
    return "\n".join([*lines, f'model = PeftModel.from_pretrained(base, "{folder}")'])


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
    shown = table(f"{recorded.name}: {run_dir}", ("stage", "type", "from", "took", "metrics", "output"))
    for name, record in recorded.stages.items():
        parents = ", ".join(dict.fromkeys(record.parents.values())) or "-"
        took = _duration(record.duration)
        shown.add_row(name, record.type, parents, took, _headline(record), record.output.path)
    console.print(shown)
    shift_table(recorded, console)
    result_table(recorded, console)
    for name, record in recorded.stages.items():
        console.print(f"\n[bold]{name}[/]")
        console.print(snippet(run_dir, recorded, record), highlight=False, markup=False, soft_wrap=True)
