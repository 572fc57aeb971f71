"""Completions of policies, sampled once for a run and kept."""

import json
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from accelerate.utils.memory import clear_device_cache
from filelock import FileLock

from pipeline.base import base_model
from pipeline.config.lineage import root
from pipeline.config.schema import BASE
from pipeline.models.generation import Ids, Sampling, batches, generate
from pipeline.models.loading import Weights, load_policy, to_device
from pipeline.records import manifest
from pipeline.system.digests import digest
from pipeline.system.processes import same_everywhere
from pipeline.training.context import StageContext


def weights_of(ctx: StageContext, policy: str) -> Weights:
    """Where a policy's weights lie: a stage's, or the run's model before any alignment."""
    return ctx.weights(root(ctx.config)) if policy == BASE else ctx.weights_of(policy)


def identity_of(ctx: StageContext, stage: str) -> str:
    """Digest of the weights of a stage, or of the base model."""
    record = manifest.read(ctx.config.run_path).stages.get(stage)
    if record is not None:
        return digest([record.config_digest, record.inputs, record.output.files])
    if ctx.config.model.path:
        return digest([base_model.digest_of(ctx.config), ctx.config.model.dtype, ctx.config.quantization])
    return identity_of(ctx, root(ctx.config).full.split("/")[0])


def completions(
    ctx: StageContext, policy: str, prompts: list[Ids], sampling: Sampling, num_completions: int = 1
) -> list[list[Ids]]:
    """The policy's completions of each prompt, the same in all processes; drawn only where they are not kept yet.

    All processes must call it. Prompts are sampled in batches of `sampling.batch_size`, in order, and kept by batch.
    """
    identity = [identity_of(ctx, policy), ctx.tokenizer_key, asdict(sampling)]
    file = ctx.cache / f"completions-{digest(identity)[:16]}.jsonl"
    kept = same_everywhere(lambda: _read(file))
    wanted = [(draw, batch) for draw in range(num_completions) for batch in batches(prompts, sampling.batch_size)]
    keys = [digest(pair) for pair in wanted]
    lacking = [i for i, key in enumerate(keys) if key not in kept]
    if lacking:
        ctx.say(f"{ctx.name}: sampling {sum(len(wanted[i][1]) for i in lacking)} completions from {policy}")
        state, found = PartialState(), []
        model = to_device(load_policy(ctx.loader, weights_of(ctx, policy)))
        for i in lacking[state.process_index :: state.num_processes]:
            draw, batch = wanted[i]
            found.append((keys[i], generate(model, batch, sampling, ctx.tokenizer, draw)))
        del model
        clear_device_cache(garbage_collection=True)
        found = gather_object(found)
        kept |= dict(found)
        if state.is_main_process:
            _add(file, found)
        state.wait_for_everyone()  # whoever reads the file next must see all of it
    per_draw = len(keys) // num_completions
    draws = [keys[start : start + per_draw] for start in range(0, len(keys), per_draw)]
    drawn = ([ids for key in draw for ids in kept[key]] for draw in draws)
    return [list(of_prompt) for of_prompt in zip(*drawn, strict=True)]


def _read(file: Path) -> dict[str, list[Ids]]:
    """What is kept, by batch. A line that a stopped process left unfinished is passed over."""
    kept: dict[str, list[Ids]] = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
            kept[entry["batch"]] = entry["completions"]
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _add(file: Path, found: list[tuple[str, list[Ids]]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"), file.open("a") as out:
        out.write("\n" if file.stat().st_size else "")  # after a line that was cut off
        out.writelines(json.dumps({"batch": key, "completions": ids}) + "\n" for key, ids in found)
