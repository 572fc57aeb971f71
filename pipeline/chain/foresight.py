"""Foresee from the sizes of the data what a run would find out only after it has trained."""

import math
from collections.abc import Iterator, Mapping
from statistics import NormalDist
from typing import TYPE_CHECKING

from pipeline.config import graph
from pipeline.config.batch_sizes import batch_in_words, batch_of
from pipeline.config.options import effective, value_at
from pipeline.config.schema import Evaluate, Offline, Ppo, Reinforced, RunConfig, Shift, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.data import chat_templates
from pipeline.data.audit import QUANTILES, Audit
from pipeline.shift.advice import CHANCE
from pipeline.shift.estimate import LEVEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Audits = Mapping[str, Mapping[str, Audit]]  # of each stage that is looked at, by role
FEWEST_PROMPTS = 20  # of an evaluation, as the notes below its table have it
ENOUGH_PROMPTS = 100  # of an evaluation, to tell a win rate to within 0.1
FEWEST_STEPS = 10  # of a training; after fewer a model is about what it was
LARGEST_SHARE = 0.5  # of a dataset that is worth holding out
LEFT_OUT = 0.1  # of the rows of a dataset, which is worth saying
MODEST = 0.6  # the accuracy of a reward model that is of some use as a judge
FAIR = 0.7  # the accuracy of a reward model that is good enough to learn from
_NINE_OF_TEN = QUANTILES.index(0.9)


def faults(config: RunConfig, audits: Audits) -> Iterator[str]:
    """Say what cannot end well whatever is trained: the gate would stop the run."""
    if config.gate == "stop":
        yield from _closed_gates(config, audits)


def warnings(config: RunConfig, audits: Audits, steps: Mapping[str, int]) -> Iterator[str]:
    """Say what is likely to be a mistake, and can be meant; `steps`: of the stages that train."""
    if config.gate == "warn":
        yield from _closed_gates(config, audits)
    if config.gate == "stop":
        yield from _narrow_gates(config, audits)
    yield from _many_left_out(audits)
    for name, by_role in audits.items():
        stage = config.stages[name]
        if isinstance(stage, Shift) and config.gate != "off":
            yield from _few_prompts(name, stage, by_role["data"])
        if isinstance(stage, Evaluate):
            yield from _wide_intervals(config, name, stage, by_role["data"])
            yield from _weak_judge(config, name, stage, audits)
        if name in steps:
            yield from _few_steps(config, name, by_role["data"], steps[name])
        yield from _too_short(config, name, audits)


def fewest_comparisons(limit: float, accuracy: float = 1.0) -> int | None:
    """Return the fewest held-out comparisons with which a reward model of an accuracy passes the gate's limit.

    The gate asks that all of Wilson's interval lies above `limit`. It does where
    n > z^2 limit (1 - limit) / (accuracy - limit)^2, with z of a 95 % interval. None: no number is enough.
    """
    if accuracy <= limit:
        return None
    squared = NormalDist().inv_cdf((1 + LEVEL) / 2) ** 2
    return math.floor(squared * limit * (1 - limit) / (accuracy - limit) ** 2) + 1


def _closed_gates(config: RunConfig, audits: Audits) -> Iterator[str]:
    """Say of which stages the gate could not let pass even a perfect reward model."""
    limit = config.gate_limits.accuracy
    for name, reward, held_out in _gated(config, audits):
        assert limit is not None, "or no stage is gated"
        fewest = fewest_comparisons(limit)
        if fewest is None:
            yield f"stages.{name}: no reward model can pass a gate of `gate_limits.accuracy` = {limit:g}; lower it"
            continue
        if held_out.rows >= fewest:
            continue
        fair = fewest_comparisons(limit, FAIR)
        more = "" if fair is None else f", and one that is right on {FAIR:.0%} needs {fair}"
        needs = f"A reward model that is right on all of them needs {fewest}{more}"
        yield f"stages.{name}: the gate cannot pass: {_too_few(config, reward, held_out, needs, fair or fewest)}"


def _narrow_gates(config: RunConfig, audits: Audits) -> Iterator[str]:
    """Say of which stages the gate lets pass a reward model only if it is right on nearly all held-out comparisons."""
    limit = config.gate_limits.accuracy
    for name, reward, held_out in _gated(config, audits):
        assert limit is not None, "or no stage is gated"
        fewest = fewest_comparisons(limit)
        fair = fewest_comparisons(limit, FAIR)
        if fewest is None or fair is None or not fewest <= held_out.rows < fair:
            continue
        needs = f"A reward model that is right on {FAIR:.0%} of them needs {fair}"
        yield f"stages.{name}: the gate may not pass: {_too_few(config, reward, held_out, needs, fair)}"


