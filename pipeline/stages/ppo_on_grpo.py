"""Step 3 with PPO and `trainer: grpo`: the stage of `ppo.py` on TRL's stable GRPOTrainer, with a value model."""

import functools

from accelerate import PartialState

from pipeline.chain.preflight import check_batch
from pipeline.config.critic_config import CriticConfig
from pipeline.config.schema import Ppo
from pipeline.models.generation import Ids
from pipeline.models.loading import num_parameters
from pipeline.rl.baselines import answers_of, make_baseline
from pipeline.rl.best_policy import keep_best
from pipeline.rl.centred_reward import Subtraction
from pipeline.rl.critic_trainer import CriticTrainer
from pipeline.rl.watchdog import Watch
from pipeline.stages.ppo import METRICS, load_models, sampling, take_prompts, train_checked
from pipeline.system.json_object import JsonObject
from pipeline.training import assertions, checkpoints
from pipeline.training.context import Result, StageContext
from pipeline.training.fit import first_and_last, load_only, newest_checkpoint, save_log, save_policy, should_train


def run(ctx: StageContext[Ppo]) -> Result:
    stage = ctx.stage
    rows, eval_rows, datasets = ctx.rows()
    group = stage.baseline_completions if stage.prompt_baseline == "leave_one_out" else 1
    args: CriticConfig = ctx.training_args(num_generations=group)
    batch = args.per_device_train_batch_size
    check_batch(len(rows), batch * PartialState().num_processes, f"stages.{ctx.name}: ")
    prompts = take_prompts(rows)
    # Before PPO's models are in memory: to sample, the parent is loaded once more.
    answers = answers_of(ctx, prompts, sampling(ctx, args))
    first_prompts: list[Ids] = prompts.take(assertions.NUM_COMPARED)["input_ids"][:]
    models = load_models(ctx, args, first_prompts)
    baseline = make_baseline(ctx, models.reward, answers, args.local_rollout_forward_batch_size)
    subtraction = Subtraction(baseline, stage.added_shift, ctx.seed)
    trainer = CriticTrainer(models, args, subtraction, prompts.select_columns(["input_ids"]), ctx.tokenizer)
    policy_parameters = {name: p for name, p in models.policy.named_parameters() if should_train(ctx, name)}
    watch = Watch(ctx, trainer, policy_parameters, centred=baseline is not None)
    if eval_rows is not None:
        watch.hold_out(eval_rows["prompt_ids"][:], sampling(ctx, args), models.policy, models.reward)
    checkpoint = newest_checkpoint(ctx)
    keep_best(trainer, watch.best, checkpoint)
    trainer.add_callback(checkpoints.MarkComplete())
    if checkpoint is not None and checkpoints.is_last(checkpoint):
        load_only(args)
    train = functools.partial(trainer.train, resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics: JsonObject = {"initial_kl": train_checked(ctx, models, first_prompts, train)}
    metrics |= watch.finish()
    # After `watch.finish`: the policy that is kept may be an earlier one.
    assertions.finite_weights(ctx.name, policy_parameters.values())
    save_policy(ctx, models.policy)
    save_log(ctx, trainer)
    metrics |= {"updates": trainer.state.global_step, "episodes": trainer.num_episodes}
    metrics |= first_and_last(trainer.state.log_history, METRICS)
    resumed = checkpoints.step_of(checkpoint) if checkpoint else None
    return Result(metrics, num_parameters(models.policy, models.value), datasets, resumed)
