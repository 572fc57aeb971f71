"""Say of each stage type all that the rest of the package must know: one row for each type, data only.

Nothing else compares the names of types. A new type is a row here, a file in `stages/`, and, if it reads a kind of row
that no other type reads, a class in `data/rows.py`.
"""

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config.schema import BASE, Evaluate, Offline, Online, Ppo, RunConfig, Shift, Stage

# What a stage hands on. An aligned policy is one that comparisons or scores have shaped.
Makes = Literal["policy", "aligned policy", "reward model", "evaluation", "shift report"]
POLICIES: tuple[Makes, ...] = ("policy", "aligned policy")
REWARD_MODELS: tuple[Makes, ...] = ("reward model",)
ZERO_2, ZERO_3 = "DeepSpeed ZeRO-2", "DeepSpeed ZeRO-3"


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
    references: tuple[Reference, ...] = ()
    has_reference: bool = False  # whether a reference policy keeps it near its parent
    length_option: str | None = None  # limits a row's tokens; None: rows are cut into pieces
    new_tokens: str | None = None  # limits the tokens of a completion that the stage samples
    trains_on: tuple[str, ...] = ()  # columns of token ids that are trained on where no mask says it
    trl_tokenises: bool = False  # TRL renders the prompts itself, in full and without tools
    autocast: bool = True  # computes under autocast where `bf16` or `fp16` is set
    sharded: tuple[str, ...] = ()  # the ways to split a model over processes that it runs under
    defaults: Mapping[str, Any] = field(default_factory=dict)  # laid under `training:`, above TRL's own
    refused: Mapping[str, str] = field(default_factory=dict)  # reason -> options of `training:` that it cannot take
    headline: tuple[str, ...] = ()  # the metrics that people read first
    watched: Mapping[str, tuple[str, int]] = field(default_factory=dict)  # see `rl/healthy_ranges.py`


_START_FROM_SFT = Reference(
    "init", POLICIES, "sft", missing="there is no sft stage to start from; add one, or say `init: base`"
)
_SAME_POLICIES = "policy and reference, and old and new policy, can be compared without it only"
_LENGTH = "completions/mean_length"
_PPO_LOGS = {
    "objective/kl": ("kl", 0),
    "objective/entropy": ("entropy", -1),
    "policy/clipfrac_avg": ("clip_fraction", 0),
    _LENGTH: ("length", 0),
    "completions/missing_eos": ("missing_eos", 0),
    "value/explained_variance": ("explained_variance", 0),
}
_RLOO_LOGS = {
    "kl": ("kl", 1),
    "entropy": ("entropy", 0),
    "clip_ratio/region_mean": ("clip_fraction", 0),
    _LENGTH: ("length", 0),
    "completions/clipped_ratio": ("missing_eos", 0),
    "frac_reward_zero_std": ("frac_reward_zero_std", 0),
}

