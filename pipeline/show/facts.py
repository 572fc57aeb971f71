"""Look at what must hold before anything is trained, or recall what was found when everything was the same."""

import contextlib
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.base import base_model
from pipeline.chain import earlier_data, run_folder, staleness
from pipeline.chain.sizes import Size, size_of
from pipeline.chain.trials import try_functions
from pipeline.config import validated
from pipeline.config.graph import datasets
from pipeline.config.requests import run_data
from pipeline.config.schema import RunConfig
from pipeline.data.removed import Removed
from pipeline.records.manifest import Manifest
from pipeline.show.plan import Figures, figures
from pipeline.show.screen import Table
from pipeline.system import digests, kept
from pipeline.system.errors import UserError

_KIND = "facts"


@dataclass(frozen=True)
class Known:
    """What a plan shows beside the decisions: figures of each stage, and the tables of its data.

    `prompts`: what the functions of each stage that has some are tried with. `warnings`: what is likely a mistake.
    `sizes`: of each stage's data and model. `speed`: operations a second of the CPU; None: not measured.
    """

    stages: dict[str, Figures] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sizes: dict[str, Size] = field(default_factory=dict)
    speed: float | None = None


NOTHING = Known()


def look(config: RunConfig, recorded: Manifest, names: list[str]) -> Known:
    """Read every dataset of the stages `names`, try their functions and count their parameters.

    What was found to be right is kept, and not looked at again while nothing has changed that it depends on. Functions
    are tried every time: nobody knows what else they need, such as a variable, a file or a service.

    Raises:
        UserError: with one line for each stage that could not run.
    """
    known = _look(config, recorded, names)
    earlier = list(earlier_data.warnings(config, recorded))  # other runs change by themselves
    return dataclasses.replace(known, warnings=[*known.warnings, *earlier])


def _look(config: RunConfig, recorded: Manifest, names: list[str]) -> Known:
    """Look at what follows from this run alone, or recall it."""
    key = _key(config, recorded, names)
    value = None if key is None else kept.recall(_KIND, key)
    if value is not None:
        with contextlib.suppress(UserError):  # it is told below, with all other problems
            for name, prompt in value["prompts"].items():
                try_functions(config, name, prompt)
            tables = [Table(**table) for table in value["tables"]]
            sizes = {name: Size(**size) for name, size in value["sizes"].items()}
            return Known(value["stages"], tables, value["prompts"], value["warnings"], sizes, value["speed"])
    from pipeline.chain import forecast, foresight, preflight
    from pipeline.show import check_data

    tokenizer, tokenizer_record = run_folder.tokenizer_of(config, recorded)
    facts = preflight.check(config, names, tokenizer, tokenizer_record.fingerprint)
    audits = {name: fact.audits for name, fact in facts.items()}
    tables = check_data.tables(audits, config.checks.model_dump())
    prompts = {name: fact.prompt for name, fact in facts.items() if fact.prompt is not None}
    steps = {name: fact.steps for name, fact in facts.items() if fact.steps is not None}
    warnings = [*foresight.no_template(config, tokenizer), *foresight.warnings(config, audits, steps)]
    sizes = {name: size_of(fact) for name, fact in facts.items() if fact.audits}  # others are taken from another run
    shown = {name: figures(config, name, fact) for name, fact in facts.items()}
    known = Known(shown, tables, prompts, warnings, sizes, forecast.speed())
    if key is not None and key == _key(config, recorded, names):  # nothing changed meanwhile
        kept.keep(_KIND, key, dataclasses.asdict(known))
    return known


def _key(config: RunConfig, recorded: Manifest, names: list[str]) -> str | None:
    """Return the digest of all that is looked at; None where that cannot be told without looking.

    Paths count too, since messages name them.
    """
    model = base_model.settled_state(config, recorded)
    if model is None:
        return None
    try:
        inputs: list[Any] = [staleness.function_inputs(config, name) for name in names]
        data = Removed(run_data(config))
        inputs += [data.states_of(dataset) for name in names for dataset in datasets(config.stages[name]).values()]
        inputs.append(run_folder.source_of_tokenizer(config))
    except UserError:  # it is told with all other problems
        return None
    saved = digests.checksums(config.run_path, [config.run_path / "tokenizer"])
    tokenizer = None if recorded.tokenizer is None else recorded.tokenizer.model_dump()
    places = [str(config.source), str(Path.cwd()), str(config.run_path)]
    settings = [validated.to_plain(config), names, places, kept.installation(), kept.environment()]
    return digests.digest([settings, inputs, model, saved, tokenizer, sorted(recorded.stages)])
