"""Bad options of TRL, PEFT and transformers, and bad architectures of new models."""

import re
from typing import Any

from forked import SCRATCH, Case

NAN, INF = float("nan"), float("inf")
SHARED = ("sft", "reward", "dpo", "ppo", "rloo", "grpo")  # in turn, so that every type is met
# option, bad values: of every type of stage
EVERYWHERE: list[tuple[str, list[Any]]] = [
    ("learning_rate", [0, -1e-4, NAN, INF, "fast", True, None, [1e-4], "1e-4x"]),
    ("per_device_train_batch_size", [0, -4, 1.5, "four", True, None, 10**40]),
    ("per_device_eval_batch_size", [0, -1, NAN]),
    ("gradient_accumulation_steps", [0, -1, 2.5, "two"]),
    ("num_train_epochs", [0, -1, NAN, INF, "one", True]),
    ("weight_decay", [-0.1, NAN, "none"]),
    ("adam_beta1", [-0.1, 1, 1.5, NAN]),
    ("adam_beta2", [-0.1, 1, NAN]),
    ("adam_epsilon", [0, -1e-8, NAN]),
    ("warmup_steps", [-1, NAN, INF, "some"]),
    ("logging_steps", [0, -1, 1.5, NAN, INF, "often"]),
    ("eval_steps", [0, -5, NAN]),
    ("eval_delay", [-1, NAN]),
    ("save_total_limit", [0, -1, 1.5, "all"]),
    ("dataloader_num_workers", [-1, 0.5, "many"]),
    ("dataloader_prefetch_factor", [0, -1]),
    ("torch_empty_cache_steps", [0, -1]),
    ("eval_accumulation_steps", [0, -1]),
    ("ddp_timeout", [0, -1]),
    ("lr_scheduler_type", ["cosin", 5, True]),
    ("optim", ["adamww", 5]),
    ("logging_strategy", ["often", 5]),
    ("eval_strategy", ["sometimes"]),
    ("gradient_checkpointing", ["perhaps", 5, None]),
    ("report_to", [5, "nothing-of-this-name"]),
    ("lr_scheduler_kwargs", ["fast", [1], {"num_cycles": NAN}]),
]
# type, option, bad values
OF_TYPES: list[tuple[str, str, list[Any]]] = [
    ("sft", "max_grad_norm", [-1, NAN, INF]),
    ("sft", "max_steps", [0, -2, 1.5, "many", NAN]),
    ("sft", "save_steps", [0, -1, 2.5, INF, NAN]),
    ("sft", "save_strategy", ["sometimes"]),
    ("sft", "neftune_noise_alpha", [-1, NAN]),
    ("reward", "label_smoothing_factor", [-0.1, 1, NAN]),
    ("sft", "max_length", [0, -1, 1.5, "long", NAN, True]),
    ("sft", "pad_to_multiple_of", [0, -8]),
    ("sft", "dataset_num_proc", [0, -1]),
    ("sft", "packing", ["perhaps", 5]),
    ("sft", "packing_strategy", ["squeezed"]),
    ("sft", "loss_type", ["nll2"]),
    ("sft", "router_aux_loss_coef", [-1, NAN]),
    ("reward", "max_length", [0, -1, "long"]),
    ("reward", "center_rewards_coefficient", [-0.1, NAN, INF, "some"]),
    ("dpo", "beta", [0, -1, NAN, INF, "small", None]),
    ("dpo", "label_smoothing", [-0.1, 0.5, 1, NAN]),
    ("dpo", "loss_type", ["sigmod", 5, ["sigmoid", "hinge2"]]),
    ("dpo", "loss_weights", [[NAN], "one", [1.0, "x"]]),
    ("dpo", "ld_alpha", [-0.1, 1.1, NAN]),
    ("dpo", "discopop_tau", [0, -1]),
    ("dpo", "f_divergence_type", ["js"]),
    ("dpo", "precompute_ref_batch_size", [0]),
    ("dpo", "max_length", [0, -5]),
    ("ppo", "total_episodes", [0, -1, 1.5, NAN, "all"]),
    ("ppo", "num_ppo_epochs", [0, -1]),
    ("ppo", "num_mini_batches", [0, -1, 1.5]),
    ("ppo", "response_length", [0, -1, 1.5, "long"]),
    ("ppo", "temperature", [0, -1, NAN, INF]),
    ("ppo", "kl_coef", [-0.1, NAN, INF]),
    ("ppo", "kl_estimator", ["k7"]),
    ("ppo", "cliprange", [0, -0.2, NAN]),
    ("ppo", "cliprange_value", [0, -0.2]),
    ("ppo", "vf_coef", [-0.1, NAN]),
    ("ppo", "gamma", [-0.1, 1.1, NAN]),
    ("ppo", "lam", [-0.1, 1.1, NAN]),
    ("ppo", "local_rollout_forward_batch_size", [0, -1]),
    ("ppo", "missing_eos_penalty", [-1.0, NAN, INF]),
    ("ppo", "num_sample_generations", [-1, 0.5]),
    ("ppo", "whiten_rewards", ["perhaps"]),
    ("rloo", "beta", [-0.1, NAN, INF]),
    ("rloo", "num_generations", [0, 1, -2, 2.5, "two"]),
    ("rloo", "reward_clip_range", [[NAN, 1.0], [1.0], "wide", 5]),
    ("rloo", "epsilon", [-0.1, NAN]),
    ("rloo", "num_iterations", [0]),
    ("grpo", "beta", [-0.1, NAN]),
    ("grpo", "num_generations", [0, 1, -1]),
    ("grpo", "num_generations_eval", [0]),
    ("grpo", "max_completion_length", [0, -1, None, 1.5]),
    ("grpo", "temperature", [0, -0.5, NAN]),
    ("grpo", "top_p", [0, -0.1, 1.1, NAN]),
    ("grpo", "top_k", [-1, 1.5, None]),
    ("grpo", "min_p", [-0.1, 1.1]),
    ("grpo", "repetition_penalty", [0, -1, NAN]),
    ("grpo", "epsilon", [-0.1, NAN, INF]),
    ("grpo", "epsilon_high", [-0.1, NAN]),
    ("grpo", "delta", [0, -1]),
    ("grpo", "loss_type", ["grpo2"]),
    ("grpo", "scale_rewards", ["somehow"]),
    ("grpo", "top_entropy_quantile", [-0.1, 1.1]),
    ("grpo", "steps_per_generation", [0, -1]),
    ("grpo", "generation_batch_size", [0, -2, 3]),
    ("grpo", "reward_weights", [[NAN], [INF], "one"]),
    ("grpo", "entropy_target", [-1]),
    ("grpo", "off_policy_mask_threshold", [0]),
    ("grpo", "vllm_gpu_memory_utilization", [0, 1.5, NAN]),
    ("grpo", "vllm_server_port", [0, 70000]),
    ("grpo", "vllm_tensor_parallel_size", [0]),
    ("grpo", "generation_kwargs", ["greedy", {"penalty_alpha": NAN}]),
]
LORA: list[tuple[str, list[Any]]] = [
    ("r", [0, -4, 1.5, "four", True, None, 10**40]),
    ("lora_alpha", [0, -8, NAN, "eight", None]),
    ("lora_dropout", [-0.5, 1, 1.5, NAN, "some"]),
    ("target_modules", [5, "(", [5]]),
    ("rank_pattern", ["all", {"q_proj": 0}, {"q_proj": NAN}]),
    ("alpha_pattern", ["all", {"q_proj": 0}]),
    ("init_lora_weights", ["pissa", "eva", False, 5]),
    ("use_dora", ["perhaps", 5]),
    ("use_rslora", [None]),
    ("layers_to_transform", [-1, [0, -2], "first"]),
    ("exclude_modules", [5]),
    ("fan_in_fan_out", ["perhaps"]),
]
QUANTIZATION: list[tuple[str, list[Any]]] = [
    ("load_in_4bit", ["perhaps", 5, None]),
    ("load_in_8bit", ["perhaps"]),
    ("bnb_4bit_quant_type", ["nf5", 5]),
    ("bnb_4bit_compute_dtype", ["float99", [1]]),
    ("llm_int8_threshold", [-1, NAN, "high"]),
]
ARCHITECTURE: list[tuple[str, list[Any]]] = [
    ("model_type", [None, 5, True, [1], {"a": 1}, "", "lama", "x" * 10_000]),
    ("hidden_size", ["text", -1, 0, None, True, 1.5, NAN, [32], 10**40, 10**9]),
    ("intermediate_size", ["text", -1, 0, None, 10**40]),
    ("num_hidden_layers", ["two", -1, 0, None, True, 10**40, 10**6, 2.0]),
    ("num_attention_heads", ["four", -1, 0, None, 10**40]),
    ("num_key_value_heads", ["four", -1, 0, 3]),
    ("vocab_size", ["large", -1, 0, None, 10**40, NAN]),
    ("max_position_embeddings", ["long", -1, 0, None, INF]),
    ("rms_norm_eps", [-1.0, "small", NAN, None]),
    ("initializer_range", [-1.0, "small", INF]),
    ("attention_dropout", [-0.5, 1.5, "some"]),
    ("hidden_act", ["nope", 5, None]),
    ("rope_parameters", [5, "linear", {"rope_type": "nope"}]),
    ("tie_word_embeddings", ["yes", 5, None]),
    ("attention_bias", ["yes", None]),
    ("id2label", [5, "x"]),
    ("dtype", ["float99"]),
    ("head_dim", [0, -1, "x", 10**40]),
]
SEEN = {"True": "True", "None": "None|null", "10000000000000000000000000000000000000000": "41|digits"}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 30 else f"{text[:8]}... ({len(text)})"


