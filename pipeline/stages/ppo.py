"""Step 3: PPO against the run's reward model, with KL to the parent policy.

With adapters on one base the four models are views of one backbone; otherwise they are separate models. PPOTrainer's
loop is TRL's, unmodified: the reward model it is given subtracts the baseline, and a subclass adds figures to its log.
"""

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import nn

from pipeline.config.lineage import shares_backbone
from pipeline.launch import sharding
from pipeline.models.generation import Ids, Sampling
from pipeline.models.loading import (
    Loader,
    ScoreHead,
    Weights,
    continue_policy,
    float32_logits,
    load_policy,
    load_reward,
    num_parameters,
)
from pipeline.models.views import POLICY, REFERENCE, REWARD, VALUE, Backbone, ReferenceView, ScoreView
from pipeline.rl import stress
from pipeline.rl.baselines import (
    Baseline,
    CentredReward,
    LeaveOneOut,
    Offline,
    Prompt,
    Watched,
    answers_of,
    offline_scores,
    reliability,
)
from pipeline.rl.watch import Watch
from pipeline.rl.watchdog import Stopped
from pipeline.system.errors import UserError
from pipeline.training import assertions
from pipeline.training.context import Result, StageContext, write_json
from pipeline.training.fit import first_and_last, save_adapter, should_train
from pipeline.training.trainers import ppo_trainer_class

METRICS = {"objective/kl": "kl", "objective/raw_scores": "score", "objective/centred_scores": "centred_score"}
METRICS |= {"objective/rlhf_reward": "reward", "value/explained_variance": "explained_variance"}
METRICS |= {"loss/value_avg": "value_loss", "policy/clipfrac_avg": "clip_fraction", "objective/entropy": "entropy"}


NUM_COMPARED = 4  # prompts on which the policy is compared with its parent and with the reference


@dataclass(frozen=True)
class Models:
    """PPO's four models, in the form PPOTrainer takes them."""

    policy: Any
    reference: nn.Module
    reward: nn.Module
    value: nn.Module


def shared_models(policy: PeftModel, reward: Weights) -> Models:
    """The four models as views of one backbone, the policy's; the value model starts from the reward model."""
    _add_copy(policy, POLICY, REFERENCE)
    saved = load_peft_weights(reward.adapter, device="cpu")
    head = next(saved.pop(name) for name in list(saved) if name.endswith(".score.weight"))
    config = LoraConfig.from_pretrained(reward.adapter)
    config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", None, False
    for adapter in (REWARD, VALUE):
        policy.add_adapter(adapter, config)
        result = set_peft_model_state_dict(policy, saved, adapter_name=adapter)
        assert not result.unexpected_keys, f"the reward adapter does not fit the backbone: {result.unexpected_keys[:3]}"
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(f".{POLICY}." in name or f".{VALUE}." in name)
    backbone = Backbone(policy)
    backbone.keep_adapter_in_recomputation()
    heads = {adapter: ScoreHead(head.to(policy.device)) for adapter in (REWARD, VALUE)}
    views = [ScoreView(backbone, adapter, heads[adapter], adapter == VALUE) for adapter in (REWARD, VALUE)]
    return Models(policy, ReferenceView(backbone), *views)


def _add_copy(model: PeftModel, adapter: str, copy: str) -> None:
    model.add_adapter(copy, model.peft_config[adapter])
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if f".{adapter}." in name:
            parameters[name.replace(f".{adapter}.", f".{copy}.")].data.copy_(parameter.data)


def separate_models(loader: Loader, policy: Any, parent: Weights, reward: Weights) -> Models:
    """The four models one by one, as full fine-tuning and reward models on another base need them."""
    reference = load_policy(loader, parent).requires_grad_(False)
    float32_logits(reference)
    return Models(
        policy=policy,
        reference=reference,
        reward=load_reward(loader, reward).requires_grad_(False),
        value=load_reward(loader, reward, trainable=True),
    )


