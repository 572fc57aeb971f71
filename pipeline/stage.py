"""One stage in its own process: `accelerate launch [--config_file X] -m pipeline.stage CONFIG STAGE [KEY=VALUE ...]`.

`rlhf run` starts this for every stage that is not current; under several processes it is also started by hand. The
stage's module trains; here are what comes before it (locks, hand-over checks) and after it (checksums, the record).
"""

import contextlib
import datetime
import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from pipeline.chain import run_folder
from pipeline.config import graph
from pipeline.system import digests

from pipeline.system.quiet import quieten_transformers  # isort: skip

import psutil
import torch
import transformers
from accelerate import DistributedType, PartialState
from filelock import FileLock, Timeout

from pipeline.base import base_model
from pipeline.chain import gate, staleness
from pipeline.config import options
from pipeline.config.graph import parents
from pipeline.config.lineage import output_folder, place_of
from pipeline.config.load import load
from pipeline.config.schema import Options, RunConfig, Stage, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.data import run_tokenizer
from pipeline.launch import sharding
from pipeline.launcher import LAUNCHER, REDO
from pipeline.models.loading import Loader
from pipeline.records import manifest
from pipeline.records.manifest import Output, Record
from pipeline.system import disk, streams
from pipeline.system.errors import UserError
from pipeline.system.processes import same_everywhere
from pipeline.training import checkpoints
from pipeline.training.context import Result, StageContext

PACKAGES = ("rlhf-pipeline", "torch", "transformers", "trl", "peft", "accelerate", "datasets", "bitsandbytes")


