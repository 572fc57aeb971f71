"""Look at what must hold before anything is trained, and at what a plan shows: rows, tokens, steps, parameters."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.base import base_model, dtype, weights
from pipeline.chain import foresight, positions
from pipeline.chain.trials import try_functions
from pipeline.config.batch_sizes import batch_in_words, batch_of, batches_per_sampling
from pipeline.config.graph import datasets, functions_of
from pipeline.config.options import effective
from pipeline.config.requests import request, run_data
from pipeline.config.schema import Online, Options, Ppo, RunConfig, Sampled, TrainingStage
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
    """What a stage would do: its datasets' rows by role, optimizer steps, parameters.

    `prompt`: the one that its functions are tried with; None if it has no functions. `head`: the weights of a score
    head, which are not among the `parameters`; None if it has none. `sampled`: the parameters of the base model, where
    nothing trains.
    """

    audits: dict[str, Audit]
    steps: int | None = None
    parameters: dict[str, int] | None = None
    prompt: str | None = None
    head: int | None = None
    sampled: int | None = None


def check(
    config: RunConfig, names: list[str], tokenizer: PreTrainedTokenizerFast, fingerprint: str
) -> dict[str, Facts]:
    """Read every dataset and import every function of the stages `names`; `fingerprint`: of the tokenizer.

    Raises:
        UserError: with one line for each stage that could not run.
    """
    if config.model.path:
        base_model.architecture(config)  # or every stage would say the same of it
        weights.check_base(config, tokenizer)
        dtype.check_attention(config)
    problems: list[str] = []
    facts: dict[str, Facts] = {}
    looked_at: dict[str, dict[str, Audit]] = {}
    data = Datasets(run_data(config), tokenizer, fingerprint)
    for name, audits, faults in audits_of(config, data, names):
        problems += faults
        if faults:
            continue
        looked_at[name] = audits
        try:
            facts[name] = _facts(config, data, tokenizer, name, audits)
        except UserError as error:
            problems.append(f"stages.{name}: {error}")
    problems += foresight.faults(config, looked_at)
    if problems:
        stages = {problem.partition(":")[0] for problem in problems}
        raise all_of(config.source, "stage", "cannot run", problems, len(stages))
    return facts


def audits_of(
    config: RunConfig, data: Datasets, names: Iterable[str]
) -> Iterator[tuple[str, dict[str, Audit], list[str]]]:
    """Read the datasets of each stage; yields its name, their audits by role, and why they cannot be used.

    There is no audit of a stage whose data cannot be read.
    """
    for name in names:
        try:
            audits = _audits(config, data, name)
        except UserError as error:
            yield name, {}, [f"stages.{name}: {error}"]
            continue
        limits = config.checks.model_dump()
        faults = [(role, fault) for role, audit in audits.items() for fault in audit.problems(limits)]
        yield name, audits, [f"stages.{name}: `{role}`: {fault}" for role, fault in faults]


def _audits(config: RunConfig, data: Datasets, name: str) -> dict[str, Audit]:
    """Return the audit of each dataset of a stage, by role; of a stream that of its first documents.

    Raises:
        UserError: if one cannot be read or does not fit the stage.
    """
    stage = config.stages[name]
    audits: dict[str, Audit] = {}
    for role, dataset in datasets(stage).items():
        if config.data[dataset].streaming:
            assert isinstance(stage, TrainingStage), "only pretraining reads a stream"
            length = effective(stage.kind, stage.training)["max_length"]
            audits[role] = TextStream(data, dataset, length, config.seed_of(name)).look()
        else:
            audits[role] = data.prepare(request(config, name, role)).audit
    return audits


def _facts(
    config: RunConfig, data: Datasets, tokenizer: PreTrainedTokenizerFast, name: str, audits: dict[str, Audit]
) -> Facts:
    stage = config.stages[name]
    prompt = None
    if any(functions_of(stage)):
        prompt = data.prepare(request(config, name, "data")).rows[0]["prompt"][-1]["content"]
        try_functions(config, name, prompt)
    positions.check(config, name, audits)
    if not isinstance(stage, TrainingStage):
        sampled = _parameters_of_base(config, tokenizer) if isinstance(stage, Sampled) else None
        return Facts(audits, prompt=prompt, sampled=sampled)
    head = _hidden_size(config) if makes(stage, "reward model") else None
    return Facts(audits, _steps(stage, audits["data"]), _parameters(config, stage, tokenizer), prompt, head)


def _hidden_size(config: RunConfig) -> int | None:
    """Return the width of the base model, which is the number of weights in a score head; None if it names none."""
    return getattr(base_model.architecture(config).get_text_config(), "hidden_size", None)


def _only_linear(model: PeftModel) -> None:
    """Refuse an adapter that is not on linear layers alone, or that is on the output layer.

    PEFT keeps the adapters of embeddings under other names, and copies and loads them in other ways.

    Raises:
        ValueError: with the name of the first other layer.
    """
    inner = model.get_base_model()
    assert isinstance(inner, PreTrainedModel), "the model that the adapter was put on"
    outputs = inner.get_output_embeddings()
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        assert isinstance(module, torch.nn.Module), "a tuner layer is a mixin of one"
        path = name.removeprefix("base_model.model.")
        if not any(parameter.requires_grad for key, parameter in module.named_parameters() if ".default." in key):
            raise ValueError(f"target_modules: {path!r} is no linear layer; name linear layers, or `all-linear`")
        if module is outputs:
            fault = "is the output layer, which a reward model does not have"
            raise ValueError(f"target_modules: {path!r} {fault}; name other layers, or `all-linear`")


def check_batch(num_rows: int, options: Options, num_processes: int = 1, where: str = "") -> None:
    """Compare the prompts of a PPO stage with its batch, which only the stage itself knows in several processes.

    Raises:
        UserError: if they are fewer: PPOTrainer would make no update.
    """
    batch = batch_of(options, num_processes)
    if num_rows < batch:
        fault = f"{where}{num_rows} prompts are fewer than one batch of {batch} ({batch_in_words(options)}"
        processes = "" if num_processes == 1 else f" x {num_processes} processes"
        raise UserError(f"{fault}{processes}); add rows, or lower one of these options")


def _steps(stage: TrainingStage, audit: Audit) -> int:
    """Return the optimizer steps in one process (PPO: updates of the policy); there are fewer in several processes."""
    options = effective(stage.kind, stage.training)
    rows = audit.sequences
    batch = batch_of(options)
    if isinstance(stage, Ppo):
        check_batch(rows, options)
    if isinstance(stage, Online) and rows < _prompts_at_once(options):
        raise UserError(
            f"{rows} prompts are fewer than the {_prompts_at_once(options)} for which TRL samples at once in one "
            f"process ({batch_in_words(options)}), so there would be no step; add rows, or lower one of these options"
        )
    if options["max_steps"] > 0:
        return int(options["max_steps"])
    if isinstance(stage, Ppo):
        return math.ceil((options["total_episodes"] or options["num_train_epochs"] * rows) / batch)
    if isinstance(stage, Online):
        return _steps_online(options, rows)
    return math.ceil(math.ceil(rows / batch) * options["num_train_epochs"])


def _prompts_at_once(options: Options) -> int:
    """Return for how many prompts RLOO and GRPO sample at once in one process."""
    batches = batches_per_sampling(options)
    return max(options["per_device_train_batch_size"] * batches // options["num_generations"], 1)


def _steps_online(options: Options, prompts: int) -> int:
    """Return the optimizer steps of RLOO and GRPO: they sample for so many prompts at once, and leave out the rest.

    Several steps may learn from the same completions.
    """
    batches = batches_per_sampling(options)
    learned = prompts // _prompts_at_once(options) * batches * options["num_iterations"]
    return math.ceil(math.ceil(learned / options["gradient_accumulation_steps"]) * options["num_train_epochs"])


def _parameters(config: RunConfig, stage: TrainingStage, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Count the trainable and all parameters on a model without memory, and without a score head."""
    with init_empty_weights(include_buffers=False):
        model = _model(config, tokenizer)
        if makes(stage, "reward model"):
            _has_score_head(config, model)
    model.tie_weights()  # in the block above each of the two would become a parameter of its own, and count
    if stage.lora is None:
        return num_parameters(model)
    try:
        with init_empty_weights(include_buffers=False):
            adapted = get_peft_model(model, lora_config(stage.lora, "CAUSAL_LM"))
        _only_linear(adapted)
    except _ERRORS as error:
        raise UserError(f"lora: {reason_of(error)}{_linear_layers(model, error)}") from None
    return num_parameters(adapted)