def _words(key: str, value: Any) -> tuple[str, ...]:
    """The option's full name, and what was seen of it."""
    if isinstance(value, float) and value != value:
        return re.escape(key), "nan"
    if isinstance(value, (list, dict)) or (isinstance(value, str) and len(value) > 50):
        return (re.escape(key),)
    return re.escape(key), SEEN.get(repr(value), re.escape(str(value)))


def cases() -> list[Case]:
    """All cases of this file."""
    found = []
    number = 0
    for option, values in EVERYWHERE:
        for value in values:
            stage = SHARED[number % len(SHARED)]
            number += 1
            key = f"stages.{stage}.training.{option}"
            words = (re.escape(f"stages.{stage}.training"), *_words(option, value))
            found.append(
                Case("training", f"{stage}.{option}={_short(value)}", words, changes={key: value}, stages=(stage,))
            )
    for stage, option, values in OF_TYPES:
        for value in values:
            key = f"stages.{stage}.training.{option}"
            words = (re.escape(f"stages.{stage}.training"), *_words(option, value))
            found.append(
                Case(f"training of {stage}", f"{option}={_short(value)}", words, changes={key: value}, stages=(stage,))
            )
    for option, values in LORA:
        for value in values:
            words = ("lora", *_words(option, value))
            found.append(Case("lora", f"{option}={_short(value)}", words, changes={f"lora.{option}": value}))
    for option, values in QUANTIZATION:
        for value in values:
            changes = {"quantization": {"load_in_4bit": True} | {option: value}}
            found.append(
                Case(
                    "quantization",
                    f"{option}={_short(value)}",
                    ("quantization", *_words(option, value)),
                    changes=changes,
                )
            )
    for field, values in ARCHITECTURE:
        for value in values:
            words = (r"model\.scratch\.architecture", *_words(field, value))
            architecture = SCRATCH["architecture"] | {field: value}
            changes = {"model.scratch.architecture": architecture}
            found.append(Case("architecture", f"{field}={_short(value)}", words, changes=changes, base="scratch"))
    return found + _others()


