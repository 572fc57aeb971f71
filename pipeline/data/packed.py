"""Count the sequences that TRL packs rows into, from the rows' lengths alone."""

from collections.abc import Iterator

import numpy as np
from datasets import Dataset

from pipeline.config.requests import Packing, Request
from pipeline.data import sources

BATCH = 1000  # rows that TRL packs together; the last sequence of a batch may be shorter


def num_packed(lengths: np.ndarray, request: Request) -> int:
    """Return the number of sequences that rows of these lengths, in tokens, are packed into."""
    packing = request.packing
    assert packing is not None, "the rows are packed"
    if request.piece_length is not None:
        lengths = _in_pieces(lengths, request.piece_length)
    if packing.seed is not None:
        order = Dataset.from_dict({"row": np.arange(len(lengths))}).shuffle(seed=packing.seed)
        lengths = lengths[order["row"][:]]
    return sum(_num_of_batch(batch, packing) for batch in _batches(lengths, packing.processes))


def _in_pieces(lengths: np.ndarray, length: int) -> np.ndarray:
    """Return the lengths of the pieces that texts are cut into."""
    pieces = [min(length, total - start) for total in lengths.tolist() for start in range(0, total, length)]
    return np.array(pieces, dtype=np.int64)


def _batches(lengths: np.ndarray, processes: int) -> Iterator[np.ndarray]:
    """Cut rows as TRL gets them: into a part for each process, and each part into batches."""
    for part in np.array_split(lengths, min(processes, max(len(lengths), 1))):
        for start in range(0, len(part), BATCH):
            yield part[start : start + BATCH]


def _num_of_batch(lengths: np.ndarray, packing: Packing) -> int:
    """Return the number of sequences that one batch becomes."""
    if packing.strategy == "wrapped":  # one stream of tokens, cut into pieces
        return -(-int(lengths.sum()) // packing.length)
    from trl.data_utils import pack_dataset  # the import takes seconds

    rows = Dataset.from_dict({"input_ids": [np.zeros(length, np.int8) for length in lengths.tolist()]})
    with sources.progress_bar(False):
        return len(pack_dataset(rows, packing.length, packing.strategy))
