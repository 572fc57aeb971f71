"""Make a run short: every stage of the config on a few rows and for a few steps, in a run folder of its own.

Everything else stays as the config says. On a GPU the batches and lengths stay too, and the longest rows are among the
few, since they decide about memory. On a CPU what would take too long is cut.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.chain import basis, forecast, run_folder
from pipeline.chain.cuts import Cut, full_batch
from pipeline.chain.forecast import Measured
from pipeline.chain.sizes import Size
from pipeline.config.options import effective, value_at
from pipeline.config.schema import RunConfig, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.records import manifest
from pipeline.records.manifest import Manifest
from pipeline.records.progress import Reader
from pipeline.records.stage_folder import LOCK, PROGRESS, SMOKE
from pipeline.system.device import Device
from pipeline.system.errors import UserError

SUFFIX = "-smoke"
TRY = "-try"  # of the folder of a short run beside the long one
WAIT = 5  # seconds, for another smoke run that is about to end
FILES = ("cache", "tokenizer", "manifest.json", "chain.json", "last_run.json", "report.html", SMOKE)  # of a run folder


def folder_of(config: RunConfig) -> Path:
    """Return the run folder of a config's smoke run, beside the run's own."""
    return config.run_path.with_name(config.run_path.name + SUFFIX)


def measured_of(config: RunConfig) -> dict[str, Measured]:
    """Return what the smoke run of a config has measured; a short run for a try takes that of the long run."""
    found = forecast.read(folder_of(config))
    folder = config.run_path
    if not folder.name.endswith(TRY):
        return found
    return forecast.read(folder.with_name(folder.name.removesuffix(TRY) + SUFFIX)) | found


def overrides(config: RunConfig, cuts: Mapping[str, Cut], on_gpu: bool) -> tuple[str, ...]:
    """Return what makes a run short, as the command line takes it."""
    rows = {name: one.rows for name, one in cuts.items()}
    values: dict[str, object] = {
        "name": config.name + SUFFIX,
        "run_dir": str(folder_of(config)),
        "smoke": {"rows": rows, "longest": on_gpu},
        "training.report_to": "none",
    }
    if config.gate == "stop":
        values["gate"] = "warn"
    for name, one in cuts.items():
        stage = config.stages[name]
        before = effective(stage.kind, stage.training) if isinstance(stage, TrainingStage) else {}
        for key, value in one.options.items():
            if before.get(key) != value:
                values[f"stages.{name}.training.{key}"] = value
        for key, value in one.keys.items():
            values[f"stages.{name}.{key}"] = value
    return tuple(f"{key}={json.dumps(value)}" for key, value in values.items())


def words(config: RunConfig, sizes: Mapping[str, Size], cuts: Mapping[str, Cut]) -> Iterator[list[str]]:
    """Say of each stage what is changed: its name, rows, steps, batch on a device, and the longest completion."""
    for name, one in cuts.items():
        stage = config.stages[name]
        size = sizes[name]
        options = effective(stage.kind, stage.training) if isinstance(stage, TrainingStage) else {}
        rows = "streamed" if size.rows == 0 else _of(min(one.rows, size.rows), size.rows)
        steps = "" if one.steps is None else _of(one.steps, size.steps)
        batch = _of(one.batch, full_batch(stage, options))
        key = type_of(stage).new_tokens
        length = ""
        if key is not None and one.new_tokens is not None:
            length = _of(one.new_tokens, value_at(stage, key))
        yield [name, rows, steps, batch, length]


def _of(part: int, whole: int) -> str:
    return f"{part:,}" if part == whole else f"{part:,} of {whole:,}"


@contextlib.contextmanager
def cleared(config: RunConfig) -> Iterator[None]:
    """Remove what an earlier smoke run has left in its run folder, and keep others from it while the block runs.

    The lock lies beside the folder, since between two stages no process holds a lock in it. An empty file of
    measurements is left in the folder: it tells the next one that the folder is a smoke run's.

    Raises:
        UserError: if the folder is another run's, or no smoke run's, or a process is at work in it.
    """
    run_folder.open_run(config)  # before anything is written
    folder = config.run_path
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder.with_name(f".{folder.name}.lock")).acquire(timeout=WAIT)
    except Timeout:
        mend = "give the same command again when it has ended"
        raise UserError(f"another smoke run is at work in {folder}; {mend}") from None
    with lock:
        if manifest.read(folder) is not None:
            _remove(config, run_folder.open_run(config))
        folder.mkdir(parents=True, exist_ok=True)
        forecast.write(folder, {})
        yield


def _remove(config: RunConfig, recorded: Manifest) -> None:
    """Remove a smoke run's stages and its own files."""
    folder = config.run_path
    if not (folder / SMOKE).is_file():
        mend = "move it away, or give this config another `run_dir`"
        raise UserError(f"{folder} holds a run that is no smoke run, and a smoke run would remove it; {mend}")
    names = [name for name in {*config.stages, *recorded.stages} if (folder / name / LOCK).is_file()]
    for name in names:
        try:
            with FileLock(folder / name / LOCK).acquire(timeout=0):
                pass
        except Timeout:
            raise UserError(f"another process works in {folder} (stage {name!r}); wait for it or stop it") from None
    for path in (folder / name for name in (*names, *FILES)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def measure(
    config: RunConfig,
    full: RunConfig,
    sizes: Mapping[str, Size],
    cuts: Mapping[str, Cut],
    devices: Mapping[str, Device],
    processes: Mapping[str, int],
    launches: Mapping[str, str | None],
) -> dict[str, Measured]:
    """Return what a finished smoke run measured of its stages; `full` is the config of the run.

    `launches`: the digest of how each stage is launched.
    """
    recorded = run_folder.open_run(config)
    measured: dict[str, Measured] = {}
    for name, size in sizes.items():
        entries = Reader(config.run_path / name / PROGRESS).read()
        record = recorded.stages[name]
        fixed, seconds, units = forecast.of_stage(config, name, size, record, entries, processes[name])
        stage = full.stages[name]
        options = effective(stage.kind, stage.training) if isinstance(stage, TrainingStage) else {}
        measured[name] = Measured(
            basis=basis.of_stage(full, name, devices[name], processes[name], launches[name]),
            duration=record.duration,
            fixed=fixed,
            seconds=seconds,
            units=units,
            batch=cuts[name].batch,
            full_batch=full_batch(stage, options),
        )
    return measured
