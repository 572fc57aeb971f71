"""Begin labels: find what is compared, sample the pairs, and say where they are from."""

import time
from collections.abc import Callable
from pathlib import Path

from pipeline.system.quiet import quieten_transformers  # isort: skip

from transformers import PreTrainedTokenizerFast

from pipeline.config.schema import RunConfig
from pipeline.export import source
from pipeline.label import folder, judging, pairs, prompts, run, sample
from pipeline.label.asked import NUM_PAIRS, TWICE, Asked, Order
from pipeline.label.prompts import Prompts
from pipeline.label.run import Parts
from pipeline.models import run_models
from pipeline.models.generation import Sampling
from pipeline.records.last_run import now
from pipeline.records.manifest import Manifest
from pipeline.show.tables import duration
from pipeline.system import versions
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

Say = Callable[[str], None]


def begin(asked: Asked, by: str, place: Path, recorded: Manifest, config: RunConfig, say: Say) -> JsonObject:
    """Sample the pairs and put them in the folder; return what label.json says of them.

    Raises:
        UserError: if a stage, the prompts or an option cannot be used, or no two completions differ.
    """
    quieten_transformers()
    run_dir = asked.run_dir
    parts = run.parts_of(run_dir, recorded, config, asked.policies)
    order: Order = asked.order or ("random" if parts.reward is None else "unsure")
    if order == "unsure" and parts.reward is None:
        raise UserError("--order unsure: the run has no finished reward model to be unsure; say `--order random`")
    given = asked.prompts or prompts.default(config, recorded, [one.stage for one in parts.policies])
    given = prompts.place_of(config, given)
    section = run.sampling_of(recorded, config)
    settings = {
        "policies": [one.stage for one in parts.policies],
        "prompts": given,
        "pairs": asked.pairs or NUM_PAIRS,
        "order": order,
        "twice": _twice(asked),
        "temperature": section.temperature if asked.temperature is None else asked.temperature,
        "max_new_tokens": asked.max_new_tokens or section.max_new_tokens,
        "seed": config.seed if asked.seed is None else asked.seed,
        "by": by,
        "judge": asked.judge,
    }
    sampling = Sampling(settings["temperature"], settings["max_new_tokens"], section.batch_size, settings["seed"])
    with source.held(*parts.all):
        for one in parts.all:
            source.verify(one)
        tokenizer = run_models.tokenizer(run_dir, recorded)
        read = prompts.read(config, recorded, given, section.max_prompt_length, tokenizer)
        for remark in read.remarks:
            say(remark)
        say(f"on the {run_models.choose_device(recorded, [one.stage for one in parts.all])}")
        started = time.monotonic()
        drawn, passed_over = _pairs(parts, read, settings, sampling, tokenizer, say)
    drawn = pairs.arranged(drawn, settings["twice"], settings["seed"])
    say(f"sampled in {duration(time.monotonic() - started)}")
    about = _about(config, run_dir, parts, read, settings, sampling) | {"passed_over": passed_over}
    folder.begin(place, about, drawn)
    return about


def _twice(asked: Asked) -> float:
    """Return the share of pairs that are asked twice. A judge is asked for all, since it does not tire."""
    if asked.judge is not None and asked.twice not in (None, 1):
        raise UserError("--twice: a judge is asked for every pair in both orders; leave the option out")
    if asked.judge is not None:
        return 1.0
    return TWICE if asked.twice is None else asked.twice


def _pairs(
    parts: Parts,
    read: Prompts,
    settings: JsonObject,
    sampling: Sampling,
    tokenizer: PreTrainedTokenizerFast,
    say: Say,
) -> tuple[list[pairs.Pair], JsonObject]:
    """Sample, score and order the pairs; return them with the numbers of those that were passed over."""
    sampled = sample.sample(parts, read.rows, settings["pairs"], sampling, tokenizer, say)
    for remark in sampled.passed_over():
        say(remark)
    if len(sampled.pairs) < settings["pairs"]:
        lacking = f"only {len(sampled.pairs)} pairs of different completions were found"
        say(f"{lacking}; for more, give more prompts, or a higher --temperature")
    drawn = sampled.pairs
    if parts.reward is not None:
        say(f"scoring with {parts.reward.stage}")
        drawn = sample.scored(sampled, parts.reward, sampling.batch_size, tokenizer)
    cut_off = [one for pair in drawn for one in pair.completions if not one.ended]
    if cut_off:
        what = f"{len(cut_off)} of {2 * len(drawn)} completions were cut off at {sampling.max_new_tokens} tokens"
        say(f"{what}. Whoever learns from them learns to stop there; a larger --max-new-tokens lets more of them end")
    passed_over = {"identical": sampled.identical, "empty": sampled.empty, "repeated": sampled.repeated}
    return sample.ordered(drawn, settings["order"]), passed_over


def _about(
    config: RunConfig, run_dir: Path, parts: Parts, read: Prompts, settings: JsonObject, sampling: Sampling
) -> JsonObject:
    """Return where the labels are from: all that decides which pairs are asked, and who answers."""
    judge = None
    if settings["judge"] is not None:
        judge = {"function": settings["judge"], "files": judging.files(settings["judge"], config.folder)}
    return {
        "settings": settings,
        "run": {"name": config.name, "path": str(run_dir), "config": str(config.source)},
        "policies": [run.about(one) for one in parts.policies],
        "reward_model": None if parts.reward is None else run.about(parts.reward),
        "prompts": read.about,
        "batch_size": sampling.batch_size,
        "judge": judge,
        "begun": now(),
        "versions": versions.of_packages(),
    }
