"""Define the schema of a run's config: our own few keys. What belongs to TRL, PEFT and transformers is in `options`."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, SerializeAsAny

from pipeline.config.values import Name, PathText, Seed, Text

REPORT = "-shift"  # ends the name of the report that every reward model gets by itself
BASE = "base"  # what `init:` says for the run's base model
MANIFEST = "manifest.json"  # in every run folder
LOCK = ".lock"  # in every stage folder that a run has made, as long as dotfiles are copied with it
# Names in the run folder or in the config that no stage may have.
RESERVED = (BASE, "cache", "tokenizer", MANIFEST, "last_run.json", "report.html")
Options = dict[str, Any]
Format = Literal[
    "auto",
    "text",
    "prompt",
    "prompt_completion",
    "messages",
    "alpaca",
    "sharegpt",
    "unpaired",
    "comparison",
    "hh",
    "scored",
]
Dtype = Literal["float32", "bfloat16", "float16"]


def variant_of(stage_type: str, trainer: object) -> str:
    """Name the row of `stage_types.py` for a stage's type and its `trainer`; None: the type has one trainer."""
    return stage_type if trainer in (None, stage_type) else f"{stage_type} on {trainer}"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ScratchTokenizer(Strict):
    """A byte-level BPE tokenizer trained on datasets of this run."""

    vocab_size: Annotated[int, Field(ge=1, le=10_000_000)] = 1000
    data: list[Text] = Field(min_length=1)


class Scratch(Strict):
    """A model that does not exist yet: transformers config fields (`model_type` among them) and its tokenizer."""

    architecture: Options
    tokenizer: ScratchTokenizer


class Model(Strict):
    """The base model of the run: a hub id or folder (`path`), or a new one (`scratch`)."""

    path: PathText | None = None
    scratch: Scratch | None = None
    revision: Text | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # what `auto` stands for: `base/dtype.py`
    attn_implementation: Text | None = None
    trust_remote_code: bool = False


class Tokenizer(Strict):
    """What to change in the base model's tokenizer: a built-in chat template or a file, and two special tokens."""

    chat_template: PathText | None = None
    pad_token: Text | None = None
    eos_token: Text | None = None


class Source(Strict):
    """Where rows come from; `columns` maps their names to ours, `limit` takes the first rows, `weight` mixes."""

    path: PathText
    name: Text | None = None
    split: Text = "train"
    revision: Text | None = None
    format: Format = "auto"
    columns: dict[Text, Text] = {}
    limit: PositiveInt | None = None
    weight: float | None = Field(default=None, gt=0)


class Data(Source):
    """One dataset: a source, or several. `heldout` is the share of prompts kept for evaluation where both are asked."""

    path: PathText | None = None  # pyright: ignore[reportIncompatibleVariableOverride]  # `sources` may stand for it
    sources: list[Source] = []
    heldout: Annotated[float, Field(gt=0, lt=1)] = 0.05
    streaming: bool = False
    shuffle_buffer: PositiveInt = 1000


Share = Annotated[float, Field(ge=0, le=1)] | None


class Checks(Strict):
    """Shares of a dataset's rows above which a run stops; null: never. All are counted and shown."""

    # Rows that no stage can use: left out.
    malformed: Share = 0.01
    empty: Share = 0.01
    roles: Share = 0.01
    identical: Share = 0.01
    too_long: Share = 0.5
    held_out: Share = None
    # Rows that are used, and worth a look.
    duplicate: Share = None
    contradictory: Share = None
    special_tokens: Share = None
    eos: Share = 0.01
    longer_wins: Share = None


class GateLimits(Strict):
    """What the gate asks of a reward model and of a policy before a stage builds on them; null: not asked.

    The limits of `within_sd` and `length_correlation` lie further out than the report's (shift/measure.py and
    shift/advice.py), which only advises: the gate stops a run.
    """

    # The lower end of the accuracy's interval on held-out comparisons must lie above this.
    accuracy: Share = 0.5
    # The SD of the scores of one prompt's completions, in log-odds: its interval must reach this.
    within_sd: Annotated[float, Field(ge=0)] | None = 0.05
    # The correlation of score and length within prompts: its interval must reach below this.
    length_correlation: Share = 0.85
    # The share of prompts whose likeliest first token is eos or another special token.
    first_token: Share = 0.5


class Stage(Strict):
    """What all stages have. A stage's name is its key in the file; its type defaults to its name."""

    type: str
    data: Text
    seed: Seed | None = None
    accelerate_config: PathText | None = None

    @property
    def kind(self) -> str:
        """Name the row of `stage_types.py` that describes the stage: its type, or the variant of it."""
        return self.type


