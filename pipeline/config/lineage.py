"""Say how weights follow from stage to stage; decided by the config alone, so that a plan can say it before any run."""

from dataclasses import dataclass

from pipeline.config.schema import BASE, Options, Ppo, RunConfig, Taken, TrainingStage
from pipeline.config.stage_types import type_of


@dataclass(frozen=True)
class Place:
    """Where weights lie, relative to the run folder: full weights (None: the base model) and an adapter or none."""

    full: str | None = None
    adapter: str | None = None

    def __str__(self) -> str:
        full = self.full or "base model"
        return f"{full} + adapter {self.adapter}" if self.adapter else full


@dataclass(frozen=True)
class Start:
    """What a stage starts from. With `merge` the parent's adapter becomes part of a full model first."""

    parent: str
    place: Place
    merge: bool


def output_folder(stage: str) -> str:
    return f"{stage}/output"


def start_of(config: RunConfig, name: str) -> Start:
    """Find the weights a training stage starts from."""
    stage = config.section(name, TrainingStage)
    assert stage.init is not None, "`references` has filled it in"
    parent = parent_of(config, stage)
    place = Place() if parent is None else place_of(config, stage.init)
    return Start(stage.init, place, merge=place.adapter is not None and not continues(parent, stage))


def parent_of(config: RunConfig, stage: TrainingStage) -> TrainingStage | Taken | None:
    """Return the stage that a training stage starts from; None: it starts from the base model."""
    parent = None if stage.init in (None, BASE) else config.stages[stage.init]
    assert parent is None or isinstance(parent, TrainingStage | Taken), "`references` has checked it"
    return parent


def place_of(config: RunConfig, name: str) -> Place:
    """Find the weights that a stage hands on: one that trains, or one that is taken from another run."""
    stage = config.stages[name]
    if isinstance(stage, Taken):
        return _place_of_taken(name, stage)
    if config.section(name, TrainingStage).lora is None:
        return Place(full=output_folder(name))
    start = start_of(config, name)
    return Place(f"{name}/merged" if start.merge else start.place.full, output_folder(name))


def _place_of_taken(name: str, stage: Taken) -> Place:
    if stage.weights == "full":
        return Place(full=output_folder(name))
    return Place(f"{name}/merged" if stage.weights == "with base" else None, output_folder(name))


def shares_backbone(config: RunConfig, name: str) -> bool:
    """Tell whether a PPO stage's four models are adapters on one base, and can be views of one backbone."""
    stage = config.section(name, Ppo)
    assert stage.reward is not None, "`references` has filled it in"
    policy = place_of(config, name)
    reward = place_of(config, stage.reward)
    return policy.adapter is not None and reward.adapter is not None and policy.full == reward.full


def needs_float32(config: RunConfig) -> str | None:
    """Say why the weights of the run must be float32, or return None: the base's weights stay as they are."""
    if config.model.scratch:
        return "the model is new"
    for name, stage in config.stages.items():
        if isinstance(stage, Taken) and stage.weights != "on base":
            return f"{name} brings full weights"
        if not isinstance(stage, TrainingStage):
            continue
        if stage.lora is None:
            return f"{name} trains all weights"
        if start_of(config, name).merge:
            return f"{name} merges the adapter of {stage.init} into full weights"
    return None


def root(config: RunConfig) -> Place:
    """Find the model before any alignment: the base model, or the first pretrain stage of a run from scratch."""
    if config.model.path:
        return Place()
    return place_of(config, next(name for name, stage in config.stages.items() if type_of(stage).reads_raw_text))


def continues(parent: TrainingStage | Taken | None, stage: TrainingStage) -> bool:
    """Tell whether a stage can train on in the adapter of its parent."""
    return parent is not None and stage.lora is not None and same_shape(parent.lora or {}, stage.lora)


def same_shape(a: Options, b: Options) -> bool:
    """Tell whether an adapter made with options `a` can be continued under options `b`.

    Dropout and initialisation do not belong to an adapter's shape; `lora_alpha` does, since it scales the weights. A
    `bias` is the same everywhere: any but PEFT's default is refused.
    """
    free = ("lora_dropout", "init_lora_weights", "bias")
    shape_of_a = {key: value for key, value in a.items() if key not in free}
    shape_of_b = {key: value for key, value in b.items() if key not in free}
    return shape_of_a == shape_of_b
