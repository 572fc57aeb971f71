"""Step 3: PPO against the run's reward model, with KL to the parent policy.

PPOTrainer's loop is TRL's, unmodified; it samples and computes with less (`training/rollouts.py`). The reward model
that it is given subtracts the baseline (`rl/centred_reward.py`), and a subclass adds figures to its log.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from accelerate import PartialState
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, Trainer

from pipeline.chain.preflight import check_batch
from pipeline.config.lineage import shares_backbone
from pipeline.config.options import effective
from pipeline.config.schema import Ppo
from pipeline.launch import sharding
from pipeline.models.generation import Ids, Sampling
from pipeline.models.loading import continue_policy, float32_logits, num_parameters, to_device
from pipeline.models.ppo import Models, separate_models, shared_models, start_from_zero
from pipeline.models.views import VALUE
from pipeline.rl.baselines import answers_of, make_baseline
from pipeline.rl.centred_reward import CentredReward, Subtraction, Watched
from pipeline.rl.resuming import Place, keep_checkpoints
from pipeline.rl.watchdog import Stopped, Watch
from pipeline.system.json_object import JsonObject
from pipeline.training import assertions, checkpoints
from pipeline.training.context import Result, StageContext
from pipeline.training.curves import report
from pipeline.training.fit import first_and_last, newest_checkpoint, save_log, save_policy, should_train
from pipeline.training.progress import Report
from pipeline.training.trainers import ppo_trainer_class

if TYPE_CHECKING:
    from pipeline.config.critic_config import CriticConfig
    from pipeline.training.trainers import PPOConfig, PPOTrainer

METRICS = {
    "objective/kl": "kl",
    "objective/raw_scores": "score",
    "objective/centred_scores": "centred_score",
    "objective/rlhf_reward": "reward",
    "value/explained_variance": "explained_variance",
    "loss/value_avg": "value_loss",
    "policy/clipfrac_avg": "clip_fraction",
    "objective/entropy": "entropy",
}


def run(ctx: StageContext[Ppo]) -> Result:
    rows, eval_rows, datasets = ctx.rows()
    args: PPOConfig = ctx.training_args(bf16=False, fp16=False, stop_token="eos", **_saving())
    start = prepare(ctx, args, rows)
    trainer = _make_trainer(ctx, args, start)
    # PPOTrainer does not look at `control.should_training_stop`, so an exception must end it.
    watch = Watch(ctx, trainer, start.policy_parameters, centred=start.is_centred, raises=True)
    if eval_rows is not None:
        watch.hold_out(eval_rows["prompt_ids"][:], sampling(ctx, args), start.models.policy, start.models.reward)
    checkpoint = newest_checkpoint(ctx)
    keep_checkpoints(trainer, watch.best, checkpoint)
    report(trainer, ctx.trackers)
    trainer.add_callback(Report(ctx.progress))
    metrics: JsonObject = {"initial_kl": train_checked(ctx, start.models, start.first_prompts, trainer.train)}
    metrics |= watch.finish() | {"episodes": trainer.state.episode}
    return hand_over(ctx, trainer, start, Result(metrics, {}, datasets, resumed_from(checkpoint)))


@dataclass(frozen=True)
class Start:
    """Hold what PPO starts from, whichever class trains; `prompts` have the column `input_ids`."""

    prompts: Dataset
    first_prompts: list[Ids]
    models: Models
    subtraction: Subtraction
    policy_parameters: dict[str, nn.Parameter]

    @property
    def is_centred(self) -> bool:
        """Tell whether a baseline is taken off the scores."""
        return self.subtraction.baseline is not None


def prepare(ctx: StageContext[Ppo], args: "PPOConfig | CriticConfig", rows: Dataset) -> Start:
    """Load the models and make the baseline."""
    options = effective(ctx.stage.kind, ctx.stage.training)
    check_batch(len(rows), options, PartialState().num_processes, f"stages.{ctx.name}: ")
    prompts = _take_prompts(rows)
    # Before PPO's models are in memory: to sample, the parent is loaded once more.
    answers = answers_of(ctx, prompts, sampling(ctx, args))
    first_prompts: list[Ids] = prompts.take(assertions.NUM_COMPARED)["input_ids"][:]
    models = _load_models(ctx, args, first_prompts)
    baseline = make_baseline(ctx, models.reward, answers, args.local_rollout_forward_batch_size)
    return Start(
        prompts=prompts.select_columns(["input_ids"]),
        first_prompts=first_prompts,
        models=models,
        subtraction=Subtraction(baseline, ctx.stage.added_shift, ctx.seed),
        policy_parameters={name: p for name, p in models.policy.named_parameters() if should_train(ctx, name)},
    )


def hand_over(ctx: StageContext[Ppo], trainer: Trainer, start: Start, result: Result) -> Result:
    """Save the policy and the log, and complete the result with what both hold."""
    # After `watch.finish`: the policy that is kept may be an earlier one.
    assertions.finite_weights(ctx.name, start.policy_parameters.values())
    save_policy(ctx, start.models.policy)
    save_log(ctx, trainer)
    metrics = result.metrics | {"updates": trainer.state.global_step}
    metrics |= first_and_last(trainer.state.log_history, METRICS)
    parameters = num_parameters(start.models.policy, start.models.value)
    return dataclasses.replace(result, metrics=metrics, parameters=parameters)


def resumed_from(checkpoint: Path | None) -> int | None:
    """Return the step of the checkpoint that training went on from."""
    return checkpoints.step_of(checkpoint) if checkpoint else None


def _saving() -> dict[str, Any]:
    """Say how checkpoints are made: DeepSpeed has a form of its own for them, which PPO cannot go on from."""
    return {} if sharding.of_process() is None else {"save_strategy": "no"}


def sampling(ctx: StageContext[Ppo], args: "PPOConfig | CriticConfig") -> Sampling:
    """Say how the policy is sampled in training."""
    return Sampling(args.temperature, args.response_length, args.local_rollout_forward_batch_size, ctx.seed)


def _take_prompts(rows: Dataset) -> Dataset:
    """Return prompts as PPOTrainer takes them, `input_ids`; from rows with an answer of their own with `answer_ids`.

    Such a row is a dialogue as it would be trained on: the last answer is what stands behind the last 0 of the mask.
    """
    if "prompt_ids" in rows.column_names:
        return rows.select_columns(["prompt_ids"]).rename_column("prompt_ids", "input_ids")

    def cut(row: dict[str, list[int]]) -> dict[str, list[int]]:
        start = len(row["completion_mask"]) - row["completion_mask"][::-1].index(0)
        return {"input_ids": row["input_ids"][:start], "answer_ids": row["input_ids"][start:]}

    return rows.map(cut, remove_columns=rows.column_names, desc="Taking answers apart")


def _load_models(ctx: StageContext[Ppo], args: "PPOConfig | CriticConfig", prompts: list[Ids]) -> Models:
    """Load the four models, and check on `prompts` that the policy is its parent.

    The baseline is scored before there is a trainer. So the reward model is put on this process's device, and both the
    reward model and the backbone that it may share with the policy are put in eval mode: no dropout in the scores.
    """
    stage = ctx.stage
    assert stage.reward is not None, "references.py fills it in"
    # DeepSpeed takes each model as a whole, and would place and cast the one behind several views several times.
    shared = shares_backbone(ctx.config, ctx.name) and sharding.of_process() is None
    ctx.say(f"{ctx.name}: " + ("its four models share one base" if shared else "its four models are separate"))
    parent = ctx.start()
    reward = ctx.weights_of(stage.reward)
    policy = continue_policy(ctx.loader, parent, stage.lora, ctx.seed)
    float32_logits(policy)
    expected = assertions.parent_log_probs(policy, prompts)
    if shared:
        assert isinstance(policy, PeftModel)
        models = shared_models(policy, reward)
    else:
        models = separate_models(ctx.loader, policy, parent, reward)
    assertions.policy_is_parent(policy, prompts, expected)
    if stage.prompt_baseline != "none":
        start_from_zero(models.value)
    if args.gradient_checkpointing:  # PPOTrainer's own loop never enables it
        for model in [models.policy] if shared else [models.policy, models.value]:
            enable = cast(PreTrainedModel, model).gradient_checkpointing_enable  # a PeftModel hands it on
            enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    to_device(models.reward)
    models.policy.eval()
    return models


def _make_trainer(ctx: StageContext[Ppo], args: "PPOConfig", start: Start) -> "PPOTrainer":
    """Make TRL's trainer, which learns from the scores less the baseline, and logs what is scored."""
    stage = ctx.stage
    models = start.models
    centred = CentredReward(models.reward, models.value, cast(int, ctx.tokenizer.eos_token_id), start.subtraction)
    trainer = ppo_trainer_class(centred.observe)(
        args=args,
        processing_class=ctx.tokenizer,
        model=models.policy,
        ref_model=models.reference,
        reward_model=centred,
        value_model=models.value,
        train_dataset=start.prompts,
        eval_dataset=start.prompts.take(min(len(start.prompts), args.per_device_eval_batch_size)),
    )
    one_step_per_accumulation(trainer)
    # PPOTrainer makes its dataloaders itself, so that they can be replaced only now.
    group = stage.baseline_completions if stage.prompt_baseline == "leave_one_out" else 1
    generator = getattr(trainer.dataloader, "synchronized_generator", None)
    trainer.dataloader = Place(Watched(trainer.dataloader, centred.rollout.see, group), generator)
    trainer.eval_dataloader = Watched(trainer.eval_dataloader, centred.rollout.forget)
    return trainer


