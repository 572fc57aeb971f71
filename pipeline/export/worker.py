"""Do one step of an export in a process of its own: `python -m pipeline.export.worker STEP FOLDER`.

`write` loads the stage, notes its outputs, and writes the files. `read` loads those files in another process, where
nothing of the stage is left in memory, and compares.
"""

import dataclasses
import sys
from pathlib import Path

from pipeline.system.quiet import quieten_transformers  # isort: skip

from transformers import GenerationConfig, PreTrainedTokenizerFast

from pipeline.base import base_model
from pipeline.data import joints
from pipeline.export import gguf_file, measure, rows, weights, write
from pipeline.export.job import Job, Row
from pipeline.models import run_models
from pipeline.models.loading import Loader, Model
from pipeline.records import manifest
from pipeline.records.manifest import Manifest
from pipeline.system import disk, quiet, streams
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject


def main() -> None:
    """Do the step; a user's error is one line and exit code 2."""
    streams.prepare()
    step, work = sys.argv[1:]
    job = Job.read(Path(work))
    try:
        with quiet.libraries(), disk.reported(job.work, "--to"):
            quieten_transformers()
            STEPS[step](job)
    except UserError as error:
        job.save_json("error", str(error))
        raise SystemExit(2) from None


def write_export(job: Job) -> None:
    """Note the stage's outputs on held-out rows, and write its files.

    Raises:
        UserError: if it cannot be written in the form that was asked for; that is found out before any weights are
            loaded.
    """
    recorded = _recorded(job)
    tokenizer = run_models.tokenizer(job.run_dir, recorded)
    loader = _loader(recorded, tokenizer)
    config = weights.config_of(job, loader)
    if job.form == "gguf":
        gguf_file.check(config, tokenizer)
    longest = min(base_model.num_positions(config) or rows.MAX_TOKENS, rows.MAX_TOKENS)
    chosen = rows.held_out(job.run_dir, recorded, tokenizer, longest)
    job.save_rows(chosen.rows)
    if loader.is_rounded:
        _note(job, "in_run", weights.as_in_run(job, loader, job.adapter), chosen.rows, tokenizer)
    model = weights.exact(job, loader, job.adapter)
    _note(job, "exact", model, chosen.rows, tokenizer)
    job.save_json("about", {"origin": chosen.origin, "effect": _effect(job, model, chosen.rows)})
    write.output(job, model, tokenizer)


def _recorded(job: Job) -> Manifest:
    recorded = manifest.read(job.run_dir)
    assert recorded is not None, "the command has read it"
    return recorded


def _loader(recorded: Manifest, tokenizer: PreTrainedTokenizerFast) -> Loader:
    """Return what loads the run's weights; the attention is that of whoever loads the export, who names none."""
    return dataclasses.replace(run_models.loader(recorded, tokenizer), attn_implementation=None)


def _note(job: Job, name: str, model: Model, texts: list[Row], tokenizer: PreTrainedTokenizerFast) -> None:
    """Keep a model's outputs: scores, or logits in a file of their own."""
    if job.scores:
        job.save_json(name, measure.scores_of(model, texts, joints.pad_id(tokenizer)))
    else:
        measure.save_logits(model, texts, job.work / f"{name}.npy")


def _effect(job: Job, model: Model, texts: list[Row]) -> float | None:
    """Return by how much the adapter itself moves log-probabilities, on average, in nats: the scale of a rounding.

    None for whole weights, and for a reward model, which is nothing without its head.
    """
    if job.scores or job.adapter is None:
        return None
    with weights.without_adapter(model):
        return measure.compare_logits(model, texts, job.work / "exact.npy")["mean_log_prob"]


def read_export(job: Job) -> None:
    """Load what was written as a user does, compare it with the stage, and keep the figures."""
    texts = job.rows()
    tokenizer = weights.tokenizer_of(job)
    recorded = _recorded(job)
    ours = run_models.tokenizer(job.run_dir, recorded)
    _same_tokens(tokenizer, ours, texts)
    _same_end(job, tokenizer, ours)
    loader = _loader(recorded, ours)
    figures: JsonObject = {"exact": _compared(job, "exact", _read_exactly(job, loader, ours), texts, ours)}
    if loader.is_rounded or job.dtype != "float32":
        noted = "in_run" if loader.is_rounded else "exact"
        figures["as_used"] = _compared(job, noted, _read_as_used(job, loader, ours), texts, ours)
    job.save_json("figures", figures)


def _read_exactly(job: Job, loader: Loader, tokenizer: PreTrainedTokenizerFast) -> Model:
    """Load the export's own weights to compute in float32; an adapter on the stage's base."""
    if job.form == "adapter":
        return weights.exact(job, loader, str(job.output))
    return weights.exported(job, "float32", tokenizer)


def _read_as_used(job: Job, loader: Loader, tokenizer: PreTrainedTokenizerFast) -> Model:
    if job.form == "adapter":
        return weights.as_in_run(job, loader, str(job.output))
    return weights.exported(job, job.dtype, tokenizer)


def _compared(job: Job, noted: str, model: Model, texts: list[Row], tokenizer: PreTrainedTokenizerFast) -> JsonObject:
    if job.scores:
        scores = measure.scores_of(model, texts, joints.pad_id(tokenizer))
        return measure.compare_scores(scores, job.json(noted))
    return measure.compare_logits(model, texts, job.work / f"{noted}.npy")


def _same_tokens(tokenizer: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast, texts: list[Row]) -> None:
    """Compare the tokens of all texts, and the special tokens.

    Raises:
        UserError: naming the first difference.
    """
    for kind in ("eos", "pad"):
        name = f"{kind}_token_id"
        if getattr(tokenizer, name) != getattr(ours, name):
            fault = f"{getattr(tokenizer, name)} there, {getattr(ours, name)} in the run"
            raise UserError(f"the export's tokenizer has another {kind} token: {fault}")
    if tokenizer.chat_template != ours.chat_template:
        raise UserError("the export's tokenizer has another chat template than the run's")
    for row in texts:
        theirs = joints.token_ids(tokenizer, [row.text])
        if theirs != joints.token_ids(ours, [row.text]):
            raise UserError(f"the export's tokenizer cuts texts into other tokens than the run's: {row.text[:80]!r}")


def _same_end(job: Job, tokenizer: PreTrainedTokenizerFast, ours: PreTrainedTokenizerFast) -> None:
    """Check that generation ends at the run's eos.

    Raises:
        UserError: if the generation settings name another token.
    """
    if job.scores or job.form == "gguf":  # a GGUF file says it as its tokenizer's eos
        return
    ends = GenerationConfig.from_pretrained(job.output).eos_token_id
    if ends != ours.eos_token_id:
        raise UserError(f"the export's generation settings end at {ends}, the run's eos is {ours.eos_token_id}")


STEPS = {"write": write_export, "read": read_export}

if __name__ == "__main__":
    main()
