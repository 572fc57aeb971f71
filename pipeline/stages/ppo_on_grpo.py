"""Step 3 with PPO and `trainer: grpo`: the stage of `ppo.py` on TRL's stable GRPOTrainer, with a value model."""

import functools

from pipeline.config.critic_config import CriticConfig
from pipeline.config.schema import Ppo
from pipeline.rl.best_policy import keep_best
from pipeline.rl.critic_trainer import CriticTrainer
from pipeline.rl.watchdog import Watch
from pipeline.stages.ppo import hand_over, prepare, resumed_from, sampling, train_checked
from pipeline.system.json_object import JsonObject
from pipeline.training import checkpoints
from pipeline.training.context import Result, StageContext
from pipeline.training.curves import report
from pipeline.training.fit import load_only, newest_checkpoint
from pipeline.training.progress import Report


def run(ctx: StageContext[Ppo]) -> Result:
    stage = ctx.stage
    rows, eval_rows, datasets = ctx.rows()
    group = stage.baseline_completions if stage.prompt_baseline == "leave_one_out" else 1
    args: CriticConfig = ctx.training_args(num_generations=group)
    start = prepare(ctx, args, rows)
    trainer = CriticTrainer(start.models, args, start.subtraction, start.prompts, ctx.tokenizer)
    watch = Watch(ctx, trainer, start.policy_parameters, centred=start.is_centred)
    if eval_rows is not None:
        watch.hold_out(eval_rows["prompt_ids"][:], sampling(ctx, args), start.models.policy, start.models.reward)
    checkpoint = newest_checkpoint(ctx)
    keep_best(trainer, watch.best, checkpoint)
    report(trainer, ctx.trackers)
    trainer.add_callback(checkpoints.MarkComplete())
    trainer.add_callback(Report(ctx.progress))
    if checkpoint is not None and checkpoints.is_last(checkpoint):
        load_only(args)
    train = functools.partial(trainer.train, resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    metrics: JsonObject = {"initial_kl": train_checked(ctx, start.models, start.first_prompts, train)}
    metrics |= watch.finish() | {"episodes": trainer.num_episodes}
    return hand_over(ctx, trainer, start, Result(metrics, {}, datasets, resumed_from(checkpoint)))
