"""Find the stages that an exported model was made from, also in other runs."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.export.source import Source
from pipeline.records.manifest import Origin, Record


@dataclass(frozen=True)
class Ancestor:
    """A stage in a lineage: its record, and in words what it was made from."""

    record: Record
    made_from: str


def lineage(source: Source) -> dict[str, Ancestor]:
    """Return the stage and all that it was made from, ancestors first.

    A stage of another run is named RUN/STAGE. Of other runs of one name the second is called `RUN (2)`, and so on.
    """
    tree = _Tree()
    tree.add(source.stage, source.recorded.stages)
    return tree.stages


class _Tree:
    """Gather stages, each after those that it was made from."""

    def __init__(self) -> None:
        self.stages: dict[str, Ancestor] = {}
        self._runs: dict[str, tuple[str, dict[str, Record]]] = {}  # our name of another run -> its folder and records

    def add(self, name: str, records: Mapping[str, Record], above: str = "") -> None:
        """Add a stage of the run whose `records` these are; `above`: what comes before its name."""
        record = records.get(name)
        if record is None or above + name in self.stages:
            return
        for parent in record.parents.values():
            self.add(parent, records, above)
        if record.origin is None:
            parents = [f"{role} {above}{parent}" for role, parent in record.parents.items() if parent != name]
            made_from = ", ".join(parents) or "base"
        else:
            run = self._name_of(record.origin)
            for other in record.origin.stages:
                self.add(other, record.origin.stages, f"{run}/")
            made_from = f"taken from {run}/{record.origin.stage}"
        self.stages[above + name] = Ancestor(record, made_from)

    def _name_of(self, origin: Origin) -> str:
        """Return our name of another run: a folder, with what its stages were when something was taken from it."""
        for number in itertools.count(1):
            name = origin.name if number == 1 else f"{origin.name} ({number})"
            path, records = self._runs.setdefault(name, (origin.path, {}))
            has_changed = any(records.get(stage, record) != record for stage, record in origin.stages.items())
            if path == origin.path and not has_changed:
                records |= origin.stages
                return name
        raise AssertionError("the numbers do not end")
