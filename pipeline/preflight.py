"""What a plan shows and what must hold before anything is trained: rows, tokens, steps, parameters, functions."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from pipeline import data, scoring
from pipeline.errors import UserError, all_of, reason_of
from pipeline.models import from_scratch, lora_config, num_parameters
from pipeline.options import effective
from pipeline.schema import RunConfig, TrainingStage, datasets, functions


@dataclass(frozen=True)
class Facts:
    """What a stage would do: `rows`, `dropped` and `tokens` of each dataset, optimizer steps, parameters."""

    datasets: dict[str, dict[str, int]]
    steps: int | None = None
    parameters: dict[str, int] | None = None


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
        raise all_of(config.source, "stage", "cannot run", problems)
    return facts


def _facts(config: RunConfig, name: str, tokenizer: Any, key: str) -> Facts:
    stage, counts = config.stages[name], {}
    for dataset in datasets(stage).values():
        kept, dropped = data.prepare(config, name, dataset, tokenizer, key)
        counts[dataset] = {"rows": len(kept), "dropped": dropped, "tokens": data.num_tokens(kept)}
    for field, reference in functions(stage):
        scoring.function(reference, config.folder, f"stages.{name}.{field}")
    if not isinstance(stage, TrainingStage):
        return Facts(counts)
    return Facts(counts, _steps(stage, **counts[stage.data]), _parameters(config, stage, tokenizer))


def _steps(stage: TrainingStage, rows: int, tokens: int, dropped: int) -> int:
    """Optimizer steps in one process (PPO: updates of the policy); fewer under several processes."""
    options = effective(stage.type, stage.training)
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    if stage.type == "ppo" and rows < batch:
        raise UserError(f"{rows} prompts are fewer than one batch of {batch}; lower the batch sizes")
    if options["max_steps"] > 0:
        return int(options["max_steps"])
    if stage.type == "ppo":
        return math.ceil((options["total_episodes"] or options["num_train_epochs"] * rows) / batch)
    if stage.type in ("rloo", "grpo"):
        rows *= options["num_generations"]
    if options.get("packing"):
        rows = max(1, tokens // options["max_length"])
    return math.ceil(math.ceil(rows / batch) * options["num_train_epochs"])


def _parameters(config: RunConfig, stage: TrainingStage, tokenizer: Any) -> dict[str, int]:
    """Trainable and total parameters, counted on a model without memory. A reward model adds its score head."""
    base, where = config.model, "model.scratch.architecture"
    with init_empty_weights(include_buffers=False):
        try:
            if base.scratch:
                model = from_scratch(base.scratch.architecture, tokenizer, "float32", seed=0)
            else:
                where = f"model.path: no model at {base.path!r}"
                options = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
                architecture = AutoConfig.from_pretrained(config.resolve(base.path), **options)
                model = AutoModelForCausalLM.from_config(architecture, dtype=torch.float32)
            model.tie_weights()
            where = "lora"
            if stage.lora is not None:
                model = get_peft_model(model, lora_config(stage.lora, "CAUSAL_LM"))
        except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: {reason_of(error)}") from None
    return num_parameters(model)
