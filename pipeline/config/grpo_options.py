"""Say which options of GRPOTrainer the pipeline cannot take, and why: reason -> options."""

NOT_OF_GROUPS = {  # nor of RLOOTrainer
    "TRL turns all weights to bf16 for it, also those that train, and leaves them so": (
        "use_transformers_continuous_batching use_transformers_paged transformers_continuous_batching_config"
    ),
}
# What PPO on GRPOTrainer has no use for, or has under another name.
NOT_OF_PPO = {
    "PPO's length is `total_episodes`": "max_steps",
    "it has another name in PPO: `response_length`, `num_ppo_epochs`, `cliprange`, `kl_coef`, `baseline_completions`": (
        "max_completion_length num_iterations epsilon epsilon_high beta num_generations num_generations_eval"
    ),
    "a rollout's size is per_device_train_batch_size * gradient_accumulation_steps": (
        "generation_batch_size steps_per_generation auto_find_batch_size"
    ),
    "the loss is PPO's, with advantages of a value model": (
        "label_smoothing_factor loss_type scale_rewards reward_weights multi_objective_aggregation "
        "importance_sampling_level delta mask_truncated_completions top_entropy_quantile "
        "off_policy_mask_threshold use_bias_correction_kl "
        "entropy_coef entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target use_adaptive_entropy "
        "router_aux_loss_coef sapo_temperature_neg sapo_temperature_pos "
        "vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos"
    ),
    "completions are drawn from the policy's full distribution, as PPOTrainer draws them": (
        "top_p top_k min_p repetition_penalty generation_kwargs cache_implementation"
    ),
    "transformers samples, from one adapter of several on a backbone": (
        "use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex "
        "vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port "
        "vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size "
        "vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_cap "
        "vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min use_transformers_paged "
        "use_transformers_continuous_batching transformers_continuous_batching_config ds3_gather_for_generation"
    ),
    "the pipeline renders prompts and draws their order": (
        "chat_template_kwargs shuffle_dataset train_sampling_strategy pad_to_multiple_of max_tool_calling_iterations"
    ),
    "noise in the embeddings would also be in what is sampled": "neftune_noise_alpha",
    "an evaluate stage shows completions": (
        "log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo"
    ),
    "`eval_data` is scored every `eval_every` updates": "eval_strategy eval_on_start",
    "log-probabilities are computed in float32 already": "cast_lm_head_to_fp32",
    "every weight that trains takes part in every loss": "ddp_find_unused_parameters",
    "the reference of a stage is its parent": "ref_model_mixup_alpha ref_model_sync_steps",
}
