"""Rows as stages get them: converted, split, tokenised, measured. Every row that is left out is counted.

All of a dataset's rows go through Arrow in batches, in several processes, and are kept in the cache of the datasets
library by content, format, template and tokenizer; what is decided per row afterwards (split, lengths) takes no time.
"""

import dataclasses
import hashlib
import importlib.metadata
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from pipeline.config import graph
from pipeline.config.graph import datasets as datasets_of
from pipeline.config.options import effective, length_limit
from pipeline.config.schema import RunConfig, Sampled, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.data import heldout, sources
from pipeline.data.audit import QUANTILES, Audit, Finding
from pipeline.data.formats import FIELDS, detect, missing, serves, wanted
from pipeline.data.rows import IDS, KINDS, LENGTHS, NO_KEY, Measure
from pipeline.data.sources import Part
from pipeline.system.cache import cache_folder
from pipeline.system.digests import digest, file_digest
from pipeline.system.errors import UserError

# Prepared rows are cached by this too: another version of these files may prepare them otherwise.
_LIBRARIES = [importlib.metadata.version(name) for name in ("datasets", "jinja2", "tokenizers", "transformers")]
_FILES = sorted(Path(__file__).parent.glob("*.py"))
CODE = digest([_LIBRARIES, *map(file_digest, _FILES)])
BATCH = 250  # rows; a few hundred MB of Python lists and encodings at most
SLICE = 100_000  # rows per set of processes: what they have read stays in their memory until they end
NUM_PER_PROCESS = 2_000  # rows that are worth another process
NUM_QUIET = 20_000  # fewer rows show no progress bar
NUM_NAMED = 5  # rows named per finding


@dataclass(frozen=True)
class Prepared:
    """The rows of a dataset for one stage, tokenised, and the account of all rows."""

    rows: Dataset
    audit: Audit


