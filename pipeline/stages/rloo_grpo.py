"""Step 3 with RLOO or GRPO: TRL's trainers, scored by the run's reward model and/or functions from the config."""

import functools
from collections.abc import Callable
from typing import Any, cast

from peft import PeftModel
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from pipeline.config import functions
from pipeline.config.schema import Online
from pipeline.data.encode import prompt_ids
from pipeline.models import scoring
from pipeline.models.generation import Sampling
from pipeline.models.loading import continue_policy, float32_logits, load_policy, load_reward, precision_kept
from pipeline.models.views import Backbone, ReferenceView
from pipeline.rl import stress
from pipeline.rl.watchdog import Watch
from pipeline.training import assertions
from pipeline.training.context import Result, StageContext
from pipeline.training.fit import fit, should_train
from pipeline.training.trainers import reference_given

RewardFunction = Callable[..., list[float]]


def reward_model_function(ctx: StageContext[Online], model: Any) -> RewardFunction:
    """TRL's form of a reward, from the ids that were sampled; completions are not tokenised a second time."""

    def reward_model(prompts: list[Any], completion_ids: list[list[int]], **_: object) -> list[float]:
        sequences = [prompt_ids(ctx.tokenizer, p) + ids for p, ids in zip(prompts, completion_ids, strict=True)]
        return scoring.score(model, sequences, cast(int, ctx.tokenizer.pad_token_id))

    return reward_model


def judge_function(judge: functions.Judge, name: str) -> RewardFunction:
    """TRL's form of a reward, from a function (prompt, completion) -> float; the prompt is its last message."""

    def function(prompts: list[Any], completions: list[Any], **_: object) -> list[float]:
        scores = []
        for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            texts = prompt[-1]["content"], completion[-1]["content"]
            scores.append(functions.judged(judge, name, *texts, f"row {row} of the batch"))
        return scores

    function.__name__ = name.replace(":", ".")
    return function


def with_shift(ctx: StageContext[Online], reward: RewardFunction) -> RewardFunction:
    """Add the stage's `added_shift` to a reward."""

    @functools.wraps(reward)
    def shifted(prompts: list[Any], **columns: Any) -> list[float]:
        ids = [prompt_ids(ctx.tokenizer, prompt) for prompt in prompts]
        offsets = [stress.added_shift(prompt, ctx.stage.added_shift, ctx.seed) for prompt in ids]
        return [score + offset for score, offset in zip(reward(prompts=prompts, **columns), offsets, strict=True)]

    return shifted


def run(ctx: StageContext[Online]) -> Result:
    stage = ctx.stage
    args = ctx.training_args()
    rewards: list[Any] = []  # RewardFunctions; TRL's own type is a list, which takes no other type
    reward_model = None
    rows, eval_rows, datasets = ctx.rows()
    if stage.reward:
        reward_model = load_reward(ctx.loader, ctx.weights_of(stage.reward)).to(args.device)
        rewards.append(reward_model_function(ctx, reward_model.eval()))
    for reference in stage.reward_functions:
        judge = functions.function(reference, ctx.config.folder, f"stages.{ctx.name}.reward_functions")
        rewards.append(judge_function(judge, reference))
    if stage.added_shift:
        rewards[0] = with_shift(ctx, rewards[0])
    parent = ctx.start()
    model = continue_policy(ctx.loader, parent, stage.lora, ctx.seed)
    float32_logits(model)
    first = rows["prompt_ids"][: assertions.NUM_COMPARED]
    expected = assertions.parent_log_probs(model, first)
    reference = load_policy(ctx.loader, parent) if stage.lora is None and args.beta else None
    if reference is not None:
        float32_logits(reference)
    prompts = rows.remove_columns(["prompt_ids"])
    # Any: the two classes have one form, but no class in common that shows it.
    trainer_class: Any = GRPOTrainer if isinstance(args, GRPOConfig) else RLOOTrainer
    with precision_kept(model), reference_given(stage.type, reference):
        trainer = trainer_class(model, rewards, args, train_dataset=prompts, processing_class=ctx.tokenizer)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    watch = Watch(ctx, trainer, {name: p for name, p in policy.named_parameters() if should_train(ctx, name)})
    if eval_rows is not None:
        assert reward_model is not None, "the config refuses it"
        size = min(args.per_device_train_batch_size, stage.num_eval_prompts)
        sampling = Sampling(args.temperature, cast(int, args.max_completion_length), size, ctx.seed)
        watch.hold_out(eval_rows["prompt_ids"][:], sampling, policy, reward_model)
    assertions.policy_is_parent(model, first, expected)
    # Without a KL penalty TRL keeps no reference.
    metrics = {"initial_kl": _initial_kl(trainer, first)} if trainer.beta else {}
    return fit(ctx, trainer, datasets, metrics, watch.finish)


def _initial_kl(trainer: Any, prompts: list[list[int]]) -> float:
    """KL to the reference before the first update, in the precision of the training."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    reference = ReferenceView(Backbone(model)) if isinstance(model, PeftModel) else trainer.ref_model
    with trainer.accelerator.autocast():
        return assertions.reference_is_parent(model, reference, prompts)