def _gated(config: RunConfig, audits: Audits) -> Iterator[tuple[str, str, Audit]]:
    """Go through the stages whose gate asks for an accuracy: name, reward model, and its held-out comparisons."""
    for name in audits:
        stage = config.stages[name]
        if config.gate_limits.accuracy is None or not isinstance(stage, Reinforced) or stage.reward is None:
            continue
        held_out = audits.get(stage.reward, {}).get("eval_data")
        if held_out is not None:
            yield name, stage.reward, held_out


def _too_few(config: RunConfig, reward: str, held_out: Audit, needs: str, wanted: int) -> str:
    """Say how many comparisons a reward model has held out, what it `needs`, and how it gets `wanted`."""
    has = f"{reward} has {held_out.rows} held-out comparisons of {held_out.dataset}"
    return f"{has}. {needs}. {_more_comparisons(config, reward, held_out, wanted)}, or say `gate: warn`"


def _few_prompts(name: str, stage: Shift, audit: Audit) -> Iterator[str]:
    """Say whether a report has too few prompts for an interval over prompts."""
    prompts = min(audit.rows, stage.num_prompts)
    if prompts < 2:
        mend = f"raise `num_prompts` or `data.{audit.dataset}.heldout`, or name a larger dataset as `data`"
        what = "is too few for the gate's verdicts on scores within a prompt, which need 2 at least"
        yield f"stages.{name}: {prompts} prompt {what}; {mend}"


def _wide_intervals(config: RunConfig, name: str, stage: Evaluate, audit: Audit) -> Iterator[str]:
    """Say whether an evaluation has so few prompts that its win rates say little or nothing."""
    prompts = min(audit.rows, stage.num_prompts or audit.rows)
    wanted = FEWEST_PROMPTS if prompts < FEWEST_PROMPTS else ENOUGH_PROMPTS
    if prompts >= wanted:
        return
    half = min(_half_of(prompts), 0.5)
    mend = f"Name a larger dataset as `stages.{name}.data`, or add rows to it"
    if audit.rows > prompts:
        mend = f"Raise `stages.{name}.num_prompts`"
    elif graph.is_shared(config, audit.dataset):
        mend = _more_rows(config, audit, wanted)
    what = f"{prompts} held-out prompt{'' if prompts == 1 else 's'} of {audit.dataset}"
    if wanted == FEWEST_PROMPTS:
        ends = f"a win rate of 0.50 could as well be {0.5 - half:.2f} or {0.5 + half:.2f}"
        yield f"stages.{name}: {what} cannot tell policies apart: {ends}. {mend}"
    else:
        better = f"{wanted} tell it to within {_half_of(wanted):.2f}"
        yield f"stages.{name}: {what} tell a win rate to within {half:.2f}; {better}. {mend}"


def _half_of(prompts: int) -> float:
    """Return half of the width of a win rate's interval, where it is near a tie and few prompts tie."""
    return NormalDist().inv_cdf((1 + LEVEL) / 2) * 0.5 / math.sqrt(max(prompts, 1))


def _weak_judge(config: RunConfig, name: str, stage: Evaluate, audits: Audits) -> Iterator[str]:
    """Say of an evaluation by a reward model alone whether that can be known to be better than chance."""
    held_out = audits.get(stage.reward or "", {}).get("eval_data")
    wanted = fewest_comparisons(CHANCE, MODEST)
    assert wanted is not None, "it is above chance"
    if stage.judge is not None or stage.reward is None or held_out is None or held_out.rows >= wanted:
        return
    # The accuracy for which `fewest_comparisons` would be the number that is there.
    least = CHANCE + _half_of(held_out.rows)
    known = f"only a reward model that is right on {least:.0%} of them" if least < 1 else "no reward model"
    has = f"{held_out.rows} held-out comparison{'' if held_out.rows == 1 else 's'} of {held_out.dataset}"
    more = _more_comparisons(config, stage.reward, held_out, wanted)
    yield (
        f"stages.{name}: its win rates are {stage.reward}'s, and {has} tell {known} from chance. One that is right on "
        f"{MODEST:.0%} needs {wanted}. {more}, or name a `judge`"
    )


def _many_left_out(audits: Audits) -> Iterator[str]:
    """Say of datasets whether many of their rows are too long, and which limit would keep them."""
    stages: dict[tuple[str, str, int | None, int, int, int], list[str]] = {}
    for name, by_role in audits.items():
        audit = by_role.get("data")
        if audit is None:  # a stage that is taken from another run reads none
            continue
        count = 0 if audit.streamed or "too_long" not in audit.dropped else audit.dropped["too_long"].count
        if audit.rows and count > LEFT_OUT * audit.read:
            stages.setdefault((audit.dataset, *audit.limit, audit.enough, count, audit.read), []).append(name)
    for (dataset, option, limit, enough, count, read), names in stages.items():
        yield (
            f"stages.{', '.join(names)}: {count} of {read} rows of {dataset} ({count / read:.0%}) are longer than "
            f"`{option}` = {limit} and are left out. `{option}` = {enough} would keep 95 % of these, for more time and "
            f"memory. If the other rows are enough, leave it"
        )