STAGE_TYPES: Mapping[str, StageType] = {
    "pretrain": StageType(
        section=Offline,
        module="pretrain",
        rows="text",
        makes="policy",
        trl_config="trl:SFTConfig",
        references=(Reference("init", POLICIES, fallback=BASE),),
        sharded=(ZERO_2, ZERO_3),
        defaults={"packing": True, "packing_strategy": "wrapped"},
        headline=("first_loss", "loss", "eval_loss"),
    ),
    "sft": StageType(
        section=Offline,
        module="sft",
        rows="demonstrations",
        makes="policy",
        trl_config="trl:SFTConfig",
        references=(Reference("init", POLICIES, "pretrain", fallback=BASE),),
        length_option="training.max_length",
        sharded=(ZERO_2, ZERO_3),
        defaults={"completion_only_loss": True},  # TRL's default would train on prompts too when rows are token ids
        headline=("first_loss", "loss", "eval_loss", "mean_token_accuracy"),
    ),
    "reward": StageType(
        section=Offline,
        module="reward",
        rows="comparisons",
        makes="reward model",
        trl_config="trl:RewardConfig",
        references=(_START_FROM_SFT,),
        length_option="training.max_length",
        sharded=(ZERO_2,),
        headline=("loss", "accuracy", "eval_accuracy", "margin"),
    ),
    "ppo": StageType(
        section=Ppo,
        module="ppo",
        rows="prompts",
        makes="aligned policy",
        trl_config="trl.experimental.ppo:PPOConfig",
        references=(
            _START_FROM_SFT,
            Reference("reward", REWARD_MODELS, "reward", missing="ppo needs a reward: add a stage of type reward"),
        ),
        has_reference=True,
        length_option="max_prompt_length",
        new_tokens="training.response_length",
        autocast=False,
        sharded=(ZERO_2,),
        defaults={"num_sample_generations": 0, "missing_eos_penalty": 1.0},
        refused={
            "PPO computes in `model.dtype`: PPOTrainer samples outside autocast, its first ratio would not be 1": (
                "bf16 fp16"
            ),
            "PPO's length is `total_episodes`": "max_steps",
            "PPOTrainer clips no gradients; lower the learning rate instead": "max_grad_norm",
            "PPOTrainer cannot resume from a checkpoint; a stopped PPO stage starts anew": "save_strategy save_steps",
        },
        headline=("initial_kl", "kl", "first_score", "score"),
        watched=_PPO_LOGS,
    ),
    "rloo": StageType(
        section=Online,
        module="rloo_grpo",
        rows="prompts",
        makes="aligned policy",
        trl_config="trl:RLOOConfig",
        references=(
            _START_FROM_SFT,
            Reference(
                "reward",
                REWARD_MODELS,
                "reward",
                missing="rloo needs a reward: add a stage of type reward or `reward_functions`",
                unless="reward_functions",
            ),
        ),
        has_reference=True,
        length_option="max_prompt_length",
        new_tokens="training.max_completion_length",
        trl_tokenises=True,
        sharded=(ZERO_2,),
        # The watchdog sees what is logged. TRL's default would leave dropout on in the reference and in the old policy.
        defaults={"logging_steps": 1, "disable_dropout": True},
        refused={_SAME_POLICIES: "disable_dropout"},
        headline=("initial_kl", "kl", "first_reward", "reward"),
        watched=_RLOO_LOGS,
    ),
    "grpo": StageType(
        section=Online,
        module="rloo_grpo",
        rows="prompts",
        makes="aligned policy",
        trl_config="trl:GRPOConfig",
        references=(
            _START_FROM_SFT,
            Reference(
                "reward",
                REWARD_MODELS,
                "reward",
                missing="grpo needs a reward: add a stage of type reward or `reward_functions`",
                unless="reward_functions",
            ),
        ),
        has_reference=True,
        length_option="max_prompt_length",
        new_tokens="training.max_completion_length",
        trl_tokenises=True,
        sharded=(ZERO_2,),
        defaults={"logging_steps": 1, "disable_dropout": True},
        refused={
            _SAME_POLICIES: "disable_dropout",
            "log-probabilities are computed in float32 already": "cast_lm_head_to_fp32",
        },
        headline=("initial_kl", "kl", "first_reward", "reward"),
        watched=_RLOO_LOGS | {"clip_ratio": ("clip_fraction", 0)},  # its name with Liger kernels
    ),
    "dpo": StageType(
        section=Offline,
        module="dpo",
        rows="comparisons",
        makes="aligned policy",
        trl_config="trl:DPOConfig",
        references=(_START_FROM_SFT,),
        has_reference=True,
        length_option="training.max_length",
        trains_on=("chosen_ids", "rejected_ids"),
        refused={_SAME_POLICIES: "disable_dropout"},
        headline=("initial_loss", "loss", "rewards/accuracies", "rewards/margins"),
    ),
    "evaluate": StageType(
        section=Evaluate,
        module="evaluate",
        rows="prompts",
        makes="evaluation",
        references=(
            Reference(
                "baseline", POLICIES, "sft", missing="there is no sft stage to compare with; name the `baseline`"
            ),
            Reference("reward", REWARD_MODELS, "reward"),
        ),
        length_option="max_prompt_length",
        new_tokens="max_new_tokens",
        sharded=(ZERO_2,),
    ),
    "shift": StageType(
        section=Shift,
        module="shift",
        rows="prompts",
        makes="shift report",
        references=(
            Reference(
                "reward",
                REWARD_MODELS,
                "reward",
                missing="there is no reward model to measure: add a stage of type reward",
            ),
        ),
        length_option="max_prompt_length",
        new_tokens="max_new_tokens",
        sharded=(ZERO_2,),
    ),
}


def type_of(stage: Stage) -> StageType:
    """Return the row of a stage's type."""
    return STAGE_TYPES[stage.type]


def makes(stage: Stage, *kinds: Makes) -> bool:
    """Tell whether a stage hands on one of these."""
    return type_of(stage).makes in kinds


def stages_that_make(config: RunConfig, *kinds: Makes) -> Iterator[str]:
    """Return the names of the stages that hand on one of these, in order."""
    return (name for name, stage in config.stages.items() if makes(stage, *kinds))


def config_class(stage_type: str) -> type[Any]:
    """Return the TRL config class that a stage's `training:` section is passed to; the import takes seconds."""
    name = STAGE_TYPES[stage_type].trl_config
    assert name is not None, f"{stage_type} trains nothing"
    return pkgutil.resolve_name(name)
