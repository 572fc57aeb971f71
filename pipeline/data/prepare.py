"""Give stages their rows: converted, split, tokenised, measured. Every row that is left out is counted.

All of a dataset's rows go through Arrow in batches, in several processes, and are kept in the cache of the datasets
library by content, format, template and tokenizer; what is decided per row afterwards (split, lengths) takes no time.
"""

from dataclasses import dataclass

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets
from transformers import PreTrainedTokenizerFast

from pipeline.config import graph
from pipeline.config.requests import Request, RunData
from pipeline.data import fingerprints, heldout, places, sources
from pipeline.data.audit import Audit
from pipeline.data.batches import NO_KEY, PromptKeys, TokenIds
from pipeline.data.code import CODE
from pipeline.data.formats import FIELDS, detect, missing
from pipeline.data.packed import num_packed
from pipeline.data.places import Part
from pipeline.data.row_kind import RowKind
from pipeline.data.rows import ROWS, serves
from pipeline.data.sieve import Sieve, audit_of, column, repeats, row_lengths, spread, weighted
from pipeline.system.cache import cache_folder
from pipeline.system.device import num_cores
from pipeline.system.digests import digest
from pipeline.system.errors import UserError

BATCH = 250  # rows; a few hundred MB of Python lists and encodings at most
SLICE = 100_000  # rows per set of processes: what they have read stays in their memory until they end
NUM_PER_PROCESS = 2_000  # rows that are worth another process
NUM_QUIET = 20_000  # fewer rows show no progress bar


@dataclass(frozen=True)
class Prepared:
    """The rows of a dataset for one stage, tokenised, and the account of all rows.

    `numbers`: of each row, its place among all rows of the dataset, from 0; None where texts are cut into pieces.
    """

    rows: Dataset
    audit: Audit
    numbers: np.ndarray | None


class Datasets:
    """The datasets of a run, prepared when they are asked for.

    `tokenizer` and its fingerprint `key` are not needed for what concerns the split alone.
    """

    def __init__(self, data: RunData, tokenizer: PreTrainedTokenizerFast | None = None, key: str = ""):
        self.data = data
        self.tokenizer = tokenizer
        self.key = key
        self._keys: dict[str, np.ndarray] = {}

    def find(self, dataset: str) -> list[Part]:
        """Return the sources of a dataset."""
        return places.find(dataset, self.data.sections[dataset], self.data.folder)

    def evaluated_elsewhere(self, dataset: str) -> np.ndarray:
        """Return the sorted keys of the prompts that other datasets are evaluated on; no stage may train on them."""
        excluded = [np.empty(0, np.uint64)]
        for other in self.data.evaluated_beside[dataset]:
            keys = self._keys_of(other)
            excluded.append(keys[self._is_below(other, keys)] if other in self.data.shared else keys)
        return np.unique(np.concatenate(excluded))

    def removed(self, dataset: str) -> str | None:
        """Return the digest of the prompts left out of training since they are evaluated on; None: there are none."""
        excluded = self.evaluated_elsewhere(dataset)
        if len(excluded) and not self.data.sections[dataset].streaming:
            excluded = np.intersect1d(excluded, self._keys_of(dataset))
        return digest(excluded.tolist()) if len(excluded) else None

    def _is_below(self, dataset: str, keys: np.ndarray) -> np.ndarray:
        """Tell of each key whether it belongs to the held-out share of a shared dataset."""
        return heldout.is_below(keys, self.data.sections[dataset].heldout)

    def _keys_of(self, dataset: str) -> np.ndarray:
        """Return the sorted keys of all prompts of a dataset."""
        if dataset not in self._keys:
            keys = []
            for part in self.find(dataset):
                raw = sources.load(part)
                shape = shape_of(part, raw)
                if lacking := missing(shape, raw.column_names):
                    raise UserError(f"{part.label}: format {shape} needs {lacking}")
                rows = _through_arrow(part, raw, PromptKeys(shape), [shape])
                keys.append(column(rows, "_key"))
            unique = np.unique(np.concatenate(keys))
            self._keys[dataset] = unique[unique != NO_KEY]
        return self._keys[dataset]

    def prepare(self, request: Request) -> Prepared:
        """Return the rows that a stage asks for. Too many faults are the caller's to judge.

        Raises:
            UserError: if the dataset cannot be read or does not fit the stage.
        """
        kind = ROWS[request.rows]
        parts = self.find(request.dataset)
        tokenised = [self._tokenised(part, kind, request) for part in parts]
        rows = concatenate_datasets(tokenised) if len(tokenised) > 1 else tokenised[0]
        sizes = [len(part) for part in tokenised]
        sieve = self._sieve(rows, kind, request)
        sieve.drop("weight", ~weighted(sieve.kept, sizes, [part.spec.weight for part in parts]))
        chosen = rows.select_columns([*kind.columns, *kind.extras])
        lengths = row_lengths(rows, kind)["row"]
        taken = sieve.kept
        if request.num_rows is not None:
            taken = spread(taken, lengths, request.num_rows, request.longest)
        if not taken.all():
            chosen = chosen.select(np.flatnonzero(taken))
        if request.piece_length is not None:
            chosen = _in_pieces(chosen, request.piece_length)
        sequences = len(chosen) if request.packing is None else num_packed(lengths[taken], request)
        audit = audit_of(rows, parts, sizes, request, kind, sieve, taken, sequences)
        return Prepared(chosen, audit, np.flatnonzero(taken) if request.piece_length is None else None)

    def _tokenised(self, part: Part, kind: RowKind, request: Request) -> Dataset:
        """Return all rows of a source, tokenised and measured."""
        assert self.tokenizer is not None
        raw = sources.load(part)
        shape = shape_of(part, raw)
        check_serves(part, shape, raw.column_names, kind.name)
        max_length = request.max_length if request.truncates else None
        step = TokenIds(shape, kind, self.tokenizer, max_length, request.takes_tools)
        return _through_arrow(part, raw, step, [shape, kind.name, max_length, request.takes_tools, self.key])

    def _sieve(self, rows: Dataset, kind: RowKind, request: Request) -> Sieve:
        """Drop the rows that the stage does not get, one reason after another."""
        keys = column(rows, "_key")
        side = np.ones(len(rows), bool)
        if request.dataset in self.data.shared:
            # Rows without a prompt are accounted for with the training rows.
            below = self._is_below(request.dataset, keys) & (keys != NO_KEY)
            side = below if request.split == graph.HELD_OUT else ~below
        sieve = Sieve(side)
        sieve.drop_faults(rows)
        if request.split == graph.TRAIN:
            sieve.drop("held_out", np.isin(keys, self.evaluated_elsewhere(request.dataset)))
        if request.max_length is not None:
            sieve.drop("too_long", row_lengths(rows, kind)["row"] > request.max_length)
        if request.unique_prompts:
            sieve.drop("same_prompt", repeats(column(rows, "_digest"), sieve.kept))
        return sieve


