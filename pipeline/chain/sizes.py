"""Hold the sizes of a stage's data and model, in plain numbers that can be kept."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.chain.preflight import Facts
    from pipeline.data.audit import Audit


@dataclass(frozen=True)
class Size:
    """Hold what a stage gets: rows of `data` and their tokens, the trainer's sequences and steps, rows of `eval_data`.

    Of a stream nobody knows how much there is: its rows are 0. `steps` are those in one process. `parameters` are those
    of the model that trains, or of the base model where a stage samples.
    """

    rows: int
    tokens: int
    sequences: int
    steps: int
    eval_rows: int
    eval_tokens: int
    parameters: int

    @property
    def per_row(self) -> float:
        """Return the tokens of a row on average."""
        return self.tokens / max(self.rows, 1)


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
    return Size(rows, tokens, sequences, facts.steps or 0, eval_rows, eval_tokens, parameters)


def _used(audit: "Audit") -> tuple[int, int]:
    """Return the rows that a stage gets of a dataset, and their tokens."""
    if audit.streamed:
        return 0, 0
    return audit.few or (audit.rows, audit.tokens)
