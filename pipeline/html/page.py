"""Write the page: everything in one file, no request to anywhere, and no text of a model is ever read as code."""

import base64
import contextlib
import datetime
import hashlib
import json
import re
import shlex
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, cast

import jinja2
from markupsafe import Markup, escape
from rich.console import Console

from pipeline import __version__
from pipeline.html import compared, curves, drawing, reading, tables, words
from pipeline.html.place import FILE
from pipeline.html.values import Run, Stage
from pipeline.shift.report import Extreme, Report
from pipeline.show import results, shift
from pipeline.show.screen import say
from pipeline.show.tables import duration, number
from pipeline.system.errors import UserError

GENERATOR = "rlhf report"  # in the page's head: a file without it was made by somebody else
_HEAD = 2000  # bytes of a file that are looked at for it


def make(run_dirs: Sequence[Path], to: Path | None, console: Console) -> None:
    """Make the report of a run folder, or one that compares several, and say where it is.

    `to`: the file; by default `report.html` in the run folder, or of several in the working directory.

    Raises:
        UserError: if a folder is no run folder, or the file cannot be written.
    """
    share = reading.MOST_BYTES // len(run_dirs)
    runs = [reading.read(run_dir, share) for run_dir in run_dirs]
    path = to or (runs[0].path / FILE if len(runs) == 1 else Path(FILE))
    write(path, render(runs))
    say(console, f"The report is {path}")


def at_end(run_dir: Path, console: Console) -> None:
    """Make the report of a run that has just ended. What goes wrong is one line: the run is not to fail by it."""
    try:
        make([run_dir], None, console)
    except Exception as error:  # of any kind: a report is never worth a run
        say(console, f"No report was made: {error or type(error).__name__}")