class Datasets:
    """The datasets of a run, prepared when they are asked for.

    `tokenizer` and its fingerprint `key` are not needed for what concerns the split alone.
    """

    def __init__(self, config: RunConfig, tokenizer: Any = None, key: str = ""):
        self.config, self.tokenizer, self.key = config, tokenizer, key
        self._keys: dict[str, np.ndarray] = {}

    def evaluated_elsewhere(self, dataset: str) -> np.ndarray:
        """Sorted keys of the prompts that other datasets are evaluated on; no stage may train on them."""
        found = [np.empty(0, np.uint64)]
        for other in graph.evaluated_beside(self.config, dataset):
            keys = self._keys_of(other)
            below = heldout.is_below(keys, self.config.data[other].heldout)
            found.append(keys[below] if graph.is_shared(self.config, other) else keys)
        return np.unique(np.concatenate(found))

    def removed(self, dataset: str) -> str | None:
        """Digest of the prompts that are not trained on since they are evaluated on; None where there are none."""
        excluded = self.evaluated_elsewhere(dataset)
        if len(excluded) and not self.config.data[dataset].streaming:
            excluded = np.intersect1d(excluded, self._keys_of(dataset))
        return digest(excluded.tolist()) if len(excluded) else None

    def _keys_of(self, dataset: str) -> np.ndarray:
        """Sorted keys of all prompts of a dataset."""
        if dataset not in self._keys:
            keys = []
            for part in sources.find(self.config, dataset):
                raw = sources.load(part)
                shape = shape_of(part, raw)
                if lacking := missing(shape, raw.column_names):
                    raise UserError(f"{part.label}: format {shape} needs {lacking}")
                rows = _measured(part, raw, Measure(shape, "keys"), "")
                keys.append(_column(rows, "_key"))
            found = np.unique(np.concatenate(keys))
            self._keys[dataset] = found[found != NO_KEY]
        return self._keys[dataset]

    def prepare(self, stage_name: str, role: str) -> Prepared:
        """The rows of a stage's dataset (`role` is `data` or `eval_data`). Too many faults are the caller's to judge.

        Raises:
            UserError: if the dataset cannot be read or does not fit the stage.
        """
        stage = self.config.stages[stage_name]
        dataset, want, limit = datasets_of(stage)[role], wanted(stage, role), length_limit(stage)
        # TRL renders the prompts of RLOO and GRPO itself, in full and without tools.
        renders = not type_of(stage).trl_tokenises
        truncates = self.config.too_long == "truncate" and renders
        max_length = limit[1] if truncates else None
        parts, measured = sources.find(self.config, dataset), []
        for part in parts:
            raw = sources.load(part)
            shape = shape_of(part, raw)
            check_serves(part, shape, raw.column_names, want)
            measured.append(_measured(part, raw, Measure(shape, want, self.tokenizer, max_length, renders), self.key))
        rows = concatenate_datasets(measured) if len(measured) > 1 else measured[0]
        sizes = [len(part) for part in measured]
        split = graph.role_split(role, isinstance(stage, TrainingStage))
        kept, dropped = self._choose(rows, dataset, want, split, limit[1])
        if isinstance(stage, Sampled):  # intervals are over prompts, so each counts once
            dropped["same_prompt"] = _repeats(_column(rows, "_digest"), kept)
            kept &= ~dropped["same_prompt"]
        dropped["weight"] = kept & ~_weighted(kept, sizes, [part.spec.weight for part in parts])
        kept &= ~dropped["weight"]
        audit = _audit(rows, list(zip(parts, sizes, strict=True)), want, split, limit, kept, dropped)
        ids = rows.select_columns([*IDS[want], *(["prompt"] if want == "prompts" else [])])
        ids = ids if kept.all() else ids.select(np.flatnonzero(kept))
        ids = _in_pieces(ids, stage, role) if want == "text" else ids
        return Prepared(ids, dataclasses.replace(audit, sequences=len(ids)))

    def _choose(
        self, rows: Dataset, dataset: str, want: str, split: str, max_length: int | None
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Masks of the rows that a stage gets, and of those on its side of the split that it does not, by reason."""
        keys, fault = _column(rows, "_key"), _column(rows, "_fault")
        side = np.ones(len(rows), bool)
        if graph.is_shared(self.config, dataset):  # rows without a prompt are accounted for with the training rows
            below = heldout.is_below(keys, self.config.data[dataset].heldout) & (keys != NO_KEY)
            side = below if split == graph.HELD_OUT else ~below
        dropped = {kind: side & (fault == number) for number, kind in enumerate(KINDS, 1)}
        kept = side & (fault == 0)
        if split == graph.TRAIN:
            dropped["held_out"] = kept & np.isin(keys, self.evaluated_elsewhere(dataset))
            kept = kept & ~dropped["held_out"]
        if max_length is not None:
            dropped["too_long"] = kept & (_lengths(rows, want)["row"] > max_length)
            kept = kept & ~dropped["too_long"]
        return kept, dropped


def shape_of(part: Part, rows: Dataset | IterableDataset) -> str:
    """The format of a source: the one named in the config, or the one its first rows tell."""
    if part.spec.format != "auto":
        return part.spec.format
    try:
        return detect(sources.first_values(part, rows))
    except ValueError as error:
        raise UserError(f"{part.label}: {error}") from None


def check_serves(part: Part, shape: str, columns: list[str], want: str) -> None:
    """Refuse a dataset whose format cannot give what a stage wants, or that does not have its format's columns."""
    if lacking := missing(shape, columns):
        seen = f"has the columns {', '.join(columns)}; format {shape} needs {lacking}"
        raise UserError(f"{part.label}: {seen}; name another `format`, or map the columns with `columns:`")
    if want not in serves(shape, columns):
        seen = f"holds {shape} rows (columns {', '.join(columns)}), expected {want}"
        raise UserError(f"{part.label}: {seen}; name another dataset, or map its columns with `columns:`")


def _measured(part: Part, raw: Dataset, measure: Measure, key: str) -> Dataset:
    """All rows of a source through `measure`, from the cache if its content went through before."""
    content = [sources.fingerprint(part), measure.shape, measure.want, measure.max_length, measure.tools, key, CODE]
    name = digest(content)[:32]
    cache = cache_folder() / name
    cache.mkdir(parents=True, exist_ok=True)
    raw = raw.select_columns([column for column in raw.column_names if column in FIELDS])
    done, starts = [], range(0, len(raw), SLICE)
    for number, start in enumerate(starts, 1):
        rows = raw.select(range(start, min(start + SLICE, len(raw))))
        processes = min(_num_cores(), len(rows) // NUM_PER_PROCESS)
        with sources.progress_bar(len(raw) >= NUM_QUIET), sources.alone_in(cache):
            rows = rows.map(
                measure,
                batched=True,
                batch_size=BATCH,
                remove_columns=raw.column_names,
                features=measure.features(),
                num_proc=processes if processes > 1 else None,
                cache_file_name=str(cache / f"{start}.arrow"),
                new_fingerprint=f"{name}-{start}",
                desc=f"Preparing {part.dataset}" + (f" ({number} of {len(starts)})" if len(starts) > 1 else ""),
            )
        done.append(rows)
    return concatenate_datasets(done) if len(done) > 1 else done[0]


def _num_cores() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _column(rows: Dataset, name: str) -> np.ndarray:
    return rows.data.column(name).to_numpy()


def _lengths(rows: Dataset, want: str) -> dict[str, np.ndarray]:
    """Lengths in tokens: of the parts of each row, and of the whole (`row`; a comparison's with its longer side)."""
    parts = {name: _column(rows, f"_{name}") for name in LENGTHS[want]}
    if want == "comparisons":
        return {"row": parts["prompt"] + np.maximum(parts["chosen"], parts["rejected"]), **parts}
    return {"row": sum(parts.values()), **(parts if len(parts) > 1 else {})}


def _weighted(kept: np.ndarray, sizes: list[int], weights: list[float | None]) -> np.ndarray:
    """Which rows to take so that the sources are in the proportion of their weights, none repeated.

    The source that runs out first sets the size; of the others rows are left out, spread evenly.
    """
    if None in weights:
        return kept
    bounds = np.cumsum([0, *sizes])
    found = [np.flatnonzero(kept[start:end]) + start for start, end in itertools.pairwise(bounds)]
    unit = min(len(rows) / weight for rows, weight in zip(found, weights, strict=True))
    chosen = np.zeros(len(kept), bool)
    for rows, weight in zip(found, weights, strict=True):
        number = min(len(rows), round(unit * weight))
        chosen[rows[np.arange(number) * len(rows) // max(number, 1)]] = True
    return chosen


def _audit(
    rows: Dataset,
    parts: list[tuple[Part, int]],
    want: str,
    split: str,
    limit: tuple[str, int | None],
    kept: np.ndarray,
    dropped: dict[str, np.ndarray],
) -> Audit:
    lengths, digests, pairs = _lengths(rows, want), _column(rows, "_digest"), _column(rows, "_pair")
    noticed = {"duplicate": _repeats(digests, kept), "contradictory": _contradicts(pairs, digests, kept)}
    for name in ("special_tokens", "eos", "no_bos", "other_tokens", "truncated"):
        noticed[name] = kept & (_column(rows, f"_{name}") > 0)
    if want == "comparisons":
        noticed["longer_wins"] = kept & (lengths["chosen"] > lengths["rejected"])

    def findings(masks: dict[str, np.ndarray]) -> dict[str, Finding]:
        found = {}
        for kind, mask in masks.items():
            first = np.flatnonzero(mask)[:NUM_NAMED].tolist()
            found[kind] = Finding(int(mask.sum()), tuple(first), rows[first[0]]["_why"] if first else None)
        return found

    quantiles = {}
    if kept.any():
        for name, values in lengths.items():
            quantiles[name] = np.quantile(values[kept], QUANTILES, method="higher").tolist()
    tokens = sum(int(_column(rows, f"_{name}")[kept].sum()) for name in LENGTHS[want])
    read = int(kept.sum() + sum(mask.sum() for mask in dropped.values()))
    counts = (read, int(kept.sum()), tokens)
    keys = np.unique(_column(rows, "_key")[kept])
    prompts = (len(keys), hashlib.sha256(keys.tobytes()).hexdigest())
    return Audit(tuple(parts), split, *counts, findings(dropped), findings(noticed), quantiles, limit, prompts)


def _repeats(digests: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept rows that equal a kept row before them."""
    rows = np.flatnonzero(kept)
    _, first = np.unique(digests[rows], return_index=True)
    repeats = kept.copy()
    repeats[rows[first]] = False
    return repeats


def _contradicts(pairs: np.ndarray, digests: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """The kept comparisons whose two sides occur the other way round too."""
    rows = np.flatnonzero(kept)
    labelled = np.unique(np.stack([pairs[rows], digests[rows]]), axis=1)[0]
    values, counts = np.unique(labelled, return_counts=True)
    return kept & np.isin(pairs, values[counts > 1])


def _in_pieces(rows: Dataset, stage: TrainingStage, role: str) -> Dataset:
    """Texts cut into pieces of `max_length`, so that the trainer cuts nothing off; wrapped packing does it itself."""
    options = effective(stage.type, stage.training)
    length, packing = options["max_length"], options["packing"]
    if role == "eval_data" and options["eval_packing"] is not None:
        packing = options["eval_packing"]
    if length is None or (packing and options["packing_strategy"] == "wrapped"):
        return rows

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [ids[i : i + length] for ids in batch["input_ids"] for i in range(0, len(ids), length)]}

    with sources.progress_bar(len(rows) >= NUM_QUIET):
        return rows.map(cut, batched=True, new_fingerprint=digest([rows._fingerprint, length, CODE])[:16])
