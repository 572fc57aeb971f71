"""Tell which prompts are left out of training since they are evaluated on, by a digest that is kept."""

from typing import TYPE_CHECKING

from pipeline.config.requests import RunData
from pipeline.data import fingerprints
from pipeline.data.code import CODE
from pipeline.system import kept
from pipeline.system.digests import digest

if TYPE_CHECKING:
    from pipeline.data.prepare import Datasets

_KIND = "removed"
State = list[str | float | bool | None]


class Removed:
    """The prompts left out of the datasets of a run. Rows are read, and libraries imported, only if nothing is kept."""

    def __init__(self, data: RunData):
        self._data = data
        self._datasets: Datasets | None = None

    def digest_of(self, dataset: str) -> str | None:
        """Return the digest of the prompts left out of a dataset; None: there are none.

        Raises:
            UserError: if the dataset, or one that is evaluated on, cannot be read.
        """
        if not self._data.evaluated_beside[dataset]:
            return None
        value = kept.remembered(
            _KIND, lambda: digest([self.states_of(dataset), CODE]), lambda: {"digest": self._compute(dataset)}
        )
        return value["digest"]

    def states_of(self, dataset: str) -> list[State]:
        """Return what decides which rows of a dataset are left: its own state, and those of all evaluated on beside it.

        Raises:
            UserError: if one of them cannot be read.
        """
        return [self._state_of(name) for name in (dataset, *self._data.evaluated_beside[dataset])]

    def _state_of(self, name: str) -> State:
        """Return what decides which prompts of a dataset there are, and which of them are evaluated on."""
        section = self._data.sections[name]
        share = section.heldout if name in self._data.shared else None
        return [fingerprints.of_dataset(name, section, self._data.folder), share, section.streaming]

    def _compute(self, dataset: str) -> str | None:
        from pipeline.data.prepare import Datasets

        if self._datasets is None:
            self._datasets = Datasets(self._data)
        return self._datasets.removed(dataset)
