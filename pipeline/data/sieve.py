"""Choose the rows of a dataset that a stage gets, and count all others by reason. Masks are over all rows."""

import hashlib
import itertools

import numpy as np
from datasets import Dataset, Value

from pipeline.config.graph import TRAIN
from pipeline.config.requests import Request
from pipeline.data.audit import ENOUGH, QUANTILES, Audit, Few, Finding
from pipeline.data.batches import FAULT_KINDS, NOTICED
from pipeline.data.places import Part
from pipeline.data.row_kind import RowKind

NUM_NAMED = 5  # rows named per finding


class Sieve:
    """The rows that are kept, and those that were kept until they were dropped for a reason.

    It starts with all rows that are on one side of the split.
    """

    def __init__(self, side: np.ndarray):
        self.kept = side.copy()
        self.dropped: dict[str, np.ndarray] = {}

    def drop(self, reason: str, rows: np.ndarray) -> None:
        """Drop those of `rows` that are still kept."""
        self.dropped[reason] = self.kept & rows
        self.kept = self.kept & ~rows

    def drop_faults(self, rows: Dataset) -> None:
        """Drop the rows that do not fit their format or their kind."""
        fault = column(rows, "_fault")
        for number, reason in enumerate(FAULT_KINDS, 1):
            self.drop(reason, fault == number)


def column(rows: Dataset, name: str) -> np.ndarray:
    """Return a column of numbers."""
    return rows.data.column(name).to_numpy()


def row_lengths(rows: Dataset, kind: RowKind) -> dict[str, np.ndarray]:
    """Return lengths in tokens: of the whole of each row (`row`), and of its parts where it has several."""
    parts = {name: column(rows, f"_{name}") for name in kind.lengths}
    lengths = {"row": kind.whole(parts)}
    return lengths | parts if len(parts) > 1 else lengths


