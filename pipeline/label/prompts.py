"""Read the prompts that are completed, without those that the run is evaluated on: what is labelled is trained on."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from pipeline.config import graph
from pipeline.config.requests import Request, RunData, run_data
from pipeline.config.schema import Data, RunConfig
from pipeline.config.stage_types import type_of
from pipeline.data import fingerprints, run_tokenizer
from pipeline.data.audit import Audit
from pipeline.data.prepare import Datasets
from pipeline.label import evaluated
from pipeline.records.manifest import Manifest
from pipeline.system.errors import UserError, nearest
from pipeline.system.json_object import JsonObject


class Prompts(NamedTuple):
    """Rows with `prompt` (messages) and `prompt_ids`, what to record of their dataset, and what to say of the rest."""

    rows: Dataset
    about: JsonObject
    remarks: list[str]


def default(config: RunConfig, recorded: Manifest, policies: Sequence[str]) -> str:
    """Name the dataset that the last of these policies was trained on that has prompts.

    Raises:
        UserError: if the config has no such stage any more, or all were trained on raw text, or in another run.
    """
    texts = {stage.data for stage in config.stages.values() if type_of(stage).reads_raw_text}
    stages = [config.stages.get(policy) for policy in reversed(policies)]
    datasets = [stage.data for stage in stages if stage is not None and stage.data not in {None, *texts}]
    if datasets:
        return datasets[0]
    fault = f"{config.source} does not say which prompts {' and '.join(policies)} learned from"
    taken = [name for name in policies if recorded.stages[name].origin is not None]
    if taken:
        fault += f": {taken[-1]} was taken from another run ({recorded.stages[taken[-1]].origin}), with data of its own"
    raise UserError(f"{fault}; name some with --prompts")


def place_of(config: RunConfig, given: str) -> str:
    """Return the name of a dataset of the run, or the absolute path of a file.

    Raises:
        UserError: if it is neither.
    """
    if given in config.data:
        return given
    path = Path(given).expanduser().absolute()
    if path.exists():
        return str(path)
    hint = nearest(given, config.data)
    raise UserError(f"--prompts: {given!r} is neither a file nor a dataset of {config.source}; {hint}")


def read(
    config: RunConfig, recorded: Manifest, given: str, max_length: int, tokenizer: PreTrainedTokenizerFast
) -> Prompts:
    """Return the prompts of a dataset or a file, each once.

    Raises:
        UserError: if it cannot be read, too many rows do not fit, all prompts are held out, or the config does not hold
            out what the run was evaluated on.
    """
    unknown = evaluated.check(config, recorded, is_file=given not in config.data)
    data = _with(config, given)
    prepared = Datasets(data, tokenizer, run_tokenizer.fingerprint(tokenizer)).prepare(
        _request(config, given, max_length)
    )
    audit = prepared.audit
    total = sum(size for _, size in audit.parts)
    held_out = total - audit.read + audit.dropped["held_out"].count
    if held_out == total:
        mend = "What is labelled is trained on, so name other prompts"
        raise UserError(f"--prompts: the run is evaluated on all {total} prompts of {given}. {mend}")
    problems = audit.problems(config.checks.model_dump())
    if problems:
        raise UserError("\n  ".join(problems))
    about: JsonObject = {
        "given": given,
        "fingerprint": fingerprints.of_dataset(given, data.sections[given], config.folder),
        "rows": total,
        "held_out": held_out,
        "used": len(prepared.rows),
    }
    if unknown:
        about["not_compared"] = unknown
    what = f"nobody can tell whether {given} has prompts that the run was evaluated on"
    remarks = [f"{what}, since {difference}" for difference in unknown]
    return Prompts(prepared.rows, about, remarks + _remarks(given, audit, total, held_out))


def _request(config: RunConfig, given: str, max_length: int) -> Request:
    return Request(
        dataset=given,
        rows="prompts",
        split=graph.TRAIN,
        length_option="max_prompt_length",
        max_length=max_length,
        truncates=config.too_long == "truncate",
        takes_tools=False,
        unique_prompts=True,
        piece_length=None,
    )


def _remarks(given: str, audit: Audit, total: int, held_out: int) -> list[str]:
    """Say how many rows were left out, and why."""
    remarks = []
    if held_out:
        why = "have a prompt that the run is evaluated on"
        remarks.append(f"{held_out} of {total} rows of {given} {why}: left out, since labels are trained on")
    for kind, finding in audit.dropped.items():
        if finding.count and kind != "held_out":
            remarks.append(f"{finding.count} of {audit.read} rows of {given} {audit.what(kind)}: left out")
    return remarks


def _with(config: RunConfig, given: str) -> RunData:
    """Return the run's datasets, a file among them if one is given, beside all prompts that the run is evaluated on."""
    data = run_data(config)
    sections = dict(data.sections)
    if given not in sections:
        sections[given] = Data(path=given)
    evaluated = graph.evaluated_beside(config, given)
    if given in graph.uses(config, graph.HELD_OUT) and given not in data.shared:
        evaluated.append(given)  # the run is evaluated on all of it
    beside = {**data.evaluated_beside, given: tuple(evaluated)}
    return dataclasses.replace(data, sections=sections, evaluated_beside=beside)
