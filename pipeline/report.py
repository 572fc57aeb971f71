"""What people read: the plan, the chain so far, the result. Nothing here imports torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipeline import manifest
from pipeline.errors import UserError
from pipeline.manifest import Manifest, Record

if TYPE_CHECKING:
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


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1e-2 and value else f"{value:.3f}"


def _count(value: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return str(value)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}h {minutes % 60:02d}m"
        if minutes >= 60
        else f"{minutes}m {rest:02d}s"
        if minutes
        else f"{rest}s"
    )


def plan_table(config: "RunConfig", decisions: list["Decision"], facts: dict[str, "Facts"], console: Console) -> None:
    """The stages in order: start, reference, rows, tokens, steps, parameters, and what happens to each."""
    from pipeline.lineage import describe_reference, describe_start

    table = Table(title=f"{config.name}: plan", title_justify="left", title_style="bold")
    for column in ("stage", "type", "starts from", "reference", "data: rows, tokens", "steps", "trains", "will"):
        table.add_column(column, overflow="fold")
    for decision in decisions:
        stage, fact = config.stages[decision.stage], facts.get(decision.stage)
        rows, steps, trains = stage.data, "", ""
        if fact is not None:
            rows = "\n".join(
                f"{name}: {_count(fact.rows[name])}, {_count(fact.tokens[name])}"
                + (f" ({fact.dropped[name]} too long)" if fact.dropped[name] else "")
                for name in fact.rows
            )
            steps = str(fact.steps or "")
            if fact.parameters:
                trains = f"{_count(fact.parameters['trainable'])} of {_count(fact.parameters['total'])}"
        will = f"[yellow]run[/]: {decision.reason}" if decision.run else f"[green]skip[/]: {decision.reason}"
        start, reference = describe_start(config, decision.stage), describe_reference(config, decision.stage)
        table.add_row(decision.stage, stage.type, start, reference, rows, steps, trains, will)
    console.print(table)


def _headline(record: Record) -> str:
    if record.type == "evaluate":
        baseline = record.metrics["baseline"]
        policies = record.metrics["policies"].items()
        return "\n".join(f"{name}: {_wins(summary)}" for name, summary in policies if name not in ("base", baseline))
    found = [(key, record.metrics[key]) for key in HEADLINES[record.type] if key in record.metrics]
    text = ", ".join(f"{key.replace('_', ' ')} {_number(value)}" for key, value in found)
    resumed = f" (resumed at step {record.resumed_from_step})" if record.resumed_from_step else ""
    return text + resumed


def _wins(summary: dict[str, Any]) -> str:
    measure = "judge" if "judge_win_rate" in summary else "score"
    if f"{measure}_win_rate" not in summary:
        return f"length {summary['length']:.1f}"
    rate, low, high = summary[f"{measure}_win_rate"]
    return f"win rate {rate:.2f} [{low:.2f}, {high:.2f}]"


def result_table(finished: Manifest, console: Console) -> None:
    """The policies side by side, from the run's evaluate stages."""
    for name, record in finished.stages.items():
        if record.type != "evaluate":
            continue
        baseline, policies = record.metrics["baseline"], record.metrics["policies"]
        judged = any("judge" in summary for summary in policies.values())
        scored = any("score" in summary for summary in policies.values())
        prompts = policies[baseline]["prompts"]
        title = (
            f"{finished.name}: {name} on {prompts} held-out prompts, win rates against {baseline} with 95 % intervals"
        )
        table = Table(title=title, title_justify="left", title_style="bold")
        columns = ["policy", *(["judge", "win rate (judge)"] if judged else [])]
        columns += [*(["reward model", "win rate (reward model)"] if scored else []), "KL (nats)", "length", "ended"]
        for column in columns:
            table.add_column(column, justify="left" if column == "policy" else "right")
        for policy, summary in policies.items():
            cells = [policy]
            for measure in (("judge",) if judged else ()) + (("score",) if scored else ()):
                rate, low, high = summary[f"{measure}_win_rate"]
                wins = "-" if policy == baseline else f"{rate:.2f} [{low:.2f}, {high:.2f}]"
                cells += [f"{summary[measure]:.3f}", wins]
            ended = f"{100 * summary['ended']:.0f} %"
            table.add_row(*cells, f"{summary['kl']:.2f}", f"{summary['length']:.1f}", ended)
        console.print(table)


def snippet(run_dir: Path, recorded: Manifest, record: Record) -> str:
    """Python that loads a stage's output with transformers and peft alone."""
    folder = run_dir / record.output.path
    if record.output.kind == "report":
        return f"# {folder}/samples.jsonl: all completions side by side; {folder}/table.json: the table"
    score = record.type == "reward"
    auto = "AutoModelForSequenceClassification" if score else "AutoModelForCausalLM"
    options = ", num_labels=1" if score else ""
    tokenizer = f'tokenizer = AutoTokenizer.from_pretrained("{folder}")'
    imports = f"from transformers import AutoTokenizer, {auto}"
    if record.output.kind == "full":
        return f'{imports}\nmodel = {auto}.from_pretrained("{folder}"{options})\n{tokenizer}'
    full = record.output.full
    base = recorded.model["path"] if full is None else str(run_dir / full)
    dtype = recorded.model["dtype"]
    return (
        f'{imports}\nfrom peft import PeftModel\nbase = {auto}.from_pretrained("{base}", dtype="{dtype}"{options})\n'
        f'model = PeftModel.from_pretrained(base, "{folder}")\n{tokenizer}'
    )


def status(run_dir: Path, console: Console) -> None:
    """The chain so far: stage, parents, duration, headline metrics, output, and how to load it."""
    recorded = manifest.read(run_dir)
    if recorded is None:
        raise UserError(
            f"{run_dir}: no {manifest.FILE} here; expected a run folder, as `rlhf run` prints it at its end"
        )
    table = Table(title=f"{recorded.name}: {run_dir}", title_justify="left", title_style="bold")
    for column in ("stage", "type", "from", "took", "metrics", "output"):
        table.add_column(column, overflow="fold")
    for name, record in recorded.stages.items():
        parents = ", ".join(dict.fromkeys(record.parents.values())) or "-"
        took = _duration(record.duration)
        table.add_row(name, record.type, parents, took, _headline(record), record.output.path)
    console.print(table)
    result_table(recorded, console)
    for name, record in recorded.stages.items():
        console.print(f"\n[bold]{name}[/]")
        console.print(snippet(run_dir, recorded, record), highlight=False, markup=False, soft_wrap=True)
