"""Say into which sizes trainers of RL cut what they sample and learn from."""

import math
from typing import Protocol

from pipeline.config.schema import Options


class PpoSizes(Protocol):
    """Name the options of TRL's PPOConfig that are looked at; the class itself takes seconds to import."""

    gradient_accumulation_steps: int
    per_device_train_batch_size: int
    num_mini_batches: int
    whiten_rewards: bool


def fault_of_ppo(args: PpoSizes) -> str | None:
    """Say what is wrong with the sizes of a PPO stage, or return None.

    An update's batch is cut into mini-batches, and these into micro-batches.
    """
    batch = args.gradient_accumulation_steps * args.per_device_train_batch_size
    if batch % args.num_mini_batches:
        return "gradient_accumulation_steps * per_device_train_batch_size must be a multiple of num_mini_batches"
    mini = batch // args.num_mini_batches
    micro = min(mini, args.per_device_train_batch_size)
    if mini % micro:
        fault = f"a mini-batch of {mini} is cut into micro-batches of {micro} and {mini % micro}, which weigh the same"
        return f"{fault}; make {mini} (batch / num_mini_batches) a multiple of per_device_train_batch_size"
    every = args.gradient_accumulation_steps
    if batch // micro % every:
        fault = f"an update has {batch // micro} micro-batches and takes a step every {every}"
        mend = "choose gradient_accumulation_steps and num_mini_batches so that one divides the other"
        return f"{fault}, so that gradients of one update would be applied in the next; {mend}"
    if args.whiten_rewards and mini < 8:
        return f"whiten_rewards needs mini-batches of at least 8, and these have {mini}; lower num_mini_batches"
    return None


def batch_of(options: Options, num_processes: int = 1) -> int:
    """Return the rows of one optimizer step (PPO: of one update of the policy); `options`: all of `training:`."""
    return options["per_device_train_batch_size"] * options["gradient_accumulation_steps"] * num_processes


def batch_in_words(options: Options) -> str:
    """Say which options make a batch in one process."""
    keys = ("per_device_train_batch_size", "gradient_accumulation_steps")
    return " x ".join(f"`training.{key}` = {options[key]}" for key in keys)


def batches_per_sampling(options: Options, processes: int = 1) -> int:
    """Return for how many batches RLOO and GRPO sample completions at once; `options`: all of `training:`."""
    if options["generation_batch_size"] is not None:
        return max(options["generation_batch_size"] // (options["per_device_train_batch_size"] * processes), 1)
    return options["steps_per_generation"] or options["gradient_accumulation_steps"]


def cycle(options: Options, processes: int = 1) -> int:
    """Return the fewest optimizer steps in which RLOO and GRPO learn from all that they have sampled, and from no more.

    They sample before the first of them. The steps after it may learn from the same completions.
    """
    accumulated = options["gradient_accumulation_steps"]
    batches = batches_per_sampling(options, processes) * options["num_iterations"]
    return math.lcm(batches, accumulated) // accumulated