def main() -> None:
    """Entry point: run one stage, or say that it is finished already."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: accelerate launch -m pipeline.stage CONFIG STAGE [KEY=VALUE ...]")
    streams.prepare()
    if LAUNCHER in os.environ:
        os.environ.pop("PYTHONSAFEPATH", None)  # it was for this process, not for what a user's function starts
    path, name, *overrides = sys.argv[1:]
    threading.Thread(target=_end_with_launcher, args=[os.environ.get(LAUNCHER)], daemon=True).start()
    try:
        config = load(path, tuple(overrides))
        with disk.reported(config.run_path):
            run(config, name)
    except UserError as error:
        # Any process may be the one that found it, and a progress bar may be in the middle of its line.
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(config: RunConfig, name: str) -> None:
    """Run stage `name` if its record is not current.

    Raises:
        UserError: if it cannot start: unknown name, unfinished parents, another process at work on it.
    """
    if name not in config.stages:
        raise UserError(f"there is no stage {name!r} in {config.source}; it has {', '.join(config.stages)}")
    if fault := sharding.refusal(config, name, sharding.of_process()):
        raise UserError(f"stages.{name}: {fault}")
    state = _join_processes(getattr(config.stages[name], "training", config.training))
    ignored = _forget_options(config.stages[name])
    if state.is_main_process:
        for message in ignored:
            print(f"{name}: {message}", flush=True)
    with _locked(config, name) if state.is_main_process else contextlib.nullcontext():
        decided = same_everywhere(lambda: _prepare(config, name))
        if isinstance(decided, UserError):
            raise decided
        if decided is not None:
            _execute(config, name, decided, state)
        elif state.is_main_process:
            shutil.rmtree(config.run_path / name / "checkpoints", ignore_errors=True)  # if it was killed at its end
            print(f"{name}: finished already, and nothing changed", flush=True)


def _join_processes(training: Options) -> PartialState:
    """Join the other processes of `accelerate launch`, on CPUs where there is no GPU or none is wanted.

    accelerate starts several CPU processes but does not tell them so: each would run alone, as the only one. Whoever
    joins first decides the backend and the timeout, so TRL's config class would come too late with them.
    """
    if training.get("use_cpu") or not torch.cuda.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
    fields = transformers.TrainingArguments.__dataclass_fields__
    seconds = training.get("ddp_timeout", fields["ddp_timeout"].default)
    state = PartialState(
        cpu=os.environ.get("ACCELERATE_USE_CPU") == "true",
        backend=training.get("ddp_backend"),
        timeout=datetime.timedelta(seconds=seconds),
    )
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if state.num_processes != world_size:
        raise UserError(f"{world_size} processes were started, but only {state.num_processes} found each other")
    num_gpus = torch.cuda.device_count() if state.device.type == "cuda" else 0
    if state.distributed_type == DistributedType.NO and num_gpus > 1:
        raise UserError(
            f"one process sees {num_gpus} GPUs: torch's DataParallel would make every batch {num_gpus} times as large. "
            "Set CUDA_VISIBLE_DEVICES to one of them, e.g. CUDA_VISIBLE_DEVICES=0, or start a process for each with "
            "`accelerate launch --config_file accelerate_configs/multi_gpu.yaml`"
        )
    return state


def _forget_options(stage: Stage) -> list[str]:
    """Take the launcher's precision and accumulation out of the environment; returns what to say of those that differ.

    accelerate would put them in the place of the stage's own: of precision where `bf16` and `fp16` are false, and of
    both in PPO.
    """
    precision = os.environ.pop("ACCELERATE_MIXED_PRECISION", "no")
    steps = os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    own_precision, own_steps = "no", steps
    if isinstance(stage, TrainingStage):
        own_precision = options.precision(stage.type, stage.training)
        own_steps = str(options.effective(stage.type, stage.training)["gradient_accumulation_steps"])
    said = []
    if precision not in ("no", own_precision):
        said.append(
            f"mixed_precision {precision} of the launcher is ignored: precision comes from model.dtype and bf16"
        )
    if steps != own_steps and steps is not None:
        said.append(f"gradient_accumulation_steps {steps} of the launcher is ignored: the stage's own is {own_steps}")
    return said


def _prepare(config: RunConfig, name: str) -> staleness.Identity | UserError | None:
    """The identity of the stage to run now; None if its record is current; the error that forbids it."""
    try:
        recorded = run_folder.prepare_run(config)
        decisions = {decision.stage: decision for decision in staleness.decide(config, recorded)}
        if not decisions[name].run:
            return None
        for role, parent in parents(config.stages[name]).items():
            if decisions[parent].run:
                why = f"which is not finished: {decisions[parent].reason}"
                return UserError(f"stage {name!r} needs {parent!r} ({role}), {why}. Run it first")
            manifest.verify(config.run_path, parent, recorded.stages[parent])
        for verdict in gate.check(config, name, recorded):
            print(f"{name}: gate: {verdict}", flush=True)
        identity = staleness.identify(config, name, recorded)  # before anything is dropped: it may not be readable
        folder = config.run_path / name / "checkpoints"
        if os.environ.get(REDO):
            shutil.rmtree(folder, ignore_errors=True)
        checkpoints.check_processes(folder, name, identity.digest(), PartialState().num_processes)
        return identity
    except UserError as error:
        return error


def _execute(config: RunConfig, name: str, identity: staleness.Identity, state: PartialState) -> None:
    started = time.time()
    tokenizer = run_tokenizer.open_saved(config.run_path / "tokenizer", config.model.trust_remote_code)
    key = run_tokenizer.fingerprint(tokenizer)
    _same_tokenizer(config, name, key)
    ctx = StageContext(config, name, tokenizer, key, _loader(config, tokenizer), identity.digest())
    quieten_transformers()
    ctx.rows()  # refused before the record is dropped, where the launcher has not looked at them
    if state.is_main_process:
        manifest.drop(config.run_path, [name, *graph.descendants(config, name)])
        shutil.rmtree(ctx.new_output, ignore_errors=True)
        ctx.new_output.mkdir(parents=True)
    state.wait_for_everyone()
    transformers.set_seed(ctx.seed)
    module = type_of(ctx.stage).module
    result: Result = importlib.import_module(f"pipeline.stages.{module}").run(ctx)
    state.wait_for_everyone()
    if state.is_main_process:
        _finish(ctx, identity, result, started, state.num_processes)
    state.wait_for_everyone()


def _finish(ctx: StageContext, identity: staleness.Identity, result: Result, started: float, world_size: int) -> None:
    """Put the new output in the old one's place, and commit the record last."""
    run_dir = ctx.config.run_path
    output = run_dir / output_folder(ctx.name)
    kind, full = "report", None
    if isinstance(ctx.stage, TrainingStage):
        ctx.tokenizer.save_pretrained(ctx.new_output)
        place = place_of(ctx.config, ctx.name)
        kind, full = ("adapter", place.full) if place.adapter else ("full", None)
    shutil.rmtree(output, ignore_errors=True)
    ctx.new_output.rename(output)
    merged = ctx.folder / "merged"
    if full != f"{ctx.name}/merged":
        shutil.rmtree(merged, ignore_errors=True)
    files = digests.checksums(run_dir, [output, merged])
    record = Record(
        **vars(identity),  # config, inputs
        **vars(result),  # metrics, parameters, datasets, resumed_from_step
        type=ctx.stage.type,
        parents=parents(ctx.stage),
        config_digest=digests.digest(identity.config),
        output=Output(kind=kind, path=output_folder(ctx.name), full=full, files=files),
        tokenizer=ctx.tokenizer_key,
        seed=ctx.seed,
        versions=_versions(),
        world_size=world_size,
        started=datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        duration=round(time.time() - started, 2),
        git_revision=_git_revision(ctx.config.folder),
    )
    manifest.commit(run_dir, ctx.name, record)
    shutil.rmtree(ctx.folder / "checkpoints", ignore_errors=True)
    ctx.say(f"{ctx.name}: finished in {record.duration:.0f} s, output in {output}")


