"""What a plan shows and what must hold before anything is trained: rows, tokens, steps, parameters, functions."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import data, scoring
from pipeline.errors import UserError
from pipeline.models import from_scratch, lora_config, num_parameters
from pipeline.options import with_defaults
from pipeline.schema import RunConfig, TrainingStage
from pipeline.trainers import config_class


@dataclass(frozen=True)
class Facts:
    """What a stage would do: rows and tokens per dataset, optimizer steps, parameters."""

    rows: dict[str, int]
    dropped: dict[str, int]
    tokens: dict[str, int]
    steps: int | None
    parameters: dict[str, int]


def length_limit(stage: Any) -> tuple[int | None, str]:
    """The length a row may have, and the name of the option that says so. SFT and pretraining truncate instead."""
    if stage.type in ("reward", "dpo"):
        default = config_class(stage.type).__dataclass_fields__["max_length"].default
        return stage.training.get("max_length", default), "training.max_length"
    if stage.type in ("pretrain", "sft"):
        return None, ""
    return stage.max_prompt_length, "max_prompt_length"


def check(config: RunConfig, names: list[str], tokenizer: Any, key: str) -> dict[str, Facts]:
    """Read every dataset and import every function of the stages `names`.

    Raises:
        UserError: with one line for each stage that could not run.
    """
    problems: list[str] = []
    facts: dict[str, Facts] = {}
    for name in names:
        try:
            facts[name] = _facts(config, name, tokenizer, key)
        except UserError as error:
            problems.append(f"stages.{name}: {error}")
    if problems:
        count = "1 stage" if len(problems) == 1 else f"{len(problems)} stages"
        raise UserError(f"{config.source}: {count} cannot run\n" + "\n".join(f"  {problem}" for problem in problems))
    return facts


def _facts(config: RunConfig, name: str, tokenizer: Any, key: str) -> Facts:
    stage, folder = config.stages[name], config.source.parent
    want = data.WANTED_BY[stage.type]
    rows, dropped, tokens = {}, {}, {}
    for dataset in dict.fromkeys(filter(None, (stage.data, getattr(stage, "eval_data", None)))):
        source = data.find(dataset, config.data[dataset], folder)
        tokenised = data.tokenise(data.rows_for(source, want), want, tokenizer, key)
        limit, limit_name = length_limit(stage)
        kept = data.within(tokenised, limit, source, limit_name)
        rows[dataset], dropped[dataset], tokens[dataset] = len(kept), len(tokenised) - len(kept), data.num_tokens(kept)
    for field in ("reward_functions", "judge"):
        references = getattr(stage, field, None) or []
        for reference in [references] if isinstance(references, str) else references:
            scoring.function(reference, folder, f"stages.{name}.{field}")
    if not isinstance(stage, TrainingStage):
        return Facts(rows, dropped, tokens, None, {})
    if stage.type == "ppo":
        options = _options(stage)
        batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
        if rows[stage.data] < batch:
            raise UserError(f"{rows[stage.data]} prompts are fewer than one batch of {batch}; lower the batch sizes")
    steps = _steps(stage, rows[stage.data], tokens[stage.data])
    return Facts(rows, dropped, tokens, steps, _parameters(config, name, tokenizer))


def _options(stage: TrainingStage) -> dict[str, Any]:
    """The stage's TRL options with TRL's defaults."""
    fields = config_class(stage.type).__dataclass_fields__
    return {key: field.default for key, field in fields.items()} | with_defaults(stage.type, stage.training)


def _steps(stage: TrainingStage, num_rows: int, num_tokens: int) -> int:
    """Optimizer steps in one process (PPO: updates of the policy); fewer under several processes."""
    options = _options(stage)
    if options["max_steps"] > 0:
        return int(options["max_steps"])
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    if stage.type == "ppo":
        return math.ceil((options["total_episodes"] or options["num_train_epochs"] * num_rows) / batch)
    if stage.type in ("rloo", "grpo"):
        num_rows *= options["num_generations"]
    if options.get("packing"):
        num_rows = max(1, num_tokens // options["max_length"])
    return math.ceil(math.ceil(num_rows / batch) * options["num_train_epochs"])


def _parameters(config: RunConfig, name: str, tokenizer: Any) -> dict[str, int]:
    """Trainable and total parameters, counted on a model without memory. A reward model adds its score head."""
    stage: TrainingStage = config.stages[name]
    with init_empty_weights(include_buffers=False):
        if config.model.scratch:
            options = config.model.scratch.architecture
            try:
                model = from_scratch(
                    options, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, "float32", 0
                )
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise UserError(f"model.scratch.architecture: cannot be built: {error}") from None
        else:
            where = config.resolve(config.model.path)
            options = {"revision": config.model.revision, "trust_remote_code": config.model.trust_remote_code}
            try:
                model = AutoModelForCausalLM.from_config(
                    AutoConfig.from_pretrained(where, **options), dtype=torch.float32
                )
            except (OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"model.path: no model at {config.model.path!r}: {reason}") from None
        model.tie_weights()
        if stage.lora is not None:
            try:
                model = get_peft_model(model, lora_config(stage.lora, "CAUSAL_LM"))
            except ValueError as error:
                raise UserError(f"lora: {str(error).strip().splitlines()[0]}") from None
    return num_parameters(model)