def run(ctx: StageContext) -> Result:
    stage = ctx.stage
    rows, eval_rows, datasets = ctx.rows()
    args = ctx.training_args(bf16=False, fp16=False, stop_token="eos", save_strategy="no")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
    if len(rows) < batch:
        fault = f"{len(rows)} prompts are fewer than one batch of {batch}"
        raise UserError(f"stages.{ctx.name}: {fault}; lower the batch sizes")
    prompts = _prompts(rows)
    answers = {}
    if stage.prompt_baseline not in ("none", "leave_one_out"):
        answers = answers_of(ctx, prompts, sampling(ctx, args))
    # DeepSpeed takes each model as a whole, and would place and cast the one behind several views several times.
    shared = shares_backbone(ctx.config, ctx.name) and sharding.of_process() is None
    ctx.say(f"{ctx.name}: PPO starts from its first update (a run that was stopped in it starts it anew)")
    ctx.say(f"{ctx.name}: " + ("four views of one backbone" if shared else "four separate models"))
    parent, first = ctx.start(), prompts["input_ids"][:NUM_COMPARED]
    policy = continue_policy(ctx.loader, parent, stage.lora, ctx.seed)
    float32_logits(policy)
    expected = assertions.parent_log_probs(policy, first)
    reward = ctx.weights_of(stage.reward)
    models = shared_models(policy, reward) if shared else separate_models(ctx.loader, policy, parent, reward)
    assertions.policy_is_parent(policy, first, expected)
    if stage.prompt_baseline != "none":
        # The critic starts from the reward model, but foretells the score less b(x), whose mean is about 0 whatever
        # level the reward model has learnt for a prompt: with its head it would start wrong by that level.
        for parameter in models.value.score.parameters():
            nn.init.zeros_(parameter)
    if args.gradient_checkpointing:  # PPOTrainer's own loop never enables it
        for model in [models.policy] if shared else [models.policy, models.value]:
            model.gradient_checkpointing_enable()
    trainer, centred = _trainer(ctx, args, models, prompts.select_columns(["input_ids"]))
    centred.baseline = _baseline(ctx, models.reward, answers, args.local_rollout_forward_batch_size)
    watch = Watch(ctx, trainer, {n: p for n, p in models.policy.named_parameters() if should_train(ctx, n)})
    if eval_rows is not None:
        watch.hold_out(eval_rows["prompt_ids"][:], sampling(ctx, args), models.policy, models.reward)
    metrics = {"initial_kl": _train(ctx, trainer, models, first)} | watch.finish()
    trained = [p for name, p in models.policy.named_parameters() if should_train(ctx, name)]
    assertions.finite_weights(ctx.name, trained)  # of the policy that is kept, which may be an earlier one
    state = trainer.state
    if PartialState().is_main_process:
        if stage.lora is not None:
            save_adapter(ctx, models.policy)
        else:
            models.policy.save_pretrained(ctx.new_output)
        write_json(ctx.folder / "log_history.json", state.log_history)
    metrics |= {"updates": state.global_step, "episodes": state.episode} | first_and_last(state.log_history, METRICS)
    return Result(metrics, num_parameters(models.policy, models.value), datasets)


def _trainer(ctx: StageContext, args: Any, models: Models, prompts: Any) -> tuple[Any, CentredReward]:
    """TRL's trainer, and the reward model it was given, which subtracts and sees what is scored."""
    stage = ctx.stage
    centred = CentredReward(models.reward, ctx.tokenizer.eos_token_id, (stage.added_shift, ctx.seed))
    trainer = ppo_trainer_class()(
        args=args,
        processing_class=ctx.tokenizer,
        model=models.policy,
        ref_model=models.reference,
        reward_model=centred,
        value_model=models.value,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(min(len(prompts), args.per_device_eval_batch_size))),
    )
    one_step_per_accumulation(trainer)
    group = stage.baseline_completions if stage.prompt_baseline == "leave_one_out" else 1
    trainer.dataloader = Watched(trainer.dataloader, centred.rollout.see, group)
    trainer.eval_dataloader = Watched(trainer.eval_dataloader, centred.rollout.forget)
    trainer.observe = centred.observe
    centred.watch(models.value)
    return trainer, centred


