"""Completions of policies, sampled once for a run and kept."""

from dataclasses import asdict

from accelerate.utils.memory import clear_device_cache

from pipeline.base import base_model
from pipeline.config.lineage import root
from pipeline.config.schema import BASE, Stage
from pipeline.models.generation import Ids, Sampling, batches, generate
from pipeline.models.loading import Model, Weights, load_policy, to_device
from pipeline.records import manifest
from pipeline.records.progress import SAMPLING
from pipeline.system.digests import digest
from pipeline.system.processes import share_of
from pipeline.training.context import StageContext
from pipeline.training.store import Store


def weights_of(ctx: StageContext[Stage], policy: str) -> Weights:
    """Find the weights of a policy: those of a stage, or for `base` the run's model before any alignment."""
    return ctx.weights(root(ctx.config)) if policy == BASE else ctx.weights_of(policy)


def identity_of(ctx: StageContext[Stage], stage: str) -> str:
    """Return a digest of the weights of a stage, or of the base model."""
    recorded = manifest.read(ctx.config.run_path)
    assert recorded is not None, "the manifest is written before any stage runs"
    record = recorded.stages.get(stage)
    if record is not None:
        return digest([record.config_digest, record.inputs, record.output.files])
    if ctx.config.model.path:
        return digest([base_model.fingerprint(ctx.config), ctx.loader.dtype, ctx.config.quantization])
    full = root(ctx.config).full
    assert full is not None, "a run from scratch has a pretrain stage"
    return identity_of(ctx, full.split("/")[0])  # the stage's own folder, which has its name


def completions(
    ctx: StageContext[Stage],
    policy: str,
    prompts: list[Ids],
    sampling: Sampling,
    num_completions: int = 1,
    model: Model | None = None,
) -> list[list[Ids]]:
    """Return the policy's completions of each prompt, the same in all processes; those that are kept are not drawn.

    All processes must call it. Prompts are sampled in batches of `sampling.batch_size`, in order, and kept by batch.
    `model` is the policy on this process's device, in eval mode; None: it is loaded if completions are lacking.
    """
    identity = [identity_of(ctx, policy), ctx.tokenizer_key, asdict(sampling)]
    file = ctx.cache / f"completions-{digest(identity)[:16]}.jsonl"
    store: Store[list[Ids]] = Store(file, "batch", "completions")
    by_key = store.read()
    in_batches = list(batches(prompts, sampling.batch_size))
    # Batches by their key in the store: the number of the draw, and the prompts.
    wanted = {digest((draw, batch)): (draw, batch) for draw in range(num_completions) for batch in in_batches}
    lacking = [key for key in wanted if key not in by_key]
    number = sum(len(wanted[key][1]) for key in lacking)
    kept = sum(len(batch) for _, batch in wanted.values()) - number
    again = f"{kept} completions of {policy} are there already, from the same prompts" if kept else ""
    if again and not lacking:
        ctx.say(f"{ctx.name}: {again}")
    if lacking:
        ctx.say(f"{ctx.name}: sampling {number} completions from {policy}{'; ' if again else ''}{again}")
        loads = model is None
        if model is None:
            model = to_device(load_policy(ctx.loader, weights_of(ctx, policy)))
        sampled = {}
        for key in ctx.progress.each(share_of(lacking), f"{SAMPLING} {policy}"):
            draw, batch = wanted[key]
            sampled[key] = generate(model, batch, sampling, ctx.tokenizer, draw)
        del model
        if loads:
            clear_device_cache(garbage_collection=True)
        by_key |= store.add(sampled)
    draws = [[ids for batch in in_batches for ids in by_key[digest((draw, batch))]] for draw in range(num_completions)]
    return [list(of_prompt) for of_prompt in zip(*draws, strict=True)]
