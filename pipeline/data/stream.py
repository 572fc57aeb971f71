"""Read raw text of any size as it is trained on: shuffled block by block, packed, resumable at the exact piece.

A block is `shuffle_buffer` documents in the order of the files. It is shuffled by itself, tokenised, joined with eos
between documents and cut into pieces of `max_length` tokens; what is left at its end is a shorter piece, so no token is
lost. A block depends on seed, pass and number alone. To resume, the block that was being trained on is made again, and
the pieces of it that were used are passed over.
"""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from datasets import IterableDataset, concatenate_datasets, interleave_datasets

from pipeline.config import graph
from pipeline.data import heldout, sources
from pipeline.data.audit import Audit, Finding
from pipeline.data.encode import encode_texts
from pipeline.data.faults import DROPPED, Row, RowFault
from pipeline.data.media import MEDIA
from pipeline.data.places import Part
from pipeline.data.prepare import Datasets, check_serves, shape_of
from pipeline.data.rows import ROWS
from pipeline.data.unreadable import readable
from pipeline.system.errors import UserError
from pipeline.system.json_object import JsonObject

TEXT = ROWS["text"]
NUM_SHOWN = 64  # pieces that can be looked at before a run
NUM_JUDGED = 1000  # documents before a share of them is held against its threshold


@dataclass(frozen=True)
class Block:
    """Where a block begins: pieces and documents before it, those left out by reason, and the reader's own state."""

    piece: int = 0
    epoch: int = 0
    number: int = 0
    documents: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    reader: JsonObject | None = None


class TextStream:
    """Read the pieces of a dataset's documents, pass after pass, without end; `Bookmark` knows where training is."""

    def __init__(self, datasets: Datasets, name: str, max_length: int, seed: int):
        assert datasets.tokenizer is not None
        self.tokenizer = datasets.tokenizer
        self.thresholds = datasets.data.thresholds
        self.num_in_block = datasets.data.sections[name].shuffle_buffer
        self.max_length = max_length
        self.seed = seed
        self.parts = datasets.find(name)
        self.excluded = datasets.evaluated_elsewhere(name)
        self._why: dict[str, str] = {}  # the first fault of each kind

    def blocks(self, block: Block) -> Iterator[tuple[Block, list[list[int]]]]:
        """Yield every block from `block` on, with its pieces.

        Raises:
            UserError: if too many documents cannot be used, or none can.
        """
        while True:
            start = block
            reader = self._reader(block)
            documents = iter(reader)
            while rows := self._read(documents):
                pieces, dropped = self._cut(rows, block)
                yield block, pieces
                block = Block(
                    piece=block.piece + len(pieces),
                    epoch=block.epoch,
                    number=block.number + 1,
                    documents=block.documents + len(rows),
                    dropped=dict(Counter(block.dropped) + dropped),
                    reader=reader.state_dict(),
                )
            if start.number == 0 and block.piece == start.piece:
                why = f"of {block.documents} documents none can be used {block.dropped or ''}"
                first = f". The first: {next(iter(self._why.values()))}" if self._why else ""
                raise UserError(f"{self.parts[0].label}: {why}{first}")
            self._judge(block.documents, block.dropped)
            block = dataclasses.replace(block, epoch=block.epoch + 1, number=0, reader=None)

    def look(self) -> Audit:
        """Return the account of its first block."""
        blocks = self.blocks(Block())
        _, pieces = next(blocks)
        after, _ = next(blocks)
        dropped = {kind: Finding(count) for kind, count in after.dropped.items()}
        return Audit(
            parts=tuple((part, 0) for part in self.parts),
            split=graph.TRAIN,
            read=after.documents,
            rows=after.documents - sum(after.dropped.values()),
            tokens=sum(map(len, pieces)),
            dropped=dropped,
            noticed={},
            lengths={},
            limit=("", None),
            streamed=True,
            head=tuple(pieces[:NUM_SHOWN]),
        )

    def _reader(self, block: Block) -> IterableDataset:
        """Return the documents of all sources in order, or mixed by their weights, from a block's beginning on."""
        sources_read = [self._source(part) for part in self.parts]
        weights = [part.spec.weight for part in self.parts if part.spec.weight is not None]
        if len(sources_read) == 1:
            reader = sources_read[0]
        elif len(weights) < len(sources_read):
            reader = concatenate_datasets(sources_read)
        else:
            shares = [weight / sum(weights) for weight in weights]
            # Sources that end begin again until all were read through.
            seed = self.seed + block.epoch
            reader = interleave_datasets(sources_read, shares, seed=seed, stopping_strategy="all_exhausted")
        assert isinstance(reader, IterableDataset)
        if block.reader is not None:
            reader.load_state_dict(block.reader)
        return reader

    def _source(self, part: Part) -> IterableDataset:
        """Return the documents of one source: the columns of text, and of what must not be beside it."""
        rows = sources.load(part, streaming=True)
        columns = sources.column_names(part, rows)
        shape = shape_of(part, rows)
        check_serves(part, shape, columns, TEXT.name)
        return rows.select_columns([name for name in columns if name in ("text", *MEDIA)])

    def _cut(self, rows: list[Row], block: Block) -> tuple[list[list[int]], Counter[str]]:
        """Return the pieces of a block's documents, and the number of those left out by reason."""
        documents: list[str] = []
        dropped: Counter[str] = Counter()
        for row in rows:
            try:
                document = TEXT.convert(row, "text")
                if len(self.excluded) and _contains(self.excluded, heldout.key(document)):
                    raise RowFault("held_out", "text", "is a text that another dataset is evaluated on")
                documents.append(document["text"])
            except RowFault as fault:
                dropped[fault.kind] += 1
                self._why.setdefault(fault.kind, str(fault))
        num_documents = block.documents + len(rows)
        if num_documents >= NUM_JUDGED:
            self._judge(num_documents, Counter(block.dropped) + dropped)
        order = np.random.default_rng([self.seed, block.epoch, block.number]).permutation(len(documents))
        encoded = encode_texts(self.tokenizer, [documents[i] for i in order])
        ids = list(itertools.chain.from_iterable(encoded))
        return [ids[i : i + self.max_length] for i in range(0, len(ids), self.max_length)], dropped

    def _read(self, documents: Iterator[Row]) -> list[Row]:
        """Return the documents of the next block; an empty list at the end of a pass."""
        with readable(self.parts[0]):
            return list(itertools.islice(documents, self.num_in_block))

    def _judge(self, num_documents: int, dropped: Mapping[str, int]) -> None:
        """Refuse the dataset where a share of its first documents that cannot be used is above its threshold."""
        for kind, count in dropped.items():
            allowed = self.thresholds.get(kind)
            if allowed is not None and count > allowed * num_documents:
                share = f"{count} of the first {num_documents} documents {DROPPED[kind]}"
                limit = f"`checks.{kind}` allows {allowed:.2%}"
                first = self._why.get(kind, "before the resume")
                raise UserError(f"{self.parts[0].label}: {share}; {limit}. The first: {first}")


def _contains(sorted_keys: np.ndarray, key: int) -> bool:
    place = int(np.searchsorted(sorted_keys, np.uint64(key)))
    return place < len(sorted_keys) and bool(sorted_keys[place] == np.uint64(key))