def _loader(config: RunConfig, tokenizer: Any) -> Loader:
    base = config.resolve(config.model.path) if config.model.path else ""
    options = config.model.model_dump(exclude={"path", "scratch"}) | {"quantization": config.quantization}
    options["revision"] = base_model.revision_of(config)
    return Loader(base, **options, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)


def _same_tokenizer(config: RunConfig, name: str, key: str) -> None:
    """The run's tokenizer is the one on record, and every parent's output carries it."""
    mend = "Start a new run folder, or restore the tokenizer"
    if key != manifest.read(config.run_path).tokenizer.fingerprint:
        raise UserError(f"{config.run_path / 'tokenizer'} is not the tokenizer this run was started with. {mend}")
    for parent in parents(config.stages[name]).values():
        if not isinstance(config.stages[parent], TrainingStage):
            continue  # a report has no tokenizer
        folder = config.run_path / output_folder(parent)
        carried = run_tokenizer.open_saved(folder, config.model.trust_remote_code)
        if run_tokenizer.fingerprint(carried) != key:
            raise UserError(f"{folder} holds another tokenizer than the run's; {name!r} cannot use it. {mend}")


def _locked(config: RunConfig, name: str) -> contextlib.AbstractContextManager:
    """One process group at a time works on a stage. The lock dies with its holder, also under `kill -9`."""
    run_folder.open_run(config)  # a folder with a lock counts as one of the run's
    folder = config.run_path / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / run_folder.LOCK).acquire(timeout=15)
    except Timeout:
        raise UserError(f"stage {name!r} is being run by another process; wait for it or stop it") from None


def _end_with_launcher(number: str | None) -> None:
    """End this process when the `rlhf run` that started it is gone, so that a killed run leaves nothing training."""
    if number is None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(int(number))
        # A killed process keeps its number until its own parent has asked how it ended.
        while launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
            time.sleep(1)
    os._exit(1)


def _versions() -> dict[str, str]:
    versions = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


def _git_revision(folder: Path) -> str | None:
    command = ["git", "-C", folder, "rev-parse", "HEAD"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    return None


if __name__ == "__main__":
    main()