def sampling(ctx: StageContext, args: Any) -> Sampling:
    """How the policy is sampled in training."""
    return Sampling(args.temperature, args.response_length, args.local_rollout_forward_batch_size, ctx.seed)


def _prompts(rows: Any) -> Any:
    """Prompts as PPOTrainer takes them, `input_ids`; from rows with an answer of their own with `answer_ids`."""
    if "prompt_ids" in rows.column_names:
        return rows.select_columns(["prompt_ids"]).rename_column("prompt_ids", "input_ids")

    def cut(row: dict[str, list[int]]) -> dict[str, list[int]]:
        start = len(row["completion_mask"]) - row["completion_mask"][::-1].index(0)  # of the last answer
        return {"input_ids": row["input_ids"][:start], "answer_ids": row["input_ids"][start:]}

    return rows.map(cut, remove_columns=rows.column_names, desc="Taking answers apart")


def _baseline(ctx: StageContext, reward: Any, answers: dict[Prompt, list[Ids]], batch_size: int) -> Baseline | None:
    """What is subtracted from the scores of each prompt's completions."""
    stage, weight, number = ctx.stage, 1.0, ctx.stage.baseline_completions
    if stage.prompt_baseline == "none":
        return None
    if stage.baseline_shrinkage:
        counts = {"sft_mean": number, "leave_one_out": number - 1}
        icc = ctx.record_of(stage.shift).metrics["icc"]
        if icc is None:
            fault = f"{stage.shift} could not measure the ICC: too few prompts, or all scores are equal"
            raise UserError(f"stages.{ctx.name}.baseline_shrinkage: {fault}. Give it more prompts, or do not shrink")
        weight = reliability(icc["value"], counts.get(stage.prompt_baseline, 1))
        ctx.say(f"{ctx.name}: a prompt's baseline counts {weight:.2f}, the mean of all prompts the rest")
    if stage.prompt_baseline == "leave_one_out":
        return LeaveOneOut(number, weight)
    scores = offline_scores(ctx, reward, answers, batch_size)
    for prompt, values in scores.items():
        offset = stress.added_shift(prompt, stage.added_shift, ctx.seed)
        scores[prompt] = [value + offset for value in values]
    return Offline(scores, weight)


def one_step_per_accumulation(trainer: Any) -> None:
    """Keep PPOTrainer at one optimizer step per `gradient_accumulation_steps`.

    It draws the next prompts before it trains on the last ones, and at the end of each pass over the prompts
    accelerate would make every micro-batch a step.
    """
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False


def _train(ctx: StageContext, trainer: Any, models: Models, prompts: list[list[int]]) -> float:
    """Train, with the checks before and after; returns the KL to the reference on `prompts` before any update."""
    assertions.trains_exactly([models.policy], lambda name: should_train(ctx, name) or f".{VALUE}." in name)
    groups = {"policy": [], "value model": [p for p in models.value.parameters() if p.requires_grad]}
    for name, parameter in models.policy.named_parameters():
        if parameter.requires_grad:
            groups["value model" if f".{VALUE}." in name else "policy"].append(parameter)
    before = {what: assertions.fingerprint_of(parameters) for what, parameters in groups.items()}
    if not before["value model"]:
        raise assertions.CheckFailed("the value model has no trainable parameter, so the critic would never learn")
    models.policy.eval()
    kl = assertions.reference_is_parent(models.policy, models.reference, prompts)
    with contextlib.suppress(Stopped), _quick_collections():  # the watchdog has said why it stopped
        trainer.train()
    for what, parameters in groups.items():
        assertions.has_trained(before[what], parameters, f"{ctx.name}: {what}")
    return kl


@contextlib.contextmanager
def _quick_collections() -> Iterator[None]:
    """Leave what exists already out of garbage collections.

    PPOTrainer collects twice an update; half a million objects of imported modules take half a second each time.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
