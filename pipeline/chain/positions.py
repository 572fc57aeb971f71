"""Compare the longest sequence of a stage with the positions of the model."""

from collections.abc import Mapping

from pipeline.base import base_model
from pipeline.config.options import effective, value_at
from pipeline.config.schema import RunConfig, Stage, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.data.audit import Audit
from pipeline.data.rows import ROWS
from pipeline.system.errors import UserError


def check(config: RunConfig, name: str, audits: Mapping[str, Audit]) -> None:
    """Compare the longest sequence that stage `name` can meet with the model's positions.

    A model with learnt positions ends in an index error beyond them, one with rotary positions writes nonsense without
    a word. A model that names no limit has none.

    Raises:
        UserError: with the length, the limit and the option to lower.
    """
    positions = base_model.num_positions(base_model.architecture(config))
    if positions is None:
        return
    for audit in audits.values():
        length, made_of, mend = _longest(config.stages[name], audit)
        if length > positions:
            fault = f"{made_of}, but the model has {positions} positions (`max_position_embeddings`)"
            raise UserError(f"{audit.dataset}: {fault}; {mend}")


def _longest(stage: Stage, audit: Audit) -> tuple[int, str, str]:
    """Return the longest sequence in tokens, what it is made of, and how to make it shorter."""
    longest = audit.lengths["row"][-1] if audit.lengths else 0
    if isinstance(stage, TrainingStage) and type_of(stage).reads_raw_text:
        options = effective(stage.kind, stage.training)
        limit = options["max_length"]
        if limit is not None and (audit.streamed or options["packing"]):
            return limit, f"pieces have {limit} tokens", "lower `training.max_length`"
        longest = longest if limit is None else min(longest, limit)
    key = type_of(stage).new_tokens
    if key is None and isinstance(stage, TrainingStage) and "row" in audit.lengths:
        lengths = {name: quantiles[-1] for name, quantiles in audit.lengths.items()} | {"row": longest}
        kind = ROWS[type_of(stage).rows]
        longest, made_of = kind.longest(lengths, effective(stage.kind, stage.training))
        return longest, made_of, "lower `training.max_length`"
    if key is None:
        return longest, f"its longest row has {longest} tokens", "lower `training.max_length`"
    # Rows may have an answer of their own beside the prompt that is sampled from (PPO's `prompt_baseline: reference`).
    prompt = audit.lengths["prompt"][-1] if "prompt" in audit.lengths else longest
    new = value_at(stage, key)
    if longest > prompt + new:
        return longest, f"its longest row has {longest} tokens", "lower `max_prompt_length`"
    made_of = f"its longest prompt of {prompt} tokens and `{key}` = {new} make {prompt + new} tokens"
    return prompt + new, made_of, f"lower `{key}` or `max_prompt_length`"
