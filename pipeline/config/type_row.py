"""Define what the table of stage types says of a type: the columns of `stage_types.py`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config.logged_figures import LOSSES, Ours
from pipeline.config.ranges import Range
from pipeline.config.schema import Stage

# What a stage hands on. An aligned policy is one that comparisons or scores have shaped.
Makes = Literal["policy", "aligned policy", "reward model", "evaluation", "shift report"]
POLICIES: tuple[Makes, ...] = ("policy", "aligned policy")
REWARD_MODELS: tuple[Makes, ...] = ("reward model",)
ZERO_2 = "DeepSpeed ZeRO-2"
ZERO_3 = "DeepSpeed ZeRO-3"


@dataclass(frozen=True)
class Reference:
    """A field of a stage that names another stage.

    `default`: the type whose only stage is taken where the field is empty.
    `fallback`: what the field then says if there is no stage of that type.
    `missing`: what to tell the user if there is none; None: the field may stay empty.
    `unless`: another field that makes this one needless where it is filled.
    """

    field: str
    makes: tuple[Makes, ...]
    default: str | None = None
    fallback: str | None = None
    missing: str | None = None
    unless: str | None = None


@dataclass(frozen=True)
class StageType:
    """What others must know of a stage type."""

    section: type[Stage]  # our keys
    module: str  # the file in `stages/` that runs it
    rows: str  # the kind of row it reads, by its name in `data/rows.py`
    makes: Makes
    trl_config: str | None = None  # the class that takes `training:`; None: it trains nothing
    last_trl: str | None = None  # the last version of TRL that has its trainer; None: later ones have it too
    instead: str = ""  # what to say in the config under later versions
    references: tuple[Reference, ...] = ()
    has_reference: bool = False  # whether a reference policy keeps it near its parent
    length_option: str | None = None  # limits a row's tokens; None: rows are cut into pieces
    new_tokens: str | None = None  # limits the tokens of a completion that the stage samples
    trains_on: tuple[str, ...] = ()  # columns of token ids that are trained on where no mask says it
    fewest_rows: int = 1  # of a batch on one device
    trl_tokenises: bool = False  # TRL renders the prompts itself, in full and without tools
    autocast: bool = True  # computes under autocast where `bf16` or `fp16` is set
    sharded: tuple[str, ...] = ()  # the ways to split a model over processes that it runs under
    defaults: Mapping[str, Any] = field(default_factory=dict)  # laid under `training:`, above TRL's own
    refused: Mapping[str, str] = field(default_factory=dict)  # reason -> options of `training:` that it cannot take
    words: Mapping[str, str] = field(default_factory=dict)  # option -> the only words that it knows
    bounds: Mapping[str, Range] = field(default_factory=dict)  # option -> its numbers, where other types have others
    check_options: Callable[[Any], str | None] | None = None  # says what is wrong with an instance of `trl_config`
    headline: tuple[str, ...] = ()  # the metrics that people read first
    watched: Mapping[str, Ours] = field(default_factory=dict)  # see `rl/healthy_ranges.py`
    shown: Mapping[str, Ours] = field(default_factory=lambda: LOSSES)  # of what its trainer logs, while it trains

    @property
    def reads_raw_text(self) -> bool:
        """Tell whether it reads documents, which have no prompts and may be streamed."""
        return self.rows == "text"