class TrainingStage(Stage):
    """A stage that trains from the output of another (`init`) by the rows of `data`."""

    init: Text | None = None
    lora: Options | None = None
    training: Options = {}


class Offline(TrainingStage):
    """A stage that learns from the rows alone; `eval_data` gives it a held-out loss."""

    eval_data: Text | None = None


class Reinforced(TrainingStage):
    """A stage that learns from scores of its own completions; the rows are prompts.

    `added_shift` is a stress test: the SD of an offset per prompt that is added to every score. `on_alarm: stop` looks
    at the score on `eval_data` every `eval_every` updates and ends at an alarm with the best policy so far.
    """

    reward: Text | None = None
    shift: Text | None = None
    max_prompt_length: PositiveInt = 512
    added_shift: float = Field(default=0.0, ge=0)
    on_alarm: Literal["warn", "stop"] = "warn"
    eval_data: Text | None = None
    eval_every: PositiveInt = 10
    num_eval_prompts: PositiveInt = 64


class Ppo(Reinforced):
    """PPO against a reward model, with or without a baseline of each prompt that is subtracted from its scores.

    `trainer` is TRL's class that trains: PPOTrainer, or GRPOTrainer with a value model.
    """

    trainer: Literal["ppo", "grpo"] = "ppo"
    prompt_baseline: Literal["none", "sft_mean", "greedy", "reference", "leave_one_out"] = "none"
    baseline_completions: Annotated[int, Field(ge=2)] = 4
    baseline_shrinkage: bool = False

    @property
    def kind(self) -> str:
        return variant_of(self.type, self.trainer)


class Online(Reinforced):
    """RLOO or GRPO, scored by the run's reward model and/or functions named `module:function`."""

    reward_functions: list[Text] = []


class Sampled(Stage):
    """A stage that samples policies on held-out prompts."""

    reward: Text | None = None
    temperature: float = Field(default=1.0, gt=0)
    max_new_tokens: PositiveInt = 128
    max_prompt_length: PositiveInt = 512
    num_prompts: PositiveInt | None = None
    batch_size: PositiveInt = 16


class Evaluate(Sampled):
    """Sample base, baseline and policies on held-out prompts; score with the reward model and a judge."""

    policies: list[Text] | None = None
    baseline: Text | None = None
    judge: Text | None = None


class Shift(Sampled):
    """Measure a reward model on several completions of a policy for each held-out prompt."""

    # Both have a default here; the models are frozen, so that nothing can write the wider type.
    data: Text | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    policy: Text | None = None
    num_prompts: PositiveInt = 200  # pyright: ignore[reportIncompatibleVariableOverride]
    num_completions: Annotated[int, Field(ge=2)] = 4


class Taken(Stage):
    """A finished stage of another run: the user gives `run` and `stage`, `taken.py` finds the rest in that run.

    `weights`: its own full weights, or an adapter on this run's base, or on full weights that are taken with it.
    """

    type: str = ""
    data: Text | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    run: PathText
    stage: Name | None = None
    lora: Options | None = None
    weights: Literal["full", "on base", "with base"] | None = None


S = TypeVar("S", bound=Stage)


class RunConfig(Strict):
    """A whole run, resolved: every reference names a stage, every section has its defaults from the top level.

    `stages` is in an order in which they can run. `source` is the file it came from. Relative paths start at its
    folder, but for `run_dir`, which starts at the working directory.
    """

    name: Name
    run_dir: PathText | None = None
    seed: Seed = 0
    model: Model
    tokenizer: Tokenizer = Tokenizer()
    quantization: Options | None = None
    lora: Options | None = None
    training: Options = {}
    data: dict[Name, Data]
    too_long: Literal["drop", "truncate"] = "drop"
    checks: Checks = Checks()
    gate: Literal["stop", "warn", "off"] = "stop"
    gate_limits: GateLimits = GateLimits()
    stages: dict[Name, SerializeAsAny[Stage]]
    source: Path

    @property
    def folder(self) -> Path:
        return self.source.parent

    def resolve(self, path: str) -> str:
        """Make a local path of the config absolute; leave anything else (a hub id) as it is."""
        candidate = self.folder / Path(path).expanduser()
        return str(candidate.resolve()) if candidate.exists() else path

    @property
    def run_path(self) -> Path:
        return Path(self.run_dir or f"runs/{self.name}").expanduser().resolve()

    def section(self, stage: str, kind: type[S]) -> S:
        """Return the section of a stage that is known to be of this kind."""
        section = self.stages[stage]
        assert isinstance(section, kind), f"{stage} is a stage of type {section.type}"
        return section

    def seed_of(self, stage: str) -> int:
        own = self.stages[stage].seed
        return self.seed if own is None else own
