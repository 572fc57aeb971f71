"""Account for a dataset's rows: count them, name the first places, and hold shares against the limits of `checks:`."""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.data.faults import DROPPED, NOTICED
from pipeline.data.places import Part
from pipeline.data.rows import ROWS
from pipeline.data.sources import locate
from pipeline.system.json_object import JsonObject

QUANTILES = (0.0, 0.5, 0.9, 0.99, 1.0)
ENOUGH = 0.95  # share of the rows that need not be too long


@dataclass(frozen=True)
class Finding:
    """Name the rows that have something in common: how many, the first of them, and what is wrong with the first."""

    count: int
    rows: tuple[int, ...] = ()
    why: str | None = None


@dataclass(frozen=True)
class Few:
    """The rows that a smoke run takes: how many, their tokens, and quantiles (QUANTILES) of a row's tokens."""

    rows: int
    tokens: int
    lengths: list[int]


@dataclass(frozen=True)
class Audit:
    """Tell what became of the rows of a dataset that are on one side of the split.

    `read` rows are `rows` and those of `dropped`. `lengths` are quantiles (QUANTILES) in tokens, of the whole row
    (`row`) and of its parts. `limit` is the option that limits a row's length, and the limit. `prompts` are the number
    of different prompts in `rows` and their digest, `sequences` what the trainer gets: rows, or pieces of texts. Of a
    stream only the first documents are known. `few`: what a smoke run takes of `rows`.
    """

    parts: tuple[tuple[Part, int], ...]
    split: str
    read: int
    rows: int
    tokens: int
    dropped: dict[str, Finding]
    noticed: dict[str, Finding]
    lengths: dict[str, list[int]]
    limit: tuple[str, int | None]
    prompts: tuple[int, str] = (0, "")
    sequences: int = 0
    fault: str | None = None  # why the rows cannot be trained on together
    streamed: bool = False
    head: tuple[list[int], ...] = ()  # of a stream: token ids of its first pieces
    longest_dropped: int = 0  # tokens of the longest row that is left out as too long
    enough: int = 0  # tokens that ENOUGH of these rows and of those that are kept have at most
    few: Few | None = None
    truncates: bool | None = False  # rows that are too long are cut where that is possible; None: never in this stage

    @property
    def dataset(self) -> str:
        """Return the name of the dataset in the config."""
        return self.parts[0][0].dataset

    @property
    def label(self) -> str:
        """Return the name of the dataset in messages: its only file or source, or its name in the config."""
        return self.parts[0][0].label if len(self.parts) == 1 else f"dataset {self.dataset!r}"

    @property
    def used_lengths(self) -> tuple[tuple[float, int], ...]:
        """Return the quantiles of the tokens of a row that the stage gets: shares, and tokens; empty without rows."""
        lengths = self.lengths.get("row", []) if self.few is None else self.few.lengths
        return tuple(zip(QUANTILES, lengths, strict=False))

    @property
    def num_dropped(self) -> int:
        """Return the number of rows that are left out."""
        return sum(finding.count for finding in self.dropped.values())

    def place(self, row: int) -> str:
        """Return the file of a row and its number there, counted from 0."""
        for part, size in self.parts:
            if row < size:
                return locate(part, row)
            row -= size
        raise IndexError(row)

    def what(self, kind: str) -> str:
        """Return a kind of finding in words."""
        words = DROPPED | NOTICED
        for rows in ROWS.values():
            words |= rows.findings
        return words[kind].format(limit=" = ".join(map(str, self.limit)))

    def problems(self, thresholds: Mapping[str, float | None]) -> list[str]:
        """Return messages: findings whose share of the rows is above the threshold, and what stops all of the rows."""
        messages = []
        for kind, finding in (self.dropped | self.noticed).items():
            allowed = thresholds.get(kind)
            base = self.read if kind in self.dropped else self.rows
            if self.streamed or allowed is None or finding.count <= allowed * base:
                continue  # a stream is judged as it is read
            first, *more = map(self.place, finding.rows)
            first += f": {finding.why}" if finding.why else ""
            then = f"\n    then {', '.join(more)}" if more else ""
            share = f"{finding.count} of {base} rows ({finding.count / base:.2%}) {self.what(kind)}"
            mend = f"\n    {self._how_to_keep(go_on=self.rows > 0)}" if kind == "too_long" else ""
            messages.append(f"{share}; `checks.{kind}` allows {allowed:.2%}. First {first}{then}{mend}")
        if not self.rows and not messages:
            why = [f"{finding.count} {self.what(kind)}" for kind, finding in self.dropped.items() if finding.count]
            if not self.read:
                total = sum(size for _, size in self.parts)
                why = [f"all prompts of its {total} rows are on the other side of the split; change its `heldout`"]
            mend = f". {self._how_to_keep(go_on=False)}" if self.longest_dropped else ""
            messages.append(f"no row is left on the {self.split} side: {', '.join(why)}{mend}")
        if self.fault is not None:
            messages.append(self.fault)
        return [f"{self.label}: {message}" for message in messages]

    def _how_to_keep(self, go_on: bool) -> str:
        """Say what to do about rows that are too long; `go_on`: whether the stage could go on without them."""
        ways = [f"raise `{self.limit[0]}`"]
        if self.truncates is False:
            ways.append("say `too_long: truncate` at the top level")
        if go_on:
            ways.append("say `checks: {too_long: null}` at the top level to go on without them")
        return f"the longest has {self.longest_dropped} tokens: {', or '.join(ways)}"

    def record(self) -> JsonObject:
        """Return what the manifest keeps of it."""
        number, digest = self.prompts
        return {
            "split": self.split,
            "read": self.read,
            "rows": self.rows,
            "tokens": self.tokens,
            "prompts": number,
            "prompts_digest": digest,
            "dropped": _counts(self.dropped),
            "noticed": _counts(self.noticed),
        }


def _counts(findings: dict[str, Finding]) -> dict[str, int]:
    """Return how many rows each finding has, of those that have some."""
    return {kind: finding.count for kind, finding in findings.items() if finding.count}