def no_template(config: RunConfig, tokenizer: "PreTrainedTokenizerFast") -> Iterator[str]:
    """Say that a model without a chat template gets a built-in one that nobody asked for, and which other one fits."""
    template = tokenizer.chat_template
    asked = config.tokenizer.chat_template is not None or config.model.scratch is not None
    if asked or chat_templates.described(template) != f"the chat template {chat_templates.FALLBACK!r}":
        return
    if all(type_of(stage).reads_raw_text for stage in config.stages.values()):
        return
    others = ", ".join(name for name in chat_templates.built_in_names() if name != chat_templates.FALLBACK)
    form = f"the form that the model knows: {others}, or a Jinja file"
    fits = next(iter(chat_templates.fitting(tokenizer.get_vocab()).items()), None)
    if fits is not None:
        name, tokens = fits
        form = f"`{name}`, since the model's vocabulary has its tokens {' and '.join(tokens)}"
    yield (
        f"model.path: {config.model.path} has no chat template, so turns are written as `{chat_templates.FALLBACK}` "
        f"does. For a base model that is all right, since SFT teaches the form. Otherwise set "
        f"`tokenizer.chat_template` to {form}. `rlhf check-data CONFIG --sample 1` shows rows"
    )


def _more_comparisons(config: RunConfig, reward: str, held_out: Audit, wanted: int) -> str:
    """Say how to hold out more."""
    uses = graph.datasets(config.stages[reward])
    if uses["data"] == uses["eval_data"]:
        return _more_rows(config, held_out, wanted)
    return f"Name a larger dataset as `stages.{reward}.eval_data`"


def _more_rows(config: RunConfig, held_out: Audit, wanted: int) -> str:
    """Say how a dataset that is split gets so many held-out rows: by a larger share, where it has rows enough for that.

    Of the rows that are held out some are left out, and others are so too.
    """
    share = config.data[held_out.dataset].heldout
    lost = held_out.read / held_out.rows if held_out.rows else 1.0
    whole = sum(size for _, size in held_out.parts)
    at_share = f"at `data.{held_out.dataset}.heldout` = {share:g}"
    needed = math.ceil(wanted * lost / share)
    words = f"for {wanted} held-out rows it needs about {needed:,} {at_share}, and has {whole:,}"
    if needed <= whole:  # prompts fall on the two sides by chance
        words = f"of its {whole:,} rows {held_out.rows} are held out and usable {at_share}, and {wanted} are needed"
    if wanted * lost <= LARGEST_SHARE * whole:
        larger = math.ceil(100 * max(wanted * lost / whole, share)) / 100
        return f"Raise `data.{held_out.dataset}.heldout` to {larger:g}, or add rows to {held_out.dataset}: {words}"
    return f"Add rows to {held_out.dataset}: {words}"


def _few_steps(config: RunConfig, name: str, audit: Audit, steps: int) -> Iterator[str]:
    """Say of a stage whether it makes so few steps that it hardly learns."""
    stage = config.stages[name]
    if not isinstance(stage, TrainingStage) or steps >= FEWEST_STEPS:
        return
    options = effective(stage.kind, stage.training)
    plural = "" if steps == 1 else "s"
    if isinstance(stage, Ppo):
        ways = f"raise `training.total_episodes`, or lower the batch of {batch_of(options)} ({batch_in_words(options)})"
        yield f"stages.{name}: {steps} update{plural} of the policy change a model little; {ways}"
        return
    if options["max_steps"] > 0 or not isinstance(stage, Offline):  # somebody has chosen the number
        return
    yield (
        f"stages.{name}: it trains for {steps} optimizer step{plural} on {audit.rows} rows of {audit.dataset}, which "
        f"changes a model little. Add rows, raise `training.num_train_epochs` (it is "
        f"{options['num_train_epochs']:g}), or lower the batch of {batch_of(options)} ({batch_in_words(options)})"
    )


def _too_short(config: RunConfig, name: str, audits: Audits) -> Iterator[str]:
    """Say of a stage that samples whether its completions are cut off before any demonstration would have ended."""
    stage = config.stages[name]
    key = type_of(stage).new_tokens
    if key is None:
        return
    limit = value_at(stage, key)
    for parent in graph.ancestors(config, name):
        audit = audits.get(parent, {}).get("data")
        answers = [] if audit is None else audit.lengths.get("completion", [])
        if (
            audit is None
            or not answers
            or type_of(config.stages[parent]).rows != "demonstrations"
            or limit >= answers[0]
        ):
            continue
        yield (
            f"stages.{name}: `{key}` = {limit} is shorter than every answer of {audit.dataset}, which {parent} learns "
            f"from: no completion could end as they do. The shortest has {answers[0]} tokens, nine of ten have "
            f"{answers[_NINE_OF_TEN]} or fewer; raise `{key}`"
        )
