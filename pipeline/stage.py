"""One stage in its own process: `accelerate launch [--config_file X] -m pipeline.stage CONFIG STAGE [KEY=VALUE ...]`.

`rlhf run` starts this for every stage that is not current; under several processes it is also started by hand. The
stage's module trains; here are what comes before it (locks, hand-over checks) and after it (checksums, the record).
"""

import contextlib
import dataclasses
import datetime
import importlib
import shutil
import sys
import threading
import time
from typing import Literal, cast

from pipeline.system.quiet import quieten_transformers  # isort: skip

import torch
import transformers
from accelerate import PartialState
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerFast

from pipeline.base import base_model, dtype
from pipeline.chain import gate, run_folder, staleness
from pipeline.chain.staleness import Decision
from pipeline.config import graph, precision
from pipeline.config.graph import parents
from pipeline.config.lineage import output_folder, place_of
from pipeline.config.load import load
from pipeline.config.schema import RunConfig, Stage, Taken, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.data import run_tokenizer
from pipeline.launch import channel, sharding
from pipeline.launch.channel import Launch
from pipeline.launch.joining import forget_options, join_processes
from pipeline.models.loading import Loader
from pipeline.records import manifest
from pipeline.records.figures import figures_of_record
from pipeline.records.manifest import Output, Record
from pipeline.records.progress import Progress
from pipeline.records.stage_folder import CHECKPOINTS, GATE, LOCK, PROGRESS, TRACKING
from pipeline.system import device, digests, disk, streams, versions
from pipeline.system.errors import UserError, reason_of
from pipeline.system.processes import same_everywhere
from pipeline.training import checkpoints
from pipeline.training.context import Result, StageContext

BY_HAND = Launch()


