"""Say of each stage type all that the rest of the package must know: one row for each type, data only.

Nothing else compares the names of types. A new type is a row here, a file in `stages/`, and, if it reads a kind of row
that no other type reads, a class in `data/rows.py`.
"""

import dataclasses
import functools
import pkgutil
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config import logged_figures
from pipeline.config.batch_sizes import fault_of_ppo
from pipeline.config.grpo_options import NOT_OF_GROUPS, NOT_OF_PPO
from pipeline.config.logged_figures import LENGTH
from pipeline.config.ranges import NOT_NEGATIVE, POSITIVE
from pipeline.config.schema import BASE, Evaluate, Offline, Online, Ppo, RunConfig, Shift, Stage, Taken
from pipeline.config.type_row import POLICIES, REWARD_MODELS, ZERO_2, ZERO_3, Makes, Reference, StageType

if TYPE_CHECKING:
    from trl.trainer.kto_config import KTOConfig  # the import takes seconds

_START_FROM_SFT = Reference(
    "init", POLICIES, "sft", missing="there is no sft stage to start from; add one, or say `init: base`"
)
_SAME_POLICIES = "policy and reference, and old and new policy, can be compared without it only"
_SFT_WORDS = {"packing_strategy": "bfd bfd_split wrapped", "loss_type": "nll dft chunked_nll"}
_PPO_LOGS = {
    "objective/kl": ("kl", 0),
    "objective/entropy": ("entropy", -1),
    "policy/clipfrac_avg": ("clip_fraction", 0),
    LENGTH: ("length", 0),
    "completions/missing_eos": ("missing_eos", 0),
    "value/explained_variance": ("explained_variance", 0),
}
_RLOO_LOGS = {
    "kl": ("kl", 1),
    "entropy": ("entropy", 0),
    "clip_ratio/region_mean": ("clip_fraction", 0),
    LENGTH: ("length", 0),
    "completions/clipped_ratio": ("missing_eos", 0),
    "frac_reward_zero_std": ("frac_reward_zero_std", 0),
}

# Types that compare the completions of a prompt with one another.
_GROUPS = functools.partial(
    StageType,
    section=Online,
    module="rloo_grpo",
    rows="prompts",
    makes="aligned policy",
    has_reference=True,
    length_option="max_prompt_length",
    new_tokens="training.max_completion_length",
    trl_tokenises=True,
    sharded=(ZERO_2,),
    # The watchdog sees what is logged. TRL's default would leave dropout on in the reference and in the old policy.
    defaults={"logging_steps": 1, "disable_dropout": True},
    bounds={"beta": NOT_NEGATIVE},
    headline=("initial_kl", "kl", "first_reward", "reward"),
    shown=logged_figures.OF_GROUPS,
)


def _scored_by_a_model_or_functions(stage_type: str) -> Reference:
    """Make the field of a stage that names its reward model; functions of the user make it needless."""
    missing = f"{stage_type} needs a reward: add a stage of type reward or `reward_functions`"
    return Reference("reward", REWARD_MODELS, "reward", missing=missing, unless="reward_functions")


