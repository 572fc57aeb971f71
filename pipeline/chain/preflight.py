"""What a plan shows and what must hold before anything is trained: rows, tokens, steps, parameters, functions."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from pipeline.base import base_model, weights
from pipeline.chain import positions
from pipeline.config import functions
from pipeline.config.graph import datasets, functions_of
from pipeline.config.options import effective
from pipeline.config.requests import request, run_data
from pipeline.config.schema import Online, Ppo, RunConfig, TrainingStage
from pipeline.config.stage_types import makes
from pipeline.data.audit import Audit
from pipeline.data.prepare import Datasets
from pipeline.data.stream import TextStream
from pipeline.models.loading import from_scratch, lora_config, num_parameters
from pipeline.system.errors import UserError, all_of, reason_of

# What transformers and PEFT raise at a model or at options that they cannot take.
_ERRORS = (OSError, KeyError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class Facts:
    """What a stage would do: its datasets' rows by role, optimizer steps, parameters."""

    audits: dict[str, Audit]
    steps: int | None = None
    parameters: dict[str, int] | None = None


def check(config: RunConfig, names: list[str], tokenizer: Any, key: str) -> dict[str, Facts]:
    """Read every dataset and import every function of the stages `names`.

    Raises:
        UserError: with one line for each stage that could not run.
    """
    if config.model.path:
        base_model.architecture(config)  # or every stage would say the same of it
        weights.check_base(config, tokenizer)
    problems: list[str] = []
    facts: dict[str, Facts] = {}
    read = Datasets(run_data(config), tokenizer, key)
    for name in names:
        try:
            audits = audit(config, read, name)
            faults = [fault for found in audits.values() for fault in found.problems(config.checks.model_dump())]
            problems += [f"stages.{name}: {fault}" for fault in faults]
            if not faults:
                facts[name] = _facts(config, read, name, audits)
        except UserError as error:
            problems.append(f"stages.{name}: {error}")
    if problems:
        raise all_of(config.source, "stage", "cannot run", problems)
    return facts


def audit(config: RunConfig, read: Datasets, name: str) -> dict[str, Audit]:
    """The account of the datasets of a stage, by role; of a stream that of its first documents.

    Raises:
        UserError: if one cannot be read or does not fit the stage.
    """
    stage, audits = config.stages[name], {}
    for role, dataset in datasets(stage).items():
        if config.data[dataset].streaming:
            length = effective(stage.type, stage.training)["max_length"]
            audits[role] = TextStream(read, dataset, length, config.seed_of(name)).look()
        else:
            audits[role] = read.prepare(request(config, name, role)).audit
    return audits


def _facts(config: RunConfig, read: Datasets, name: str, audits: dict[str, Audit]) -> Facts:
    stage = config.stages[name]
    for field, reference in functions_of(stage):
        prompt = read.prepare(request(config, name, "data")).rows[0]["prompt"][-1]["content"]
        functions.check(reference, config.folder, f"stages.{name}.{field}", prompt)
    positions.check(config, name, audits)
    if not isinstance(stage, TrainingStage):
        return Facts(audits)
    return Facts(audits, _steps(stage, audits["data"]), _parameters(config, stage, read.tokenizer))


def _only_linear(model: PeftModel) -> None:
    """An adapter is on linear layers alone, and the output layer is not among them.

    PEFT keeps the adapters of embeddings under other names, and copies and loads them in other ways.
    """
    inner = model.get_base_model()
    outputs = inner.get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        path = name.removeprefix("base_model.model.")
        if not any(parameter.requires_grad for key, parameter in module.named_parameters() if ".default." in key):
            raise ValueError(f"target_modules: {path!r} is no linear layer; name linear layers, or `all-linear`")
        if module is outputs:
            fault = "is the output layer, which a reward model does not have"
            raise ValueError(f"target_modules: {path!r} {fault}; name other layers, or `all-linear`")


def _steps(stage: TrainingStage, found: Audit) -> int:
    """Optimizer steps in one process (PPO: updates of the policy); fewer under several processes."""
    options, rows, tokens = effective(stage.type, stage.training), found.sequences, found.tokens
    batch = options["per_device_train_batch_size"] * options["gradient_accumulation_steps"]
    if isinstance(stage, Ppo) and rows < batch:
        raise UserError(f"{rows} prompts are fewer than one batch of {batch}; lower the batch sizes")
    if options["max_steps"] > 0:
        return int(options["max_steps"])
    if isinstance(stage, Ppo):
        return math.ceil((options["total_episodes"] or options["num_train_epochs"] * rows) / batch)
    if isinstance(stage, Online):
        rows *= options["num_generations"]
    if options.get("packing"):
        rows = math.ceil(tokens / options["max_length"])  # the last piece is shorter
    return math.ceil(math.ceil(rows / batch) * options["num_train_epochs"])


def _parameters(config: RunConfig, stage: TrainingStage, tokenizer: Any) -> dict[str, int]:
    """Trainable and total parameters, counted on a model without memory. A reward model adds its score head."""
    with init_empty_weights(include_buffers=False):
        model = _model(config, tokenizer)
        if makes(stage, "reward model"):
            _has_score_head(config, model)
        model.tie_weights()
        try:
            if stage.lora is not None:
                model = get_peft_model(model, lora_config(stage.lora, "CAUSAL_LM"))
                _only_linear(model)
        except _ERRORS as error:
            raise UserError(f"lora: {reason_of(error)}") from None
    return num_parameters(model)


def _model(config: RunConfig, tokenizer: Any) -> Any:
    """The run's base model, without weights."""
    base = config.model
    if base.scratch:
        try:
            return from_scratch(base.scratch.architecture, tokenizer, "float32", seed=0)
        except Exception as error:  # models raise what they like at fields that do not fit
            raise UserError(f"model.scratch.architecture: {reason_of(error)}") from None
    try:
        return AutoModelForCausalLM.from_config(
            base_model.architecture(config), dtype=torch.float32, trust_remote_code=base.trust_remote_code
        )
    except _ERRORS as error:
        raise base_model.unreadable(config, "model", error) from None


def _has_score_head(config: RunConfig, model: Any) -> None:
    """There is a class for the base's weights with a score head; models with code of their own may have none."""
    wrong = "this model has no class for sequences with a score (AutoModelForSequenceClassification)"
    try:
        scored = AutoModelForSequenceClassification.from_config(
            model.config, trust_remote_code=config.model.trust_remote_code
        )
    except _ERRORS as error:
        raise UserError(f"model: {wrong}: {reason_of(error)}") from None
    if not hasattr(scored, "score"):
        raise UserError(f"model: {wrong} whose head is called `score`; take another model, or reward functions")