def main() -> None:
    """Entry point: run one stage, or say that it is finished already."""
    if len(sys.argv) < 3:
        raise SystemExit("usage: accelerate launch -m pipeline.stage CONFIG STAGE [KEY=VALUE ...]")
    streams.prepare()
    path, name, *overrides = sys.argv[1:]
    answers = None
    try:
        launch, answers = channel.received()
        if answers is not None and launch.launcher is not None:
            watch = (launch.launcher, answers)
            threading.Thread(target=channel.end_with_launcher, args=watch, daemon=True).start()
        config = load(path, tuple(overrides))
        with disk.reported(config.run_path):
            run(config, name, launch)
    except UserError as error:
        channel.report_error(answers, str(error))
        # Any process may be the one that found it, and a progress bar may be in the middle of its line.
        print(f"\nerror: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def run(config: RunConfig, name: str, launch: Launch = BY_HAND) -> None:
    """Run stage `name` if its record is not current. `launch`: what its launcher says.

    Raises:
        UserError: if it cannot start: unknown name, unfinished parents, another process at work on it.
    """
    if name not in config.stages:
        raise UserError(f"there is no stage {name!r} in {config.source}; it has {', '.join(config.stages)}")
    state = join_processes(getattr(config.stages[name], "training", config.training))
    if fault := sharding.refusal(config, name, sharding.of_process(), device.of_torch):
        raise UserError(f"stages.{name}: {fault}")
    ignored = forget_options(config, name)
    with contextlib.ExitStack() as held:
        progress = Progress()
        if state.is_main_process:
            held.enter_context(_locked(config, name))
            progress = held.enter_context(Progress(config.run_path / name / PROGRESS, launch.token))
            for message in ignored:
                progress.say(f"{name}: {message}", once=True)
        decision = same_everywhere(lambda: _prepare(config, name, launch, progress))
        if decision.run:
            _execute(config, name, decision, state, progress)
        elif state.is_main_process:
            # It may have been killed at its end.
            shutil.rmtree(config.run_path / name / CHECKPOINTS, ignore_errors=True)
            progress.say(f"{name}: finished already, and nothing changed")


def _prepare(config: RunConfig, name: str, launch: Launch, progress: Progress) -> Decision:
    """Decide whether a stage runs, from its record and those of the stages that it builds on.

    Raises:
        UserError: if it may not start: a parent is not finished or damaged, the gate failed, or its checkpoints are
            of another number of processes.
    """
    recorded = run_folder.prepare_run(config)
    needed = [*graph.ancestors(config, name), name]
    decisions = {decision.stage: decision for decision in staleness.decide(config, recorded, names=needed)}
    decision = decisions[name]
    if not decision.run:
        return decision
    (config.run_path / name / GATE).unlink(missing_ok=True)  # an earlier start's
    for role, parent in parents(config.stages[name]).items():
        if decisions[parent].run:
            why = f"which is not finished: {decisions[parent].reason}"
            raise UserError(f"stage {name!r} needs {parent!r} ({role}), {why}. Run it first")
        manifest.verify(config.run_path, parent, recorded.stages[parent])
    verdicts = gate.check(config, name, recorded)
    for verdict in verdicts if config.smoke is None else []:  # a few rows say nothing about a model
        goes_on = ". It goes on, since `gate` is `warn`" if verdict.passed is False else ""
        progress.say(f"{name}: gate: {verdict}{goes_on}")
    identity = decision.identity or staleness.identify(config, name, recorded)  # it may not be readable
    folder = config.run_path / name / CHECKPOINTS
    if launch.redo:
        shutil.rmtree(folder, ignore_errors=True)
        (folder.parent / TRACKING).unlink(missing_ok=True)  # a new curve
    checkpoints.check_processes(folder, name, identity.digest(), PartialState().num_processes)
    # The launcher decided when the records of all stages were still there.
    reason = decision.reason if launch.reason is None else launch.reason
    return dataclasses.replace(decision, identity=identity, reason=reason)


def _execute(config: RunConfig, name: str, decision: Decision, state: PartialState, progress: Progress) -> None:
    """Run the stage's module, and put its output and its record in the run folder."""
    assert decision.identity is not None, "a stage that may start has one"
    started = time.time()
    tokenizer = run_tokenizer.open_saved(config.run_path / "tokenizer", config.model.trust_remote_code)
    fingerprint = run_tokenizer.fingerprint(tokenizer)
    _same_tokenizer(config, name, fingerprint)
    identity = decision.identity.digest()
    loader = _loader(config, tokenizer)
    ctx = StageContext(config, name, tokenizer, fingerprint, loader, identity, progress=progress)
    _say_device(ctx)
    quieten_transformers()
    ctx.rows()  # refused before the record is dropped, where the launcher has not looked at them
    with contextlib.ExitStack() as held:
        followed = ctx.trackers.following(config, name, ctx.identity, decision.identity.config)
        same_everywhere(lambda: held.enter_context(followed))  # likewise
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
            _finish(ctx, decision, result, started, state.num_processes)
    state.wait_for_everyone()


def _say_device(ctx: StageContext[Stage]) -> None:
    """Say where a stage computes, and in which types.

    Raises:
        UserError: if it asks for what the device does not have; a launcher has looked already.
    """
    faults = precision.faults(ctx.config, ctx.name, ctx.device)
    if faults:
        raise UserError("\n  ".join(f"stages.{ctx.name}: {fault}" for fault in faults))
    if isinstance(ctx.stage, Taken):  # it computes nothing
        return
    words = f"on the {ctx.device}, weights in {ctx.loader.dtype}"
    if isinstance(ctx.stage, TrainingStage):
        choice = precision.autocast(ctx.stage, ctx.device)
        words += f", {'no' if choice.type == 'no' else choice.type} autocast ({choice.why})"
    ctx.say(f"{ctx.name}: {words}", once=True)


def _finish(ctx: StageContext[Stage], decision: Decision, result: Result, started: float, world_size: int) -> None:
    """Put the new output in the old one's place, and commit the record last."""
    assert decision.identity is not None, "a stage that has run has one"
    run_dir = ctx.config.run_path
    record = Record(
        **vars(decision.identity),  # config, inputs
        **vars(result),  # metrics, parameters, datasets, resumed_from_step, origin
        type=ctx.stage.type,
        parents=parents(ctx.stage),
        config_digest=digests.digest(decision.identity.config),
        output=_replace_output(ctx),
        tokenizer=ctx.tokenizer_key,
        seed=ctx.seed,
        versions=versions.of_packages(),
        world_size=world_size,
        started=datetime.datetime.fromtimestamp(started, datetime.UTC).isoformat(timespec="seconds"),
        duration=round(time.time() - started, 2),
        git_revision=versions.git_revision(ctx.config.folder),
        reason=decision.reason,
    )
    ctx.trackers.finish()
    manifest.commit(run_dir, ctx.name, record)
    try:
        ctx.trackers.summarise(figures_of_record(record.type, record.metrics))
    except Exception as error:  # whatever a tracker raises: the stage is finished
        ctx.say(f"{ctx.name}: a tracker did not take the final figures: {reason_of(error)}")
    shutil.rmtree(ctx.folder / CHECKPOINTS, ignore_errors=True)
    ctx.say(f"{ctx.name}: finished in {record.duration:.0f} s, output in {run_dir / record.output.path}")


def _replace_output(ctx: StageContext[Stage]) -> Output:
    """Put the new output in the old one's place; returns what to record of it."""
    path = output_folder(ctx.name)
    folder = ctx.config.run_path / path
    kind: Literal["full", "adapter", "report"] = "report"
    full = None
    if isinstance(ctx.stage, TrainingStage):
        ctx.tokenizer.save_pretrained(ctx.new_output)
    if isinstance(ctx.stage, TrainingStage | Taken):
        place = place_of(ctx.config, ctx.name)
        kind = "full" if place.adapter is None else "adapter"
        full = None if place.adapter is None else place.full
    shutil.rmtree(folder, ignore_errors=True)
    ctx.new_output.rename(folder)
    merged = ctx.folder / "merged"
    if full != f"{ctx.name}/merged":
        shutil.rmtree(merged, ignore_errors=True)
    files = digests.checksums(ctx.config.run_path, [folder, merged])
    return Output(kind=kind, path=path, full=full, files=files)


def _loader(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> Loader:
    """Return what loads the run's weights, in every stage alike."""
    return Loader(
        base=config.resolve(config.model.path) if config.model.path else "",
        dtype=dtype.choose(config).dtype,
        revision=base_model.revision_of(config),
        attn_implementation=config.model.attn_implementation,
        trust_remote_code=config.model.trust_remote_code,
        quantization=config.quantization,
        pad_token_id=cast("int | None", tokenizer.pad_token_id),
        eos_token_id=cast("int | None", tokenizer.eos_token_id),
    )


def _same_tokenizer(config: RunConfig, name: str, fingerprint: str) -> None:
    """Compare the run's tokenizer with the one on record, and with that of every parent.

    A parent's own files are as they were when it finished: their checksums have been compared.

    Raises:
        UserError: if one is another tokenizer.
    """
    mend = "Start a new run folder, or restore the tokenizer"
    recorded = run_folder.open_run(config)
    if recorded.tokenizer is None or fingerprint != recorded.tokenizer.fingerprint:
        raise UserError(f"{config.run_path / 'tokenizer'} is not the tokenizer this run was started with. {mend}")
    for parent in parents(config.stages[name]).values():
        record = recorded.stages.get(parent)
        if record is None:
            raise UserError(f"the record of {parent!r} is gone: another process runs it again. Run {name!r} after it")
        if record.tokenizer != fingerprint:
            folder = config.run_path / output_folder(parent)
            raise UserError(f"{folder} holds another tokenizer than the run's; {name!r} cannot use it. {mend}")


def _locked(config: RunConfig, name: str) -> contextlib.AbstractContextManager[object]:
    """Take the stage's lock: one process group at a time works on it. It dies with its holder, also under `kill -9`.

    Raises:
        UserError: if another process group holds it.
    """
    run_folder.open_run(config)  # a folder with a lock counts as one of the run's
    folder = config.run_path / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return FileLock(folder / LOCK).acquire(timeout=15)
    except Timeout:
        raise UserError(f"stage {name!r} is being run by another process; wait for it or stop it") from None


if __name__ == "__main__":
    main()