def one_step_per_accumulation(trainer: "PPOTrainer") -> None:
    """Keep PPOTrainer at one optimizer step per `gradient_accumulation_steps`.

    It draws the next prompts before it trains on the last ones, and at the end of each pass over the prompts
    accelerate would make every micro-batch a step.
    """
    # upstream: PPOTrainer makes its Accelerator without the plugin that this belongs to, and takes none from us.
    trainer.accelerator.gradient_state.plugin_kwargs["sync_with_dataloader"] = False


def train_checked(ctx: StageContext[Ppo], models: Models, prompts: list[Ids], train: Callable[[], object]) -> float:
    """Train, with the checks before and after; return the KL to the reference on `prompts` before any update."""
    assertions.trains_exactly([models.policy], lambda name: should_train(ctx, name) or f".{VALUE}." in name)
    groups: dict[str, list[nn.Parameter]] = {"policy": [], "value model": []}
    groups["value model"] += [p for p in models.value.parameters() if p.requires_grad]
    for name, parameter in models.policy.named_parameters():
        if parameter.requires_grad:
            groups["value model" if f".{VALUE}." in name else "policy"].append(parameter)
    before = {what: assertions.fingerprint_of(parameters) for what, parameters in groups.items()}
    if not before["value model"]:
        raise assertions.CheckFailed("the value model has no trainable parameter, so the critic would never learn")
    models.policy.eval()
    kl = assertions.reference_is_parent(models.policy, models.reference, prompts)
    with contextlib.suppress(Stopped):  # the watchdog has said why it stopped
        train()
    for what, parameters in groups.items():
        assertions.has_trained(before[what], parameters, f"{ctx.name}: {what}")
    return kl
