"""Say which numbers make sense for an option of TRL, PEFT and transformers; the one place that says so.

Their classes give a field a type and no range, so that a negative learning rate is found by the optimizer, hours later.
A test asserts that every field with a number is named here.
"""

import math
from dataclasses import dataclass

LARGEST = 2**63 - 1  # an integer of 64 bits; beyond it libraries overflow


@dataclass(frozen=True)
class Range:
    """The numbers between `low` and `high`, which belong to it unless they are `above` or `below`.

    `also` are numbers outside of it that have a meaning of their own. `steps` are counted: a whole number from 1, or
    a share of all steps between 0 and 1.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    also: tuple[int, ...] = ()
    steps: bool = False

    def holds(self, value: float) -> bool:
        """Tell whether this is one of its numbers."""
        if value in self.also:
            return True
        if self.steps:
            return 0 < value < 1 or (value >= 1 and value == int(value))
        if self.low is not None and (value <= self.low if self.above else value < self.low):
            return False
        return self.high is None or (value < self.high if self.below else value <= self.high)

    def __str__(self) -> str:
        if self.steps:
            return "a whole number from 1, or a share of all steps between 0 and 1"
        words = [f"{number} or" for number in self.also]
        if self.low is not None:
            words.append(f"above {self.low:g}" if self.above else f"at least {self.low:g}")
        if self.high is not None:
            words += ["and"] if self.low is not None else []
            words.append(f"below {self.high:g}" if self.below else f"at most {self.high:g}")
        return " ".join(words)


_COUNT = Range(low=1)
NOT_NEGATIVE = Range(low=0)
POSITIVE = Range(low=0, above=True)
_SHARE = Range(low=0, high=1)
_BELOW_ONE = Range(low=0, high=1, below=True)
_PORT = Range(low=1, high=65535)
# A bound that goes for one stage type only stands in the row of the type (`stage_types`).
_OPTIONS = {
    _COUNT: (
        # transformers
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps eval_accumulation_steps "
        "save_total_limit torch_empty_cache_steps dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout "
        # TRL
        "max_length pad_to_multiple_of dataset_num_proc precompute_ref_batch_size ref_model_sync_steps "
        "num_mini_batches num_ppo_epochs local_rollout_forward_batch_size response_length total_episodes "
        "max_completion_length num_iterations steps_per_generation generation_batch_size num_generations_eval "
        "vllm_max_model_length vllm_tensor_parallel_size "
        # PEFT
        "r lora_alpha rank_pattern"
    ),
    Range(low=2): "num_generations",
    Range(low=1, also=(-1,)): "max_steps",
    Range(steps=True): "logging_steps save_steps eval_steps",
    POSITIVE: (
        "learning_rate num_train_epochs adam_epsilon "
        "temperature repetition_penalty cliprange cliprange_value discopop_tau delta "
        "sapo_temperature_neg sapo_temperature_pos off_policy_mask_threshold vllm_importance_sampling_cap "
        "vllm_importance_sampling_clip_max vllm_server_timeout alpha_pattern"
    ),
    NOT_NEGATIVE: (
        "weight_decay max_grad_norm warmup_steps eval_delay neftune_noise_alpha dataloader_num_workers "
        "kl_coef vf_coef missing_eos_penalty num_sample_generations epsilon epsilon_high top_k "
        "center_rewards_coefficient router_aux_loss_coef entropy_target entropy_coef_delta "
        "vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos vllm_importance_sampling_clip_min "
        "num_completions_to_print max_tool_calling_iterations layers_to_transform llm_int8_threshold"
    ),
    _SHARE: "gamma lam min_p ld_alpha top_entropy_quantile ref_model_mixup_alpha",
    _BELOW_ONE: "adam_beta1 adam_beta2 label_smoothing_factor lora_dropout",
    Range(low=0, high=1, above=True): "top_p vllm_gpu_memory_utilization",
    Range(low=0, high=0.5, below=True): "label_smoothing",
    Range(low=-1): "local_rank",
    _PORT: "vllm_server_port vllm_group_port",
}
RANGES = {option: rule for rule, options in _OPTIONS.items() for option in options.split()}
# Numbers of either sign have a meaning here.
ANY = {
    "reward_clip_range",
    "reward_weights",
    "loss_weights",
    "f_alpha_divergence_coef",
    "entropy_coef",
    "entropy_coef_min",
    "entropy_coef_max",
}


def fault_of(value: object, rule: Range | None) -> str | None:
    """Say why an option's number, or one of its numbers, makes no sense, or return None; `rule` is its range."""
    for number in numbers_in(value):
        if fault := not_usable(number):
            return fault
        if rule is not None and not rule.holds(number):
            return f"must be {rule}, got {number}"
    return None


def numbers_in(value: object) -> list[float]:
    """Return the numbers of a value: itself, or those of a list or mapping at any depth. Truth values do not count."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


def not_usable(number: float) -> str | None:
    """Say why no option can use a number, or return None."""
    if isinstance(number, float) and not math.isfinite(number):
        return f"must be a finite number, got {number}"
    if isinstance(number, int) and abs(number) > LARGEST:
        return f"must be a number of at most 19 digits, got one of {len(str(abs(number)))}"
    return None
