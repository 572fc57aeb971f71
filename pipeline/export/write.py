"""Write the files of an export: an adapter, merged weights, or GGUF, with tokenizer and generation settings."""

import json
import shutil
from pathlib import Path
from typing import cast

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from pipeline.config.stage_types import STAGE_TYPES
from pipeline.export import gguf_file
from pipeline.export.job import Job
from pipeline.models.loading import Model, ScoreHead
from pipeline.records import manifest
from pipeline.system.json_object import JsonObject

_ADAPTER_FILES = ("adapter_model.safetensors", "adapter_config.json")


def output(job: Job, model: Model, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write the export's files to `job.output`. `model` has the stage's weights in float32; they are used up."""
    job.output.mkdir()
    if job.form == "adapter":
        _write_adapter(job)
    elif job.form == "merged":
        _write_whole(merged(model), job.dtype, job.output)
    else:
        name = f"{job.run_dir.name} {job.stage}"
        gguf_file.write(merged(model), tokenizer, job.output / job.file, job.dtype, name)
        return  # tokenizer, template and eos are in the file
    tokenizer.save_pretrained(job.output)
    if not job.scores:
        generation_config(job, tokenizer).save_pretrained(job.output)


def merged(model: Model) -> PreTrainedModel:
    """Return the model with its adapter merged into it, in the precision that it has: float32."""
    if not isinstance(model, PeftModel):
        return model
    return cast(PreTrainedModel, model.merge_and_unload(safe_merge=True))  # refuses weights that are no numbers


def _write_whole(model: PreTrainedModel, dtype: str, folder: Path) -> None:
    """Save whole weights in a type; a score head stays float32, as it was trained."""
    rounded = getattr(torch, dtype)
    head = getattr(model, "score", None)
    kept = head.weight if isinstance(head, ScoreHead) else None
    for parameter in model.parameters():  # one at a time: there is no second copy of all of them
        if parameter is not kept:
            parameter.data = parameter.data.to(rounded)
    model.config.dtype = rounded
    model.save_pretrained(folder)


def _write_adapter(job: Job) -> None:
    """Copy the adapter byte for byte. Its config gets the whole path of its full weights: it leaves the run folder."""
    assert job.adapter is not None, "the command has refused a stage without an adapter"
    for name in _ADAPTER_FILES:
        shutil.copyfile(Path(job.adapter) / name, job.output / name)
    file = job.output / "adapter_config.json"
    config: JsonObject = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = job.full
    config["revision"] = job.base["revision"] if job.full == job.base["base"] else None
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def generation_config(job: Job, tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Return the settings to generate with: eos and pad of the run, and sampling as its evaluation has sampled.

    The base's own settings are left behind: with another eos a policy would not stop, and with its penalties it would
    be another policy than the one that was measured.
    """
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    recorded = manifest.read(job.run_dir)
    assert recorded is not None, "the command has read it"
    for record in recorded.stages.values():
        is_measured = STAGE_TYPES[record.type].makes == "evaluation" and job.stage in record.metrics["policies"]
        if is_measured:
            temperature = record.config.get("temperature", 1.0)
            return GenerationConfig(do_sample=True, temperature=temperature, top_k=0, top_p=1.0, **ids)
    return GenerationConfig(**ids)