def _others() -> list[Case]:
    """Architectures and options that are wrong together."""
    gpt2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}
    together = [
        ("no model_type", {"hidden_size": 32}, ("model_type", "required")),
        ("empty", {}, ("model_type", "required")),
        ("gpt2 with llama's field", gpt2 | {"num_key_value_heads": 4}, ("num_key_value_heads", "unknown field")),
        ("gpt2 whose heads do not fit", gpt2 | {"n_head": 3}, ("architecture", "n_head|num_heads|divisible")),
        ("gpt2 of 10**40 layers", gpt2 | {"n_layer": 10**40}, ("n_layer", "41|digits")),
        ("gpt2 of 10**6 layers", gpt2 | {"n_layer": 10**6}, ("n_layer", "at most 1,000")),
        ("layers times experts", {"model_type": "mixtral", "num_hidden_layers": 1000, "num_local_experts": 1000},
         ("experts", "at most 20,000")),
        ("an encoder", {"model_type": "bert", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
         ("architecture", "bert", "is_decoder")),
        ("typo of a field", {"model_type": "llama", "hiden_size": 32}, ("hiden_size", "did you mean 'hidden_size'")),
        ("heads that do not fit", SCRATCH["architecture"] | {"num_attention_heads": 3}, ("heads",)),
        ("a size that does not fit", SCRATCH["architecture"] | {"hidden_size": 30}, ("hidden size",)),
        ("a vision model", {"model_type": "vit"}, ("architecture", "vit|causal")),
    ]  # fmt: skip
    found = []
    for name, fields, words in together:
        changes = {"model.scratch.architecture": fields}
        found.append(Case("architecture", name, words, changes=changes, base="scratch"))
    tokenizer = [
        ("vocab_size", 0, ("vocab_size", "0")),
        ("vocab_size", -5, ("vocab_size", "-5")),
        ("vocab_size", 1.5, ("vocab_size", "1.5")),
        ("vocab_size", 10**12, ("vocab_size", "1000000000000")),
        ("vocab_size", NAN, ("vocab_size", "nan")),
        ("data", [], (r"tokenizer\.data", "at least 1")),
        ("data", ["nowhere"], (r"tokenizer\.data", "no dataset 'nowhere'")),
        ("data", "corpus", (r"tokenizer\.data", "list")),
        ("data", [""], (r"tokenizer\.data", "empty")),
        ("kind", "bpe", (r"tokenizer\.kind", "unknown key")),
    ]
    for key, value, words in tokenizer:
        changes = {f"model.scratch.tokenizer.{key}": value}
        found.append(Case("scratch tokenizer", f"{key}={_short(value)}", words, changes=changes, base="scratch"))
    owned = [
        ("bias", "all"),
        ("bias", "some"),
        ("modules_to_save", ["lm_head"]),
        ("task_type", "CAUSAL_LM"),
        ("peft_type", "IA3"),
    ]
    for option, value in owned:
        words = (rf"lora\.{option}", "is set by the pipeline")
        found.append(Case("lora", f"{option}={_short(value)}", words, changes={f"lora.{option}": value}))
    words = ("lora", "target.modules", "nothing_here")
    found.append(Case("lora", "no such modules", words, changes={"lora.target_modules": ["nothing_here"]}))
    changes = {"lora": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [99]}}
    found.append(Case("lora", "no such layer", ("lora", "target.modules|layer"), changes=changes))
    owned = [("ppo", "max_steps", 5), ("ppo", "bf16", True), ("sft", "output_dir", "x")]
    owned += [
        ("sft", "seed", 5),
        ("dpo", "push_to_hub", True),
        ("rloo", "disable_dropout", False),
        ("reward", "fsdp", "full_shard"),
    ]
    owned += [
        ("grpo", "cast_lm_head_to_fp32", True),
        ("sft", "resume_from_checkpoint", True),
        ("dpo", "do_train", True),
    ]
    for stage, option, value in owned:
        key = f"stages.{stage}.training.{option}"
        words = (re.escape(key), "is set by the pipeline")
        found.append(Case("owned", f"{stage}.{option}", words, changes={key: value}, stages=(stage,)))
    sizes = [
        ("batch that mini-batches do not divide", {"num_mini_batches": 3}, "multiple of num_mini_batches"),
        ("whitening of small mini-batches", {"whiten_rewards": True}, "mini-batches of at least 8"),
    ]
    for name, options, word in sizes:
        changes = {f"stages.ppo.training.{key}": value for key, value in options.items()}
        found.append(Case("sizes", name, (r"stages\.ppo\.training", word), changes=changes, stages=("ppo",)))
    changes = {"stages.grpo.training.num_generations": 3}
    found.append(
        Case("sizes", "batch that groups do not divide", ("num_generations",), changes=changes, stages=("grpo",))
    )
    return found
