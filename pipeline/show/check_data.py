"""`rlhf check-data`: what becomes of every dataset's rows, what is worth a look, and rows as the model sees them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from rich.console import Console
from rich.rule import Rule
from transformers import PreTrainedTokenizerFast

from pipeline.chain import foresight, preflight, run_folder
from pipeline.config.options import effective
from pipeline.config.requests import request, run_data
from pipeline.config.schema import RunConfig, Stage, TrainingStage
from pipeline.config.stage_types import type_of
from pipeline.data.audit import Audit, Finding
from pipeline.data.faults import Row
from pipeline.data.joints import begins_with
from pipeline.data.prepare import Datasets
from pipeline.data.row_kind import RowKind
from pipeline.data.rows import ROWS
from pipeline.show.plan import say_warnings
from pipeline.show.screen import Cell, Table, say, show
from pipeline.show.tables import count
from pipeline.system.errors import UserError, all_of, unknown
from pipeline.system.streams import either, printable

TRAINED = (("⟦", "⟧"), ("[[", "]]"))  # around tokens that are trained on; the second where the first cannot be printed
_STYLE = "bold green"
Parts: TypeAlias = list[tuple[str, list[tuple[str, bool]]]]  # of a row: (label, [(text, whether it is trained on)])


def run(config: RunConfig, stages: list[str], sample: int, console: Console) -> None:
    """Check the datasets of the stages `stages` (none given: of all), and show `sample` rows of each.

    Raises:
        UserError: with a line for each dataset that cannot be read or has more faults than `checks` allow.
    """
    for name in stages:
        if name not in config.stages:
            raise UserError(f"--stage: {unknown('stage', name, config.stages)}")
    tokenizer, made = run_folder.tokenizer_of(config, run_folder.open_run(config))
    data = Datasets(run_data(config), tokenizer, made.fingerprint)
    audits: dict[str, dict[str, Audit]] = {}
    problems: list[str] = []
    for name, audits_by_role, faults in preflight.audits_of(config, data, stages or config.stages):
        problems += faults
        if audits_by_role:
            audits[name] = audits_by_role
    for table in tables(audits, config.checks.model_dump()):
        show(table, console)
    say(console, _start_of_rows(tokenizer, audits))
    say_warnings(list(foresight.no_template(config, tokenizer)), console)
    if sample:
        show_rows(_samples(config, data, audits, sample), console)
    if problems:
        raise all_of(config.source, "dataset", "cannot be used", problems)


def _start_of_rows(tokenizer: PreTrainedTokenizerFast, audits: dict[str, dict[str, Audit]]) -> str:
    """Say whether rows begin with BOS, as texts did when the model was trained."""
    if begins_with(tokenizer) is None:
        return "The tokenizer puts no BOS before a text: rows begin as the chat template writes them."
    bos = tokenizer.bos_token
    without = [name for name, roles in audits.items() if any(_lacks_bos(audit) for audit in roles.values())]
    if not without:
        return f"Rows begin with BOS ({bos!r}), which the tokenizer puts before every text."
    lacking = f"Rows of {', '.join(without)} begin without BOS, but the tokenizer puts {bos!r} before every text"
    return f"{lacking}: let the chat template begin with bos_token, or set tokenizer.chat_template to a built-in one."


def _lacks_bos(audit: Audit) -> bool:
    return "no_bos" in audit.noticed and audit.noticed["no_bos"].count > 0


def tables(audits: dict[str, dict[str, Audit]], thresholds: dict[str, float | None]) -> list[Table]:
    """Make a table of the datasets as their stages get them, and one of what is worth a look, with the first rows.

    `thresholds` are the config's `checks:`, by the kind of finding.
    """
    columns = (
        "dataset",
        "for",
        "split",
        "rows",
        "left out",
        "tokens",
        "tokens per row: median / 90 % / 99 % / longest",
    )
    datasets = Table("data", columns)
    findings = Table("findings", ("dataset", "for", "split", "rows that", "rows", "share", "first (from 0)"))
    for stages, audit in _grouped(audits):
        rows = count(audit.rows)
        tokens = count(audit.tokens)
        lengths = "\n".join(f"{name} {_quantiles(values)}" for name, values in audit.lengths.items())
        if audit.streamed:
            rows = "streamed"
            lengths = f"of the first {audit.read} documents: {tokens} tokens"
            tokens = ""
        where = (audit.dataset, stages, audit.split)
        datasets.add(*where, rows, count(audit.num_dropped), tokens, lengths)
        for kind, finding in (audit.dropped | audit.noticed).items():
            if finding.count:
                findings.add(*where, *_finding(audit, kind, finding, thresholds))
    return [datasets, findings] if findings.rows else [datasets]


def _grouped(audits: dict[str, dict[str, Audit]]) -> list[tuple[str, Audit]]:
    """Return each different audit once, with the names of its stages."""
    groups: list[tuple[list[str], Audit]] = []
    for name, roles in audits.items():
        for audit in roles.values():
            same = next((names for names, other in groups if other == audit), None)
            if same is None:
                groups.append(([name], audit))
            else:
                same.append(name)
    return [(", ".join(names), audit) for names, audit in groups]


def _quantiles(values: list[int]) -> str:
    """Show quantiles but the least value."""
    _, *rest = values
    return " / ".join(map(str, rest))


def _finding(audit: Audit, kind: str, finding: Finding, thresholds: dict[str, float | None]) -> tuple[Cell, ...]:
    """Fill the cells of a finding: which rows, how many, their share, and where the first of them are."""
    dropped = kind in audit.dropped
    share = finding.count / (audit.read if dropped else audit.rows)
    allowed = thresholds.get(kind)
    limit = "" if allowed is None else f" (at most {_percent(allowed)} are allowed)"
    color = "yellow" if dropped else ""
    if allowed is not None and share > allowed:
        color = "red"
    words = [(audit.what(kind), color), (" (left out)" if dropped else "", "")]
    is_of_rows = not any(kind in rows.findings for rows in ROWS.values())
    places = ""
    if finding.rows and is_of_rows:
        places = _places(audit, finding.rows)
    why = f": {finding.why}" if finding.why else ""
    return words, str(finding.count), f"{_percent(share)}{limit}", places + why


def _places(audit: Audit, rows: Sequence[int]) -> str:
    """Show where rows of a dataset are: their numbers, with their files where there are several."""
    if sum(len(part.files) for part, _ in audit.parts) > 1 or len(audit.parts) > 1:
        return "\n".join(map(audit.place, rows))
    return f"row {', '.join(map(str, rows))}"


def _in_its_source(audit: Audit, row: int) -> str:
    """Show where a row is: its number, with its source where there are several. Files are not read for it."""
    if len(audit.parts) == 1:
        return f"row {row}"
    for part, size in audit.parts:
        if row < size:
            return f"{part.label}: row {row}"
        row -= size
    raise IndexError(row)


def _percent(share: float) -> str:
    """Show a share with three digits: those of a million rows can be small."""
    return f"{100 * share:.3g} %"


@dataclass
class Sample:
    """Hold rows of a dataset as the model sees them: for which stages, and of each row where it is and its parts."""

    stages: list[str]
    audit: Audit
    rows: list[tuple[str, Parts]]

    @property
    def marks(self) -> list[bool]:
        """Tell of all texts whether they are trained on."""
        return [is_trained for _, parts in self.rows for _, spans in parts for _, is_trained in spans]

    def is_in(self, other: "Sample") -> bool:
        """Tell whether another sample shows all that this one does: the same texts, and what is trained on of them."""

        def texts(sample: "Sample") -> list[tuple[str, str, str]]:
            return [
                (place, label, "".join(text for text, _ in spans))
                for place, parts in sample.rows
                for label, spans in parts
            ]

        if not self.rows or (self.audit.dataset, self.audit.split) != (other.audit.dataset, other.audit.split):
            return False
        return texts(self) == texts(other) and (not any(self.marks) or self.marks == other.marks)


def _samples(config: RunConfig, read: Datasets, audits: dict[str, dict[str, Audit]], number: int) -> list[Sample]:
    """Return samples of all datasets, each rows only once.

    The held-out rows of a dataset are formed as the others are, so that a stage's are not shown beside its others.
    """
    samples: list[Sample] = []
    for name, audits_by_role in audits.items():
        for role, audit in audits_by_role.items():
            is_formed_alike = request(config, name, role).rows == request(config, name, "data").rows
            if role != "data" and is_formed_alike and audit.dataset == audits_by_role["data"].dataset:
                continue
            sample = Sample([name], audit, list(_sampled(config, read, name, role, audit, number)))
            for other in samples:
                if sample.is_in(other) or other.is_in(sample):
                    other.stages += [] if name in other.stages else [name]
                    other.rows = sample.rows if other.is_in(sample) else other.rows
                    break
            else:
                samples.append(sample)
    return samples


def _sampled(
    config: RunConfig, read: Datasets, name: str, role: str, audit: Audit, number: int
) -> Iterator[tuple[str, Parts]]:
    """Go through rows of a stage's dataset that are spread over it: where each is, and its parts."""
    asked = request(config, name, role)
    assert read.tokenizer is not None
    rows: Any = [{"input_ids": ids} for ids in audit.head]  # or a Dataset: both give a row for a number
    numbers = None
    if not audit.streamed:
        prepared = read.prepare(asked)
        rows = prepared.rows
        numbers = prepared.numbers
    for i in np.linspace(0, len(rows) - 1, min(number, len(rows))).round().astype(int).tolist():
        place = f"piece {i} of {'the first ' if audit.streamed else ''}{len(rows)}"
        if numbers is not None:
            place = _in_its_source(audit, int(numbers[i]))
        yield place, parts_of(rows[i], ROWS[asked.rows], config.stages[name], read.tokenizer)