def write(path: Path, html: str) -> None:
    """Write the page in one step.

    Raises:
        UserError: if the disk refuses it, or a file stands there that is no report.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        if path.exists() and GENERATOR.encode() not in path.read_bytes()[:_HEAD]:
            raise UserError(f"{path}: holds something else than a report; give another file with --to")
        temporary.write_bytes(html.encode("utf-8", errors="replace"))
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        why = error.strerror or str(error)
        raise UserError(f"{path}: the report cannot be written there ({why}); give another file with --to") from None


def render(runs: Sequence[Run]) -> str:
    """Return the page for a run, or for several that are compared."""
    style = _file("style.css")
    script = _file("page.js")
    policy = {
        "default-src": "'none'",
        "img-src": "data:",
        "style-src": _source(style),
        "script-src": _source(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    labels = _labels(runs)
    return _template().render(
        views=[_view(run, label, number) for number, (run, label) in enumerate(zip(runs, labels, strict=True), 1)],
        compared=_compared(runs, labels) if len(runs) > 1 else None,
        policy="; ".join(f"{key} {value}" for key, value in policy.items()),
        style=Markup(style),  # our own files: nothing of a run is in them
        script=Markup(script),
        generator=GENERATOR,
        version=__version__,
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def _labels(runs: Sequence[Run]) -> list[str]:
    """Name each run by its own name, or where two have the same one, by its folder."""
    names = [run.name for run in runs]
    return [run.name if names.count(run.name) == 1 else str(run.path) for run in runs]


def _compared(runs: Sequence[Run], labels: Sequence[str]) -> dict[str, Any]:
    return {
        "chains": compared.chains(runs, labels),
        "results": compared.evaluations(runs, labels),
        "settings": compared.settings(runs, labels),
    }


def _view(run: Run, label: str, number: int) -> dict[str, Any]:
    """Return what the template shows of a run. `number` makes its anchors unique."""
    stages = list(run.stages.values())
    return {
        "run": run,
        "label": label,
        "id": f"run{number}",
        "summary": words.summarise(run),
        "picture": drawing.draw_chain(run) if stages else None,
        "chain": tables.chain(run),
        "evaluations": [
            _evaluation(run, stage, f"run{number}-{stage.name}") for stage in stages if _has(stage, "evaluation")
        ],
        "shifts": [_shift(stage) for stage in stages if _has(stage, "shift report")],
        "stages": [_stage(run, stage) for stage in stages if stage.state not in ("waiting", "not begun")],
        "command": _command(run),
        "took": duration(sum(stage.record.duration for stage in stages if stage.record is not None)),
    }


def _has(stage: Stage, makes: str) -> bool:
    return stage.record is not None and stage.makes == makes


def _stage(run: Run, stage: Stage) -> dict[str, Any]:
    """Return all that is shown of a stage in its own section."""
    code = None if stage.record is None else results.snippet(run.path, run.recorded, stage.record)
    return {
        "stage": stage,
        "state": tables.state(stage),
        "data": tables.data(stage),
        "charts": [drawing.draw(chart, stage.name) for chart in curves.charts(stage)],
        "alarms": stage.metrics.get("alarms", []),
        "tables": [table for table in (tables.facts(stage), tables.metrics(stage), tables.settings(stage)) if table],
        "code": code,
        "again": _command(run, stage.name if stage.state == "finished" else None),  # others go on from a checkpoint
    }


def _command(run: Run, redo: str | None = None) -> str | None:
    """Return the command that makes the run again, to be pasted into a shell; None: it is not on record."""
    if run.last is None:
        return None
    command = [*run.last.command, *(["--redo", redo] if redo else [])]
    return f"cd {shlex.quote(run.last.folder)} && {shlex.join(command)}"


def _extreme(one: Extreme) -> tuple[str, str, str]:
    """Return a prompt whose scores lie far off, its offset and the SD of its scores."""
    spread = one["within_sd"]
    return one["prompt"], f"{one['offset']:+.2f}", "-" if spread is None else number(spread, 2)


def _evaluation(run: Run, stage: Stage, anchor: str) -> dict[str, Any]:
    """Return the table of an evaluation, and its completions as the script reads them."""
    assert stage.record is not None, "stages without a record were left out"
    policies = list(stage.metrics["policies"])
    samples = stage.samples
    rows = []
    for prompt in samples.prompts if samples else []:
        messages = [[one["role"], one["content"]] for one in prompt["prompt"]]
        rows.append([messages, [_completion(prompt[policy]) for policy in policies]])
    baseline = stage.metrics["baseline"]
    aligned = [policy for policy in policies if policy not in ("base", baseline)]
    return {
        "name": stage.name,
        "id": anchor,
        "table": results.policies(stage.name, stage.record),
        "notes": results.notes_of(run.recorded, stage.record),
        "policies": policies,
        "baseline": baseline,
        "chosen": (aligned or policies)[0],
        "has_score": any(row[1][0][1] is not None for row in rows),
        "has_judge": any(row[1][0][2] is not None for row in rows),
        "reward": stage.parents.get("reward"),
        "judge": stage.record.config.get("judge"),
        "shown": len(rows),
        "total": samples.total if samples else 0,
        "json": as_json({"policies": policies, "baseline": baseline, "rows": rows}),
    }


def _completion(entry: dict[str, Any]) -> list[Any]:
    """Return a completion as the script reads it: text, score, judge, KL, length, whether it ended."""
    figures = [curves.finite(entry.get(key)) for key in ("score", "judge", "kl", "length")]
    return [entry["completion"], *figures, entry.get("ended")]


def _shift(stage: Stage) -> dict[str, Any]:
    """Return the figures, the advice, the extreme prompts and the plots of a shift report."""
    report = cast(Report, stage.metrics)
    return {
        "name": stage.name,
        "reward": stage.parents.get("reward", ""),
        "sizes": f"{report['prompts']} held-out prompts, {report['completions']} completions, 95 % intervals",
        "figures": shift.figures(report),
        "extremes": [_extreme(one) for one in shift.extremes(report)],
        "advice": report.get("advice", ""),
        "plots": {name: base64.b64encode(content).decode() for name, content in stage.plots.items()},
    }


def as_json(value: object) -> Markup:
    """Write a value for a `<script type="application/json">`: nothing in it can end the element or begin another."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _source(text: str) -> str:
    """Return the source expression that allows exactly this inline style or script."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _with_code(text: str) -> Markup:
    """Escape a text, and show what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def _file(name: str) -> str:
    return resources.files("pipeline.html").joinpath("files", name).read_text(encoding="utf-8")


@cache
def _template() -> jinja2.Template:
    """Return the template; all that it shows is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline.html", "files"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["with_code"] = _with_code
    return environment.get_template("page.html")