def _linear_layers(model: PreTrainedModel, error: Exception) -> str:
    """Name the layers that can have an adapter, for an error that says that there are none of a name."""
    if "arget modules" not in str(error):
        return ""
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    outputs = model.get_output_embeddings()
    found -= {name.rpartition(".")[2] for name, module in model.named_modules() if module is outputs}
    return f" It has {', '.join(sorted(found))}, and `all-linear` names them all" if found else ""


def _parameters_of_base(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> int:
    """Count the parameters of the base model, on a model without memory."""
    with init_empty_weights(include_buffers=False):
        model = _model(config, tokenizer)
    model.tie_weights()
    return num_parameters(model)["total"]


def _model(config: RunConfig, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Build the run's base model, without weights."""
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


def _has_score_head(config: RunConfig, model: PreTrainedModel) -> None:
    """Look for a class that has a score head on the base's weights; models with code of their own may lack it.

    Raises:
        UserError: if there is no such class.
    """
    wrong = "this model has no class for sequences with a score (AutoModelForSequenceClassification)"
    try:
        scored = AutoModelForSequenceClassification.from_config(
            model.config, trust_remote_code=config.model.trust_remote_code
        )
    except _ERRORS as error:
        raise UserError(f"model: {wrong}: {reason_of(error)}") from None
    if not hasattr(scored, "score"):
        raise UserError(f"model: {wrong} whose head is called `score`; take another model, or reward functions")
