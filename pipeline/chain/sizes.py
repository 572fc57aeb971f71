"""Hold the sizes of a stage's data and model, in plain numbers that can be kept."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.chain.preflight import Facts
    from pipeline.data.audit import Audit


@dataclass(frozen=True)
class Size:
    """Hold what a stage gets: rows of `data` and their tokens, the trainer's sequences and steps, rows of `eval_data`.

    Of a stream nobody knows how much there is: its rows are 0. `steps` are those in one process. `parameters` are those
    of the model that trains, or of the base model where a stage samples. `lengths`: shares of the rows, and the tokens
    that a row of this share has at most.
    """

    rows: int
    tokens: int
    sequences: int
    steps: int
    eval_rows: int
    eval_tokens: int
    parameters: int
    lengths: Sequence[tuple[float, int]] = ()

    @property
    def per_row(self) -> float:
        """Return the tokens of a row on average."""
        return self.tokens / max(self.rows, 1)

    def longest_of(self, rows: int) -> float:
        """Return the tokens of the longest of so many rows, on average; those of a row where lengths are not known.

        With the quantile function Q, linear between two known shares, it is the integral of Q(u) rows u^(rows - 1).
        """
        if not self.lengths:
            return self.per_row
        longest = float(self.lengths[-1][1])
        for (low, least), (high, most) in itertools.pairwise(self.lengths):
            slope = (most - least) / (high - low)
            longest -= slope * (high ** (rows + 1) - low ** (rows + 1)) / (rows + 1)
        return longest


def largest(sizes: Mapping[str, Size]) -> int:
    """Return the parameters of the largest model of several stages."""
    return max((size.parameters for size in sizes.values()), default=0)


def size_of(facts: "Facts") -> Size:
    """Return the sizes that the facts of a stage tell."""
    data = facts.audits["data"]
    rows, tokens = _used(data)
    held_out = facts.audits.get("eval_data")
    eval_rows, eval_tokens = (0, 0) if held_out is None else _used(held_out)
    parameters = (facts.sampled or 0) if facts.parameters is None else facts.parameters["total"]
    sequences = 0 if data.streamed else data.sequences
    lengths = () if data.streamed else data.used_lengths
    return Size(rows, tokens, sequences, facts.steps or 0, eval_rows, eval_tokens, parameters, lengths)


def _used(audit: "Audit") -> tuple[int, int]:
    """Return the rows that a stage gets of a dataset, and their tokens."""
    if audit.streamed:
        return 0, 0
    return (audit.rows, audit.tokens) if audit.few is None else (audit.few.rows, audit.few.tokens)