def _fault_of_kto(args: "KTOConfig") -> str | None:
    """Say what is wrong with the batch or the weights of a KTO stage, or return None."""
    if args.loss_type == "kto" and args.per_device_train_batch_size < 2:
        return "per_device_train_batch_size must be at least 2: the KL is estimated from the other rows of a batch"
    if not args.desirable_weight and not args.undesirable_weight:
        return "desirable_weight and undesirable_weight are both 0: nothing would be learned"
    return None


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
        words=_SFT_WORDS,
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
        words=_SFT_WORDS,
        headline=("first_loss", "loss", "eval_loss", "mean_token_accuracy"),
    ),
    "reward": StageType(
        section=Offline,
        module="reward",
        rows="comparisons",
        makes="reward model",
        trl_config="trl:RewardConfig",
        references=(dataclasses.replace(_START_FROM_SFT, makes=(*POLICIES, *REWARD_MODELS)),),
        length_option="training.max_length",
        sharded=(ZERO_2,),
        headline=("loss", "accuracy", "eval_accuracy", "margin"),
        shown=logged_figures.OF_REWARD,
    ),
    "ppo": StageType(
        section=Ppo,
        module="ppo",
        rows="prompts",
        makes="aligned policy",
        trl_config="trl.experimental.ppo:PPOConfig",
        last_trl="1.12",
        instead="say `trainer: grpo` in this stage, which trains the policy with GRPOTrainer",
        references=(
            _START_FROM_SFT,
            Reference("reward", REWARD_MODELS, "reward", missing="ppo needs a reward: add a stage of type reward"),
        ),
        has_reference=True,
        length_option="max_prompt_length",
        new_tokens="training.response_length",
        autocast=False,
        sharded=(ZERO_2,),
        # An update is long, so that checkpoints come more often than TRL's are made.
        defaults={"num_sample_generations": 0, "missing_eos_penalty": 1.0, "save_steps": 20},
        words={"save_strategy": "steps no"},  # an update is a step, and there are no epochs
        refused={
            "PPO computes in `model.dtype`: PPOTrainer samples outside autocast, its first ratio would not be 1": (
                "bf16 fp16"
            ),
            "PPO's length is `total_episodes`": "max_steps",
            "PPOTrainer does not look at it": "neftune_noise_alpha label_smoothing_factor train_sampling_strategy",
        },
        check_options=fault_of_ppo,
        headline=("initial_kl", "kl", "first_score", "score"),
        watched=_PPO_LOGS,
        shown=logged_figures.OF_PPO,
    ),
    "rloo": _GROUPS(
        trl_config="trl:RLOOConfig",
        references=(_START_FROM_SFT, _scored_by_a_model_or_functions("rloo")),
        refused={_SAME_POLICIES: "disable_dropout"} | NOT_OF_GROUPS,
        watched=_RLOO_LOGS,
    ),
    "grpo": _GROUPS(
        trl_config="trl:GRPOConfig",
        references=(_START_FROM_SFT, _scored_by_a_model_or_functions("grpo")),
        refused={
            _SAME_POLICIES: "disable_dropout",
            "log-probabilities are computed in float32 already": "cast_lm_head_to_fp32",
        }
        | NOT_OF_GROUPS,
        words={
            "loss_type": "grpo bnpo dr_grpo dapo cispo sapo luspo vespo",
            "scale_rewards": "group batch none",
            "importance_sampling_level": "token sequence",
            "multi_objective_aggregation": "sum_then_normalize normalize_then_sum",
            "vllm_importance_sampling_mode": "token_truncate token_mask sequence_truncate sequence_mask",
        },
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
        words={
            "loss_type": (
                "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
                "discopop sft sigmoid_norm"
            ),
            "f_divergence_type": "reverse_kl forward_kl js_divergence alpha_divergence",
        },
        bounds={"beta": POSITIVE},
        headline=("initial_loss", "loss", "rewards/accuracies", "rewards/margins"),
        shown=logged_figures.OF_DPO,
    ),
    "kto": StageType(
        section=Offline,
        module="kto",
        rows="unpaired",
        makes="aligned policy",
        trl_config="trl:KTOConfig",
        references=(_START_FROM_SFT,),
        has_reference=True,
        length_option="training.max_length",
        trains_on=("completion_ids",),
        fewest_rows=2,  # the KL is estimated from the other rows
        refused={
            _SAME_POLICIES: "disable_dropout",
            "KTO compares rows with those before them in their batch, so their order is fixed; it is drawn by `seed`": (
                "train_sampling_strategy"
            ),
        },
        words={"loss_type": "kto apo_zero_unpaired"},
        bounds={"beta": POSITIVE, "desirable_weight": NOT_NEGATIVE, "undesirable_weight": NOT_NEGATIVE},
        check_options=_fault_of_kto,
        headline=("initial_loss", "loss", "kl", "rewards/margins"),
        shown=logged_figures.OF_KTO,
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

# Types whose rows depend on their `trainer`, by the name that `variant_of` gives them.
VARIANTS: Mapping[str, StageType] = {
    "ppo on grpo": dataclasses.replace(
        STAGE_TYPES["ppo"],
        module="ppo_on_grpo",
        trl_config="pipeline.config.critic_config:CriticConfig",
        last_trl=None,
        autocast=True,
        sharded=(),
        defaults={"missing_eos_penalty": 1.0, "save_steps": 20},
        refused=NOT_OF_PPO | {_SAME_POLICIES: "disable_dropout"},
        check_options=None,
    ),
}
KINDS: Mapping[str, StageType] = {**STAGE_TYPES, **VARIANTS}


def row_of(kind: str) -> StageType:
    """Return the row of a type, or of a variant of a type."""
    return STAGE_TYPES[kind] if kind in STAGE_TYPES else VARIANTS[kind]


def type_of(stage: Stage) -> StageType:
    """Return the row of a stage: its type's, or that of the variant which its `trainer` asks for.

    A stage that is taken from another run hands on what its type does, and trains nothing.
    """
    row = row_of(stage.kind)
    if not isinstance(stage, Taken):
        return row
    return StageType(section=Taken, module="taken", rows=row.rows, makes=row.makes, sharded=(ZERO_2, ZERO_3))


def makes(stage: Stage, *kinds: Makes) -> bool:
    """Tell whether a stage hands on one of these."""
    return type_of(stage).makes in kinds


def stages_that_make(config: RunConfig, *kinds: Makes) -> Iterator[str]:
    """Return the names of the stages that hand on one of these, in order."""
    return (name for name, stage in config.stages.items() if makes(stage, *kinds))


def config_class(kind: str) -> type[Any]:
    """Return the TRL config class that a stage's `training:` section is passed to; the import takes seconds."""
    name = row_of(kind).trl_config
    assert name is not None, f"{kind} trains nothing"
    return pkgutil.resolve_name(name)