def show_rows(samples: list[Sample], console: Console) -> None:
    """Show rows as the model will see them, and where they are; rows of a source are counted from 0."""
    opening, closing = (either(*pair, console.encoding) for pair in zip(*TRAINED, strict=True))
    for sample in samples:
        title = f"{', '.join(sample.stages)}: {sample.audit.dataset} ({sample.audit.split})"
        console.print(Rule(printable(title, console.encoding), align="left", style="bold cyan"))
        for place, parts in sample.rows:
            say(console, place, "dim")
            for label, spans in parts:
                line = [(f"{label}: " if label else "", "dim")]
                for text, is_trained in spans:
                    line.append((f"{opening}{text}{closing}", _STYLE) if is_trained else (text, ""))
                say(console, line)


def parts_of(row: Row, kind: RowKind, stage: Stage, tokenizer: PreTrainedTokenizerFast) -> Parts:
    """Return a tokenised row as text, special tokens included: (label, [(text, whether it is trained on)])."""

    def text(piece: list[int] | str) -> str:
        if isinstance(piece, str):
            return piece
        return str(tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    masked = True
    if isinstance(stage, TrainingStage):
        masked = effective(stage.kind, stage.training).get("completion_only_loss", True)
    parts = kind.parts(row, type_of(stage).trains_on, masked)
    return [(label, [(text(piece), is_trained) for piece, is_trained in pieces]) for label, pieces in parts]