def shape_of(part: Part, rows: Dataset | IterableDataset) -> str:
    """Return the format of a source: the one named in the config, or the one its first rows tell."""
    if part.spec.format != "auto":
        return part.spec.format
    try:
        return detect(sources.first_values(part, rows))
    except ValueError as error:
        raise UserError(f"{part.label}: {error}") from None


def check_serves(part: Part, shape: str, columns: list[str], want: str) -> None:
    """Refuse a dataset whose format cannot give what a stage wants, or that does not have its format's columns."""
    if lacking := missing(shape, columns):
        columns_there = f"has the columns {', '.join(columns)}; format {shape} needs {lacking}"
        raise UserError(f"{part.label}: {columns_there}; name another `format`, or map the columns with `columns:`")
    if want not in serves(shape, columns):
        rows_there = f"holds {shape} rows (columns {', '.join(columns)}), expected {want}"
        raise UserError(f"{part.label}: {rows_there}; name another dataset, or map its columns with `columns:`")


def _through_arrow(part: Part, raw: Dataset, step: PromptKeys | TokenIds, settings: list[str | int | None]) -> Dataset:
    """Send all rows of a source through a step, or take them from the cache if its content went through before.

    `settings` are what the step's result depends on beside the rows.
    """
    name = digest([fingerprints.of_source(part), type(step).__name__, settings, CODE])[:32]
    cache = cache_folder() / name
    cache.mkdir(parents=True, exist_ok=True)
    raw = raw.select_columns([column for column in raw.column_names if column in FIELDS])
    slices: list[Dataset] = []
    starts = range(0, len(raw), SLICE)
    for number, start in enumerate(starts, 1):
        rows = raw.select(range(start, min(start + SLICE, len(raw))))
        processes = min(num_cores(), len(rows) // NUM_PER_PROCESS)
        with sources.progress_bar(len(raw) >= NUM_QUIET), sources.alone_in(cache):
            rows = rows.map(
                step,
                batched=True,
                batch_size=BATCH,
                remove_columns=raw.column_names,
                features=step.features(),
                num_proc=processes if processes > 1 else None,
                cache_file_name=str(cache / f"{start}.arrow"),
                new_fingerprint=f"{name}-{start}",
                desc=f"Preparing {part.dataset}" + (f" ({number} of {len(starts)})" if len(starts) > 1 else ""),
            )
        slices.append(rows)
    return concatenate_datasets(slices) if len(slices) > 1 else slices[0]


def _in_pieces(rows: Dataset, length: int) -> Dataset:
    """Cut texts into pieces of `length` tokens; the last piece of a text may be shorter."""

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        return {"input_ids": [ids[i : i + length] for ids in batch["input_ids"] for i in range(0, len(ids), length)]}

    # upstream: the fingerprint is all that names a dataset's rows and what was done to them.
    name = digest([rows._fingerprint, length, CODE])[:16]
    with sources.progress_bar(len(rows) >= NUM_QUIET):
        return rows.map(cut, batched=True, new_fingerprint=name)