def repeats(digests: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the kept rows that equal a kept row before them."""
    rows = np.flatnonzero(kept)
    _, first = np.unique(digests[rows], return_index=True)
    repeated = kept.copy()
    repeated[rows[first]] = False
    return repeated


def weighted(kept: np.ndarray, sizes: list[int], weights: list[float | None]) -> np.ndarray:
    """Return which rows to take so that the sources are in the proportion of their weights; no row repeats.

    The source that runs out first sets the size; of the others rows are left out, spread evenly.
    """
    shares = [weight for weight in weights if weight is not None]
    if len(shares) < len(weights):
        return kept
    bounds = np.cumsum([0, *sizes])
    rows_of = [np.flatnonzero(kept[start:end]) + start for start, end in itertools.pairwise(bounds)]
    unit = min(len(rows) / share for rows, share in zip(rows_of, shares, strict=True))
    chosen = np.zeros(len(kept), bool)
    for rows, share in zip(rows_of, shares, strict=True):
        number = min(len(rows), round(unit * share))
        chosen[rows[np.arange(number) * len(rows) // max(number, 1)]] = True
    return chosen


def spread(kept: np.ndarray, lengths: np.ndarray, number: int, longest: bool) -> np.ndarray:
    """Return at most `number` of the kept rows, spread evenly over their lengths.

    `longest`: the longest row is among them; otherwise all are of the shorter half, as far as it goes.
    """
    rows = np.flatnonzero(kept)
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    if not longest:
        ordered = ordered[: max(number, len(ordered) // 2)]
    number = min(number, len(ordered))
    chosen = np.zeros(len(kept), bool)
    chosen[ordered[np.arange(1, number + 1) * len(ordered) // max(number, 1) - 1]] = True
    return chosen


def audit_of(
    rows: Dataset,
    parts: list[Part],
    sizes: list[int],
    request: Request,
    kind: RowKind,
    sieve: Sieve,
    taken: np.ndarray,
    sequences: int,
) -> Audit:
    """Return the account of a dataset's rows. `sizes` are the numbers of rows of its `parts`.

    `taken` are the rows that the stage gets: those that the sieve kept, or a few of them.
    """
    kept = sieve.kept
    lengths = row_lengths(rows, kind)
    quantiles: dict[str, list[int]] = {}
    if kept.any():
        for name, values in lengths.items():
            quantiles[name] = _quantiles(values[kept])
    keys = np.unique(column(rows, "_key")[kept])
    too_long = lengths["row"][sieve.dropped["too_long"]] if "too_long" in sieve.dropped else lengths["row"][:0]
    noticed = _findings(rows, _noticed(rows, kind, lengths, kept))
    fault = None
    if request.split == TRAIN and kept.any():
        fault = kind.fault_of_all(int(kept.sum()), {name: noticed[name].count for name in kind.findings})
    return Audit(
        parts=tuple(zip(parts, sizes, strict=True)),
        split=request.split,
        read=int(kept.sum() + sum(mask.sum() for mask in sieve.dropped.values())),
        rows=int(kept.sum()),
        tokens=_num_tokens(rows, kind, kept),
        dropped=_findings(rows, sieve.dropped),
        noticed=noticed,
        lengths=quantiles,
        limit=(request.length_option, request.max_length),
        prompts=(len(keys), hashlib.sha256(keys.tobytes()).hexdigest()),
        sequences=sequences,
        fault=fault,
        longest_dropped=int(too_long.max(initial=0)),
        enough=_enough(lengths["row"][kept], too_long),
        few=None if request.num_rows is None else _few(rows, kind, taken, lengths["row"]),
        truncates=request.truncates,
    )


def _few(rows: Dataset, kind: RowKind, taken: np.ndarray, lengths: np.ndarray) -> Few:
    """Describe the few rows that a smoke run takes."""
    quantiles = _quantiles(lengths[taken]) if taken.any() else []
    return Few(int(taken.sum()), _num_tokens(rows, kind, taken), quantiles)


def _enough(kept: np.ndarray, too_long: np.ndarray) -> int:
    """Return the tokens that nearly all rows have at most, whether they are kept or too long."""
    together = np.concatenate([kept, too_long])
    return int(np.quantile(together, ENOUGH, method="higher")) if len(together) else 0


def _quantiles(lengths: np.ndarray) -> list[int]:
    return np.quantile(lengths, QUANTILES, method="higher").tolist()


def _num_tokens(rows: Dataset, kind: RowKind, mask: np.ndarray) -> int:
    """Return the number of tokens in some of the rows."""
    return sum(int(column(rows, f"_{name}")[mask].sum()) for name in kind.lengths)


def _noticed(rows: Dataset, kind: RowKind, lengths: dict[str, np.ndarray], kept: np.ndarray) -> dict[str, np.ndarray]:
    """Return the kept rows that are worth a look, by what is noticed of them."""
    digests = column(rows, "_digest")
    masks = {
        "duplicate": repeats(digests, kept),
        "contradictory": _contradicts(column(rows, "_pair"), digests, kept),
    }
    for name in NOTICED:
        masks[name] = kept & (column(rows, f"_{name}") > 0)
    numbers = {name: column(rows, name) for name, feature in kind.extras.items() if isinstance(feature, Value)}
    for name, mask in kind.find(lengths | numbers).items():
        masks[name] = kept & mask
    return masks


def _contradicts(pairs: np.ndarray, digests: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return the kept comparisons whose two sides occur the other way round too."""
    rows = np.flatnonzero(kept)
    labelled = np.unique(np.stack([pairs[rows], digests[rows]]), axis=1)[0]
    values, counts = np.unique(labelled, return_counts=True)
    return kept & np.isin(pairs, values[counts > 1])


def _findings(rows: Dataset, masks: dict[str, np.ndarray]) -> dict[str, Finding]:
    """Count the rows of each mask, and name the first of them."""
    findings: dict[str, Finding] = {}
    for kind, mask in masks.items():
        first = np.flatnonzero(mask)[:NUM_NAMED].tolist()
        why = rows[first[0]]["_why"] if first else None
        findings[kind] = Finding(count=int(mask.sum()), rows=tuple(first), why=why)
    return findings
