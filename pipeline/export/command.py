"""Export a stage: look at everything that can be wrong first, write, read back, compare, and only then name it."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from pipeline import __version__
from pipeline.base import base_model
from pipeline.export import card, folder, limits, source
from pipeline.export.job import Form, Job
from pipeline.export.source import Source
from pipeline.show.screen import Table, say, show
from pipeline.system import disk
from pipeline.system.errors import StageFailed, UserError
from pipeline.system.json_object import JsonObject

NUM_LINES = 20  # shown of a step that failed


def export(
    run_dir: Path, stage: str, target: Path, form: Form | None, dtype: str | None, force: bool, console: Console
) -> None:
    """Write a stage's model to `target`, compare it with the stage, and show the figures.

    `form`: None is the adapter where the stage has one, else whole weights. `dtype`: None is the run's.

    Raises:
        UserError: if the stage, the target or the form cannot be used, or the export is not the stage's model; then
            nothing is left of it.
        StageFailed: if a step ended with an error that is no user's.
    """
    found = source.find(run_dir, stage)
    target = target.expanduser().resolve()
    form = form or ("merged" if found.adapter is None else "adapter")
    _check(found, form, dtype)
    with disk.reported(target.parent, "--to"):
        folder.check(target, force)
    with disk.reported(target.parent, "--to"), source.held(found):
        source.verify(found)
        with folder.beside(target) as work:
            job = _job(found, form, dtype or found.dtype, work)
            job.save()
            say(console, f"{stage}: writing {'the ' if form == 'adapter' else ''}{form}, {_size(found)}")
            _process("write", job)
            say(console, f"{stage}: reading it back, to compare it with the stage")
            _process("read", job)
            figures = job.json("figures")
            about = job.json("about")
            _refuse(stage, job, figures, about)
            text = card.write(found, job, target, figures, about)
            (job.output / "README.md").write_text(text, encoding="utf-8")
            folder.seal(job.output, _about(found, job, figures, about))
            folder.put(job.output, target, work, force)
    _show(job, figures, about, target, console)


def _check(found: Source, form: Form, dtype: str | None) -> None:
    """Refuse what no work is needed to know.

    Raises:
        UserError: if the stage cannot be exported in this form or type.
    """
    if form == "adapter" and found.adapter is None:
        raise UserError(f"--as adapter: stage {found.stage!r} has put out whole weights; say `--as merged`")
    if form == "adapter" and dtype is not None:
        raise UserError("--dtype: an adapter is exported as it is; leave it out, or say `--as merged`")
    if form == "gguf" and found.scores:
        raise UserError("--as gguf: a reward model's score head has no place in it; say `--as merged`")


def _job(found: Source, form: Form, dtype: str, work: Path) -> Job:
    name = f"{found.recorded.name}-{found.stage}-{dtype}.gguf"
    return Job(
        run_dir=found.run_dir,
        stage=found.stage,
        form=form,
        dtype="float32" if form == "adapter" else dtype,
        scores=found.scores,
        full=found.full,
        adapter=found.adapter,
        base=base_model.options_on_record(found.recorded),
        file=name,
        work=work,
    )


def _size(found: Source) -> str:
    total = found.record.parameters.get("total")
    return "size unknown" if not total else f"{total / 1e6:,.0f} million parameters in float32 in memory"


def _process(step: str, job: Job) -> None:
    """Do a step in a process of its own, on the CPU.

    Raises:
        UserError: with the error that the step has left.
        StageFailed: if it ended otherwise, with its last lines.
    """
    command = [sys.executable, "-m", "pipeline.export.worker", step, str(job.work)]
    variables = os.environ | {
        "CUDA_VISIBLE_DEVICES": "",  # float32 on a GPU may be less, and needs its memory twice
        "PYTHONSAFEPATH": "1",  # or `-m` would look for this package in the working directory first
        "TOKENIZERS_PARALLELISM": "false",
    }
    done = subprocess.run(
        command,
        env=variables,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="backslashreplace",
    )
    if done.returncode == 0:
        return
    if done.returncode == 2 and (job.work / "error.json").exists():
        raise UserError(f"the export of {job.stage!r} stopped: {job.json('error')}. Nothing is left of it")
    how = f"ended by signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
    if done.returncode == -9:
        how += ", perhaps since the memory was used up"
    lines = done.stdout.splitlines()[-NUM_LINES:]
    head = f"the export of {job.stage!r} failed ({how}); nothing is left of it. Its last lines:"
    raise StageFailed("\n  ".join([head, *lines]), 1)


def _refuse(stage: str, job: Job, figures: JsonObject, about: JsonObject) -> None:
    """Refuse an export that is not the stage's model.

    Raises:
        UserError: with each figure that is beyond its limit.
    """
    faults = limits.faults(figures["exact"], limits.LIMITS[job.dtype])
    if "as_used" in figures:
        faults += [f"as used, {fault}" for fault in limits.faults(figures["as_used"], limits.AS_USED)]
    share = limits.lost_share(figures["exact"], about["effect"])
    if share > limits.LOST:
        faults.append(f"it is away from the stage by {share:.2g} of what the adapter changes, expected {limits.LOST:g}")
    if faults:
        lines = "\n  ".join([f"the export of {stage!r} is not the stage's model, and was deleted:", *faults])
        mend = "" if job.dtype == "float32" else "\n  If rounding is the reason, `--dtype float32` has none"
        raise UserError(lines + mend)


def _about(found: Source, job: Job, figures: JsonObject, about: JsonObject) -> JsonObject:
    """Return what an export says of itself, for `rlhf push` and for programs."""
    return {
        "run": found.recorded.name,
        "stage": found.stage,
        "type": found.record.type,
        "as": job.form,
        "dtype": job.dtype,
        "base": job.full if job.form == "adapter" else None,
        "output": found.record.output.files,
        "figures": figures,
        "limits": {"exact": vars(limits.LIMITS[job.dtype]), "as_used": vars(limits.AS_USED)},
        "rows": about["origin"],
        "version": __version__,
    }


def _show(job: Job, figures: JsonObject, about: JsonObject, target: Path, console: Console) -> None:
    """Show the comparison, and where the export is."""
    unit = "rows" if job.scores else "positions"
    head = ["difference from the stage", "in float32", "limit"]
    allowed = [limits.LIMITS[job.dtype]]
    if "as_used" in figures:
        head += ["as used", "limit"]
        allowed.append(limits.AS_USED)
    table = Table(f"{job.stage}: read back, on {figures['exact'][unit]} {unit}", head, right=True)
    for key, label in limits.NAMES.items():
        if key in figures["exact"]:
            table.add(label, *_cells(key, list(figures.values()), allowed))
    show(table, console)
    say(console, f"The texts are {about['origin']}.")
    share = limits.lost_share(figures["exact"], about["effect"])
    if share > limits.NOTICEABLE:
        fault = f"rounding to {job.dtype} takes away about {100 * share:.0f} % of what the adapter changes"
        say(console, f"Warning: {fault}; `--dtype float32` keeps it", "yellow")
    say(console, f"{job.stage}: exported to {target}")


def _cells(key: str, figures: Sequence[JsonObject], allowed: Sequence[limits.Limit]) -> list[str]:
    cells = []
    for values, limit in zip(figures, allowed, strict=True):
        cells += [f"{values[key]:.3g}", limits.in_words(limit, key)]
    return cells
