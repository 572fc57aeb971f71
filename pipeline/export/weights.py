"""Load a stage's weights in three ways: as exact as they are, as the run computes with them, and as a user loads them.

`exact` is float32 throughout: what differs between two models loaded so differs in their weights. A quantised base is
dequantised as its own kernels do it, to the run's dtype, and then computed with in float32.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from pipeline.base.weights import quiet_loading, unfit
from pipeline.export.job import Job
from pipeline.models.loading import Loader, Model, ScoreHead, load_policy, load_reward, on_base
from pipeline.models.loading import Weights as Place
from pipeline.models.run_models import readable
from pipeline.system.errors import UserError


def as_in_run(job: Job, loader: Loader, adapter: str | None) -> Model:
    """Load weights with the run's precision and quantisation."""
    load = load_reward if job.scores else load_policy
    with readable(job.full):
        return load(loader, Place(job.full, adapter)).eval()


def exact(job: Job, loader: Loader, adapter: str | None) -> Model:
    """Load weights in float32, a quantised base dequantised, with the adapter on them, not merged."""
    with readable(job.full):
        full = loader.score(job.full) if job.scores else loader.causal(job.full)
    if getattr(full, "is_quantized", False):
        full = cast(PreTrainedModel, full.dequantize(torch.float32))
    return on_base(full.float(), Place(job.full, adapter)).eval()


def config_of(job: Job, loader: Loader) -> PreTrainedConfig:
    """Read the config of the full weights alone."""
    revision = loader.revision if job.full == loader.base else None
    with readable(job.full):
        return AutoConfig.from_pretrained(job.full, revision=revision, trust_remote_code=loader.trust_remote_code)


def exported(job: Job, dtype: str, tokenizer: PreTrainedTokenizerFast) -> Model:
    """Load an export of whole weights as its card says, in `dtype`.

    Raises:
        UserError: if its files do not hold all weights.
    """
    options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": job.base["trust_remote_code"]}
    auto: Any = AutoModelForSequenceClassification if job.scores else AutoModelForCausalLM
    if job.form == "gguf":
        from transformers import GgufConfig

        options |= {"gguf_file": job.file, "quantization_config": GgufConfig(dequantize=True)}
    with quiet_loading():
        model, info = auto.from_pretrained(job.output, output_loading_info=True, **options)
    if fault := unfit(model, info):
        raise UserError(f"the export does not hold the model's weights: {fault}")
    if job.scores:
        if "score.weight" in info["missing_keys"]:
            raise UserError("the export does not hold the score head")
        model.score = ScoreHead(model.get_parameter("score.weight"))
        model.config.pad_token_id = tokenizer.pad_token_id
    return cast(Model, model.eval())


def tokenizer_of(job: Job) -> PreTrainedTokenizerFast:
    """Load the tokenizer that an export brings with it."""
    options: dict[str, Any] = {"trust_remote_code": job.base["trust_remote_code"]}
    if job.form == "gguf":
        options["gguf_file"] = job.file
    return cast("PreTrainedTokenizerFast", AutoTokenizer.from_pretrained(job.output, **options))


@contextlib.contextmanager
def without_adapter(model: Model) -> Iterator[None]:
    """Leave out the adapter of a model that has one."""
    with model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
        yield
