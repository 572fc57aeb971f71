"""What every kind of row tells the rest of the package. The kinds themselves are in `rows.py`."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np
from datasets import List, Value
from transformers import PreTrainedTokenizerFast

from pipeline.data.faults import Row, RowFault

# What people see of a row: (the name of a part, its pieces). A piece is ids or text, and whether it is trained on.
Parts = list[tuple[str, list[tuple[list[int] | str, bool]]]]


class RowKind(ABC):
    """One kind of row: from a row of some format to token ids.

    `name`: as in `config/stage_types.py`.
    `columns`: the columns of token ids, and their types in Arrow.
    `extras`: columns that stay beside the token ids, and their types.
    `sides`: the fields of a canonical row that answer its prompt; or the text.
    `lengths`: what is measured in tokens, beside the whole row.
    `findings`: what only rows of this kind can have in common, in words, by the finding's name; see `find`.
    """

    name: ClassVar[str]
    columns: ClassVar[Mapping[str, List]]
    extras: ClassVar[Mapping[str, Value | List]] = {}
    sides: ClassVar[tuple[str, ...]] = ()
    lengths: ClassVar[tuple[str, ...]]
    findings: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def is_served_by(self, shape: str, columns: set[str]) -> bool:
        """Tell whether rows of a format with these columns can become rows of this kind."""

    @abstractmethod
    def convert(self, row: Row, shape: str) -> Row:
        """Return a row of a format in canonical form, with what this kind reads of it.

        Raises:
            RowFault: if the row does not fit.
        """

    @abstractmethod
    def encode(self, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[Row | RowFault]:
        """Return of each canonical row the `columns` and the `extras`, or what is wrong with it."""

    @abstractmethod
    def measure(self, ids: Row) -> dict[str, int]:
        """Return the `lengths` of a tokenised row."""

    def whole(self, lengths: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the lengths of whole rows, from those of their parts."""
        return np.sum([lengths[name] for name in self.lengths], axis=0)

    def longest(self, lengths: Mapping[str, int], options: Mapping[str, Any]) -> tuple[int, str]:
        """Return the longest sequence that a trainer makes of rows, in tokens, and what it is made of.

        `lengths` are the longest of all rows: the whole row (`row`), and its parts. `options` are the trainer's.
        """
        return lengths["row"], f"its longest row has {lengths['row']} tokens"

    def marks(self, row: Row) -> list[str]:
        """Return what makes a canonical row another one than a row with the same texts."""
        return []

    def ends_early(self, row: Row, ids: Row, eos: int) -> bool:
        """Tell whether an answer has eos anywhere but at its end, or not there."""
        return False

    def truncate(self, ids: Row, start: int, max_length: int) -> int:
        """Cut a prompt that does not fit, after its first `start` tokens (its BOS); return how many tokens are cut."""
        return 0

    def find(self, rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return for each of the `findings` which rows have it; `rows` has the lengths and the extras, by name."""
        return {}

    def fault_of_all(self, num_rows: int, findings: Mapping[str, int]) -> str | None:
        """Return why rows that are each in order cannot be trained on together, or None.

        `findings` are the numbers of rows with each of this kind's findings.
        """
        return None

    @abstractmethod
    def parts(self, row: Row, trains_on: tuple[str, ...], masked: bool) -> Parts:
        """Return what people see of a tokenised row.

        A row with a mask is trained on where it has 1, or everywhere if the stage takes no mask (`masked`). Of others
        the columns `trains_on` are trained on.
        """


def cut_prompt(ids: Row, columns: Iterable[str], start: int, prompt: int, over: int) -> int:
    """Cut `over` tokens from prompts of `prompt` tokens, after the first `start`; 0 where they have not as many."""
    if over <= 0 or over >= prompt - start:
        return 0
    for column in columns:
        ids[column] = ids[column][:start] + ids[column][start + over :]
    return over
